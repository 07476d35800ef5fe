"""Whether the agent says what it writes: its audio, recognised, against its text stream.

The channel is cut where it is silent and each stretch is recognised by itself, so that no stretch
hangs on another and the same audio gives the same words. Of what a recogniser gives, these are not
believed: words beyond the most that speech of that length can hold, a word over and over, a stretch
that compresses like a loop or is in another script (`pipeline.engines.recogniser`, whose guards
these are; faster-whisper has more within).

What the error means: the recogniser's own errors are in it. On clean espeak speech pocketsphinx has
.2 to .3 (tests/stages/test_heard.py, test_recogniser.py); compare models, or hold it against the
error on speech whose text is certain. Numbers and spellings count as they are
written: `$5` is not `five dollars`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter

import numpy as np

from duplex.degeneration import compression_ratio, stretches
from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE, frames_covering_samples
from duplex.metrics import word_error_rate, words_of
from duplex.records import Word
from pipeline.engines.recogniser import (
    MAX_COMPRESSION_RATIO,
    RECOGNISER_RATE,
    Recogniser,
    in_script,
    token_limit,
    until_loop,
)

JOIN_FRAMES = 6  # a pause of half a second parts two stretches; words within need their neighbours
PAD_FRAMES = 2  # the onset of a soft sound lies under the level of speech
MAX_FRAMES = 350  # 28 s, a Whisper window less the padding


@dataclass(frozen=True)
class Heard:
    """words: what was recognised, times from the start of the channel. refused: stretches of which
    a guard left something out. error_rate: of `words` against the text, None without text."""

    words: tuple[Word, ...]
    refused: int
    error_rate: float | None


def hear(
    text: Sequence[tuple[int, str]],
    agent: np.ndarray,
    active: np.ndarray,
    recogniser: Recogniser,
    language: str = "en",
) -> Heard:
    """
    Args:
        text: the agent's timed words; their order is used, not their frames.
        agent: float32 [S] at 24 kHz.
        active: bool [T], where the agent speaks (`duplex.metrics.speech_activity`).

    Raises:
        ValueError: `active` is not of the frames of `agent`.
    """
    if active.shape != (frames_covering_samples(len(agent)),):
        raise ValueError(
            f"speech activity must have the frames of the audio, "
            f"{frames_covering_samples(len(agent))}, found {active.shape}"
        )
    words: list[Word] = []
    refused = 0
    for start, end in parts(active):
        clip = agent[start * FRAME_SAMPLES : end * FRAME_SAMPLES]
        given = recogniser.transcribe(resampled(clip), language)
        kept = believed(given, len(clip) / SAMPLE_RATE, language)
        refused += len(kept) < len(given)
        begin_s = start * FRAME_SAMPLES / SAMPLE_RATE
        words += [_later(word, begin_s) for word in kept]
    said = words_of(" ".join(word for _, word in text))
    heard = words_of(" ".join(word.text for word in words))
    return Heard(tuple(words), refused, word_error_rate(said, heard) if said else None)


def parts(active: np.ndarray) -> list[tuple[int, int]]:
    """Frames [start, end) that are recognised together: stretches of speech with some silence on
    both sides, in order, never overlapping, none longer than `MAX_FRAMES` and its padding."""
    found: list[tuple[int, int]] = []
    for stretch in stretches(active, JOIN_FRAMES):
        count = -(-(stretch.end - stretch.start) // MAX_FRAMES)
        edges = np.linspace(stretch.start, stretch.end, count + 1).round().astype(int).tolist()
        edges[0] = max(0, edges[0] - PAD_FRAMES)
        edges[-1] = min(len(active), edges[-1] + PAD_FRAMES)
        found += pairwise(edges)
    return found


def believed(words: Sequence[Word], seconds: float, language: str) -> list[Word]:
    """The words of one stretch that the guards let through."""
    text = " ".join(word.text for word in words)
    if not in_script(text, language) or (compression_ratio(text) or 0.0) > MAX_COMPRESSION_RATIO:
        return []
    return until_loop(words[: token_limit(seconds)], attrgetter("text"))


def resampled(samples: np.ndarray) -> np.ndarray:
    """float32 [S] at 24 kHz -> at 16 kHz."""
    import soxr

    return soxr.resample(samples.astype(np.float32), SAMPLE_RATE, RECOGNISER_RATE)


def _later(word: Word, by_s: float) -> Word:
    return word.model_copy(
        update={"start_s": round(word.start_s + by_s, 6), "end_s": round(word.end_s + by_s, 6)}
    )
