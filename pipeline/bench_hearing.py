"""What an agent said and when: speech by voice activity, words of its text stream or recognised.

Words of the text stream begin at their frame and end where the next one begins, or where the
speech that they are heard in ends. Recognised words come from windows of speech, none of which
crosses the end of an interruption: the benchmark's own transcripts begin there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import soxr

from duplex.duplex_bench import Span, TimedWord
from duplex.frames import FRAME_S, SAMPLE_RATE
from pipeline.engines.recogniser import RECOGNISER_RATE, Recogniser
from pipeline.engines.vad import VAD_RATE, VadSettings, VoiceActivity, speech_spans
from pipeline.engines.vad import revision as vad_revision
from pipeline.evaluation.scoring import timed_words
from pipeline.recorded_turns import recogniser_windows

# silero-vad's own defaults, which the benchmark leaves as they are; its speech is never cut.
BENCH_VAD = VadSettings(min_speech_s=0.25, max_speech_s=86_400)
WINDOW_S = 28.0  # a recogniser's
AHEAD_S = 0.5  # a text stream is this far ahead of its audio at most
CONTEXT_S = 0.15  # of silence around a window


class Ears:
    """Voice activity, loaded when it is first needed, and a recogniser if one is asked for."""

    def __init__(self, recogniser: Recogniser | None = None, language: str = "en"):
        self._vad: VoiceActivity | None = None
        self._recogniser = recogniser
        self._language = language

    def protocol(self) -> dict[str, str]:
        words = "the model's text stream"
        if self._recogniser is not None:
            words = f"recognised ({self._language}): {self._recogniser.revision()}"
        return {"words": words, "speech": f"{vad_revision()}, speech of 250 ms, silence of 100 ms"}

    def speech(self, samples: np.ndarray) -> tuple[Span, ...]:
        """Where a channel holds speech. samples: float32 [S] at 24 kHz."""
        self._vad = self._vad or VoiceActivity()
        heard = soxr.resample(samples, SAMPLE_RATE, VAD_RATE)
        return tuple(Span(*bounds) for bounds in speech_spans(heard, self._vad, BENCH_VAD))

    def words(
        self,
        agent: np.ndarray,
        text: Sequence[tuple[int, str]],
        speech: Sequence[Span],
        *,
        lead_in_s: float = 0.0,
        cut_s: float | None = None,
    ) -> tuple[str, tuple[TimedWord, ...]]:
        """(what was said in the lead-in, by the text stream; the words after it).

        Args:
            agent: float32 [S] at 24 kHz, without the lead-in.
            text: (frame, piece) of the conversation with its lead-in.
            cut_s: no recognised word crosses this.
        """
        duration_s = len(agent) / SAMPLE_RATE
        opening, words = stream_words(text, speech, lead_in_s, duration_s)
        if self._recogniser is not None:
            words = recognised(self._recogniser, self._language, agent, speech, cut_s)
        return opening, words


def stream_words(
    text: Sequence[tuple[int, str]], speech: Sequence[Span], lead_in_s: float, duration_s: float
) -> tuple[str, tuple[TimedWord, ...]]:
    """(opening, words) of a text stream; times from the end of the lead-in. Pure.

    A word without speech until the next one, or within 0.5 s, lasts a frame at most.
    """
    timed = [(round(f * FRAME_S - lead_in_s, 6), word) for f, word in timed_words(text)]
    opening = " ".join(word for start_s, word in timed if start_s < 0)
    timed = [(start_s, word) for start_s, word in timed if 0 <= start_s < duration_s]
    words = []
    for index, (start_s, word) in enumerate(timed):
        until_s = timed[index + 1][0] if index + 1 < len(timed) else duration_s
        latest_s = min(until_s, start_s + AHEAD_S)
        ends = (s.end_s for s in speech if s.end_s > start_s and s.start_s < latest_s)
        end_s = min(until_s, next(ends, start_s + FRAME_S))
        words.append(TimedWord(word, start_s, round(end_s, 6)))
    return opening, tuple(words)


def recognised(
    recogniser: Recogniser,
    language: str,
    agent: np.ndarray,
    speech: Sequence[Span],
    cut_s: float | None = None,
) -> tuple[TimedWord, ...]:
    """Words of float32 [S] at 24 kHz, each speech window heard by itself, none across `cut_s`."""
    heard = soxr.resample(agent, SAMPLE_RATE, RECOGNISER_RATE).astype(np.float32)
    duration_s = len(heard) / RECOGNISER_RATE
    cut_s = duration_s if cut_s is None else min(cut_s, duration_s)
    words = []
    for from_s, to_s in ((0.0, cut_s), (cut_s, duration_s)):
        inside = [
            (max(s.start_s, from_s), min(s.end_s, to_s))
            for s in speech
            if s.end_s > from_s and s.start_s < to_s
        ]
        for start_s, end_s in recogniser_windows(inside, WINDOW_S):
            begin_s, stop_s = max(start_s - CONTEXT_S, from_s), min(end_s + CONTEXT_S, to_s)
            part = heard[round(begin_s * RECOGNISER_RATE) : round(stop_s * RECOGNISER_RATE)]
            for word in recogniser.transcribe(part, language):
                first_s = min(begin_s + word.start_s, to_s)
                last_s = min(begin_s + word.end_s, to_s)
                words.append(TimedWord(word.text, round(first_s, 3), round(last_s, 3)))
    return tuple(words)
