"""espeak as the pocket base's data is spoken with: its voices, and shorter or longer throats.

espeak has some forty variants, and a base that has heard them alone understands others badly. A
voice's `warp` plays what espeak says so many times as fast: pitch and formants rise by it, as those
of a smaller speaker do, and times shrink. Voices without it sound as espeak made them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import soxr

from duplex.errors import RecordError
from duplex.frames import SAMPLE_RATE
from pipeline.engines.espeak import EspeakEngine, Phone

WARP = "warp"


class Espeak:
    """An engine that speaks parameters with a `warp`; closed at the end of a `with`."""

    def __enter__(self) -> Espeak:
        self._engine = EspeakEngine()
        self.revision = self._engine.revision
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def __call__(self, text: str, params: dict[str, Any]) -> np.ndarray:
        """float32 [S] at 24 kHz.

        Raises:
            RecordError: it gave no speech.
        """
        own, warp = _split(params)
        samples = warped(self._engine.synthesize(text, own).samples, warp)
        if not len(samples):
            raise RecordError(f"espeak must give speech for {text!r}, and gave none")
        return samples

    def sounds(
        self, text: str, params: dict[str, Any]
    ) -> tuple[int, Sequence[Phone], Sequence[float]]:
        """Of the same speech: its samples' number, its phones, and when each word ends, in
        seconds."""
        own, warp = _split(params)
        utterance, phones = self._engine.synthesize_with_phones(text, own)
        length = len(warped(utterance.samples, warp))
        shifted = [Phone(phone.name, phone.start_s / warp) for phone in phones]
        return length, shifted, [word.end_s / warp for word in utterance.words]


def _split(params: dict[str, Any]) -> tuple[dict[str, Any], float]:
    return {k: v for k, v in params.items() if k != WARP}, float(params.get(WARP, 1.0))


def warped(samples: np.ndarray, warp: float) -> np.ndarray:
    """float32 [S / warp]: `warp` times as fast, and as high."""
    if warp == 1.0:
        return samples
    return soxr.resample(samples, SAMPLE_RATE, SAMPLE_RATE / warp, quality="HQ").astype(np.float32)
