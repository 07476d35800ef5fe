"""Conversations spoken by espeak-ng and mixed at known times, as recordings to import."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
import soxr

from duplex.frames import SAMPLE_RATE
from pipeline.engines.espeak import EspeakEngine

AGENT_VOICE = {"voice": "en-us", "variant": "f2"}
USER_VOICE = {"voice": "en-us", "variant": "m3"}
# (role, start in seconds, text)
SCRIPT = (
    ("user", 1.0, "Good morning. What would you like today?"),
    ("agent", 5.0, "I would like a large coffee, please."),
    ("user", 9.5, "That is three dollars. Anything else?"),
    ("agent", 14.0, "No, thank you very much. Have a good day."),
)
NOISE = 1e-3  # -60 dBFS, as of a quiet room


def speak(script=SCRIPT, seconds=None, seed=0):
    """float32 [S, 2] at 24 kHz, left agent; and each turn's (role, start_s, end_s, words)."""
    generator = np.random.default_rng(seed)
    turns, parts = [], []
    with EspeakEngine() as engine:
        for role, start_s, text in script:
            spoken = engine.synthesize(text, AGENT_VOICE if role == "agent" else USER_VOICE)
            words = [
                (w.text, round(start_s + w.start_s, 3), round(start_s + w.end_s, 3))
                for w in spoken.words
            ]
            turns.append((role, words[0][1], words[-1][2], words))
            parts.append((0 if role == "agent" else 1, round(start_s * SAMPLE_RATE), spoken))
    total = round((seconds or max(turn[2] for turn in turns) + 1.5) * SAMPLE_RATE)
    samples = generator.normal(scale=NOISE, size=(total, 2)).astype(np.float32)
    for side, first, spoken in parts:
        samples[first : first + len(spoken.samples), side] += spoken.samples
    return samples, turns


def alignments(turns):
    names = {"agent": "SPEAKER_MAIN", "user": "SPEAKER_OTHER"}
    return {
        "alignments": [
            [text, [start_s, end_s], names[role]]
            for role, _, _, words in turns
            for text, start_s, end_s in words
        ]
    }


def write(path: Path, samples, *, rate=SAMPLE_RATE, subtype="PCM_16", turns=None) -> Path:
    """Write a recording, and its transcript when `turns` are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    resampled = samples if rate == SAMPLE_RATE else soxr.resample(samples, SAMPLE_RATE, rate)
    soundfile.write(path, resampled, rate, subtype=subtype)
    if turns is not None:
        path.with_suffix(".json").write_text(json.dumps(alignments(turns)))
    return path
