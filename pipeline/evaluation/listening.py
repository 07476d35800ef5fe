"""How an evaluation hears: where a channel holds speech, and what a recogniser makes of it.

level    a frame's level (`duplex.metrics.speech_activity`): exact on synthetic speech and
         silence, fooled by noise
silero   silero-vad: for real voices and noisy channels; a frame counts where a span of speech
         covers half of it and more
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from duplex.config import VadName
from duplex.frames import FRAME_S, SAMPLE_RATE, frames_covering_samples
from duplex.metrics import speech_activity


class Listener:
    """Loads a model when it is first needed. Its models keep state while they work: threads take
    turns.

    Args:
        recogniser: as for `--listen`: a name, and a model behind a colon; "" for none.
    """

    def __init__(
        self,
        vad: VadName = "level",
        recogniser: str = "",
        language: str = "en",
        dnsmos: bool = False,
    ):
        self._vad, self._language = vad, language
        self._name, _, model = recogniser.partition(":")
        self._model = model or None
        self._rates = dnsmos
        self._turn = threading.RLock()

    def activity(self, samples: np.ndarray) -> np.ndarray:
        """Which frames of float32 [S] at 24 kHz hold speech: bool [T]."""
        if self._vad == "level":
            return speech_activity(samples)
        import soxr

        from pipeline.engines.vad import VAD_RATE, speech_spans

        heard = soxr.resample(samples, SAMPLE_RATE, VAD_RATE).astype(np.float32)
        with self._turn:
            spans = speech_spans(heard, self._silero)
        return covered(spans, frames_covering_samples(len(samples)))

    def error_rate(
        self, words: Sequence[tuple[int, str]], agent: np.ndarray, active: np.ndarray
    ) -> float | None:
        """Word error rate of the recognised audio against the text stream; None without text or
        recogniser."""
        if not self._name:
            return None
        from pipeline.evaluation.heard import hear

        with self._turn:
            return hear(words, agent, active, self._recogniser, self._language).error_rate

    def rating(self, agent: np.ndarray) -> float | None:
        """DNSMOS's overall rating of the agent's audio, 1 to 5; None where it is not asked for or
        there is too little to rate.

        Raises:
            MissingInputError: the package is not installed.
        """
        if not self._rates:
            return None
        with self._turn:
            score = self._dnsmos.score(agent)
        return None if score is None else score.overall

    def protocol(self) -> dict[str, str]:
        """What a report says of it."""
        said = {"speech_found_by": "level"}
        if self._vad == "silero":
            from pipeline.engines.vad import revision

            said = {"speech_found_by": revision()}
        if self._name:
            said["recogniser"] = self._recogniser.revision()
        if self._rates:
            from pipeline.engines import dnsmos

            said["dnsmos"] = dnsmos.revision()
        return said

    @cached_property
    def _dnsmos(self) -> Any:
        from pipeline.engines.dnsmos import Dnsmos

        return Dnsmos()

    @cached_property
    def _silero(self) -> Any:
        from pipeline.engines.vad import VoiceActivity

        return VoiceActivity()

    @cached_property
    def _recogniser(self) -> Any:
        from pipeline.engines.recogniser import make_recogniser

        return make_recogniser(self._name, self._model, self._language)


def covered(spans: Sequence[tuple[float, float]], num_frames: int) -> np.ndarray:
    """bool [T]: the frames of which spans in seconds cover half and more."""
    seconds = np.zeros(num_frames)
    edges = np.arange(num_frames) * FRAME_S
    for start_s, end_s in spans:
        seconds += np.clip(np.minimum(end_s, edges + FRAME_S) - np.maximum(start_s, edges), 0, None)
    return seconds >= FRAME_S / 2 - 1e-9
