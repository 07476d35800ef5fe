"""How well the pocket base's speech says its text, beside the synthesiser's of the same turns.

One recogniser with one language model of all turns hears three readings of each: the base's own
speech; espeak's, encoded and decoded by the codec, which no base trained on its codes can be
expected to surpass; and espeak's as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.told import Told
from duplex.frames import FRAME_SAMPLES, frames_covering_samples
from duplex.metrics import says_any
from duplex.mixing import normalize_loudness
from pipeline.engines.codec import decode, encode
from training.pocket.base_bank import LEAD_FRAMES, LOUDNESS_DBFS, TAIL_FRAMES, Codec
from training.pocket.base_espeak import Espeak
from training.pocket.base_units import NEUTRAL
from training.pocket.base_voices import agent_speaker, spoken_params

Turn = tuple[str, np.ndarray, str]  # its text, how it sounds, float32 [S], and the agent's voice
Fact = tuple[str, Turn]  # a fact's value, and the answer whose text says it


def speech_says_text(
    turns: Sequence[Turn], facts: Sequence[Fact], codec: Codec
) -> dict[str, dict[str, Any]]:
    """Word errors against the text row, of each of the three; and of the facts that are right in
    the text, how many values are heard, of those that the recogniser's dictionary has."""
    readings = _readings(turns, codec)
    recogniser = Told([text for text, *_ in turns]) if turns else None
    found: dict[str, dict[str, Any]] = {}
    for name, sounds in readings.items():
        counted = [
            recogniser.errors(text, samples)
            for (text, *_), samples in zip(turns, sounds, strict=True)
            if recogniser is not None
        ]
        errors, words = sum(e for e, _ in counted), sum(n for _, n in counted)
        rate = errors / words if words else None
        found[name] = {"turns": len(turns), "words": words, "wer": rate}
    if recogniser is None:
        return found
    known = [(value, turn) for value, turn in facts if recogniser.knows(value)]
    for name, sounds in _readings([turn for _, turn in known], codec).items():
        hits = [
            says_any(" ".join(recogniser.heard(samples)), [value])
            for (value, _), samples in zip(known, sounds, strict=True)
        ]
        found[name] |= {"values_heard": sum(hits), "values": len(hits)}
    return found


def _readings(turns: Sequence[Turn], codec: Codec) -> dict[str, list[np.ndarray]]:
    """How each turn sounds, by who reads it."""
    readings: dict[str, list[np.ndarray]] = {"base": [], "through_codec": [], "synthesiser": []}
    with Espeak() as speak:
        for text, samples, voice in turns:
            spoken = speak(text, spoken_params(agent_speaker(voice, NEUTRAL)))
            levelled = normalize_loudness(spoken, LOUDNESS_DBFS)
            readings["base"].append(samples)
            readings["through_codec"].append(_through(codec, levelled))
            readings["synthesiser"].append(levelled)
    return readings


def _through(codec: Codec, samples: np.ndarray) -> np.ndarray:
    """float32 [S]: encoded and decoded, with silence around."""
    frames = LEAD_FRAMES + frames_covering_samples(len(samples)) + TAIL_FRAMES
    channel = np.zeros(frames * FRAME_SAMPLES, dtype=np.float32)
    channel[LEAD_FRAMES * FRAME_SAMPLES :][: len(samples)] = samples
    return decode(codec.mimi, encode(codec.mimi, channel[None])[0])
