"""Training crops: places on the tape, at many levels, with rooms, second voices and silence.

B crops of F frames, S = F * 1920 samples. Every batch is a function of its generator alone.

    12 %  a second voice under the first, 0 to 12 dB softer; the labels are the first's
     4 %  no speech: digital silence, or the 440 Hz tone that stands for a user who says nothing
    30 %  room tone below it (-75 to -45 dBFS), 10 % the noise of a place (-60 to -36)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from duplex.config_data import TimelineSection
from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE
from duplex.room import room_of
from training.pocket.codec_labels import FRAME_STEPS, STEP_SAMPLES, frame_labels
from training.pocket.speech_pool import Tape

SECOND_VOICE, NO_SPEECH, ROOM_TONE, PLACE = 0.12, 0.04, 0.3, 0.1
GAIN_DB = (-18.0, 8.0)
SECOND_DB = (-12.0, 0.0)
ROOM_DBFS, PLACE_DBFS = (-75.0, -45.0), (-60.0, -36.0)
TONE_HZ, TONE_LEVEL = 440.0, 0.5
BED_S = 60.0
BED_DBFS = -40.0
PEAK = 0.95


@dataclass(frozen=True)
class Beds:
    """A minute of room tone and of a place's noise, float32 [S], at `BED_DBFS`."""

    tone: np.ndarray = field(repr=False)
    place: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Crops:
    """audio: float32 [B, 1, S]; labels: int64 [B, F, 2]."""

    audio: torch.Tensor
    labels: torch.Tensor


@lru_cache(maxsize=1)
def make_beds(seed: int) -> Beds:
    silence = np.zeros(round(BED_S * SAMPLE_RATE), dtype=np.float32)
    tone = room_of(silence, TimelineSection(room_tone_dbfs=BED_DBFS), seed)
    place = room_of(silence, TimelineSection(noise_dbfs=BED_DBFS), seed)
    assert tone is not None and place is not None
    return Beds(tone, place)


def draw_crops(
    tape: Tape, beds: Beds, rng: np.random.Generator, num_crops: int, num_frames: int
) -> Crops:
    drawn = [_one(tape, beds, rng, num_frames) for _ in range(num_crops)]
    return Crops(
        torch.from_numpy(np.stack([audio for audio, _ in drawn])[:, None]),
        torch.from_numpy(np.stack([labels for _, labels in drawn]).astype(np.int64)),
    )


def _one(
    tape: Tape, beds: Beds, rng: np.random.Generator, num_frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """A crop float32 [S] and its labels [F, 2]. As many numbers are drawn whatever it becomes."""
    chance, gain, softer, room, place = rng.random(5)
    offsets = rng.random(4)
    first, steps = _speech(tape, offsets[0], num_frames)
    second, _ = _speech(tape, offsets[1], num_frames)
    labels = frame_labels(steps)
    if chance < NO_SPEECH:
        time_s = np.arange(len(first)) / SAMPLE_RATE
        tone = TONE_LEVEL * np.sin(2 * np.pi * TONE_HZ * time_s)
        audio, labels = tone * (chance < NO_SPEECH / 2), np.zeros_like(labels)
    else:
        has_second = chance > 1 - SECOND_VOICE
        audio = first + second * (_gain(_between(SECOND_DB, softer)) * has_second)
        audio = audio * _gain(_between(GAIN_DB, gain))
    if room < ROOM_TONE:
        level_db = _between(ROOM_DBFS, room / ROOM_TONE) - BED_DBFS
        audio = audio + _gain(level_db) * _piece(beds.tone, offsets[2], len(audio))
    if place < PLACE:
        level_db = _between(PLACE_DBFS, place / PLACE) - BED_DBFS
        audio = audio + _gain(level_db) * _piece(beds.place, offsets[3], len(audio))
    loudest = float(np.abs(audio).max())
    return (audio * min(1.0, PEAK / max(loudest, 1e-9))).astype(np.float32), labels


def _speech(tape: Tape, offset: float, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [S] and labels [F * 8] from a share `offset` of the way through the tape."""
    count = num_frames * FRAME_STEPS
    step = int(offset * (len(tape.labels) - count))
    start = step * STEP_SAMPLES
    samples = tape.samples[start : start + num_frames * FRAME_SAMPLES]
    return samples.astype(np.float32) / 32768, tape.labels[step : step + count]


def _piece(bed: np.ndarray, offset: float, count: int) -> np.ndarray:
    start = int(offset * (len(bed) - count))
    return bed[start : start + count]


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + share * (ends[1] - ends[0])


def _gain(decibels: float) -> float:
    return 10 ** (decibels / 20)
