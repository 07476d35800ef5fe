"""The clock of Moshi and Mimi: the one place where seconds, samples and frames meet.

24 000 samples a second, 12.5 frames a second, 1 920 samples (80 ms) a frame.
Source: `moshi.models.loaders` (SAMPLE_RATE, FRAME_RATE).
"""

from __future__ import annotations

import math

SAMPLE_RATE = 24_000  # Hz
FRAME_RATE = 12.5  # frames/s
FRAME_SAMPLES = 1_920  # samples/frame
FRAME_S = 1 / FRAME_RATE  # 0.08 s
LM_CONTEXT_FRAMES = 3_000  # frames that the 7B models attend to: 240 s


def frames_to_seconds(num_frames: float) -> float:
    """Duration of `num_frames` frames, in seconds."""
    return num_frames / FRAME_RATE


def frame_at(time_s: float) -> int:
    """Index of the frame that holds the instant `time_s`.

    An instant within a microsecond of a frame boundary belongs to the later frame, so that
    times that were written as a multiple of 0.08 come back as that multiple.
    """
    return math.floor(time_s * FRAME_RATE + 1e-6 * FRAME_RATE)


def frames_covering_seconds(duration_s: float) -> int:
    """The least number of frames that hold `duration_s` seconds."""
    return math.ceil(duration_s * FRAME_RATE - 1e-6 * FRAME_RATE)


def frames_covering_samples(num_samples: int) -> int:
    """The least number of frames that hold `num_samples` samples at 24 kHz."""
    return -(-num_samples // FRAME_SAMPLES)


def samples_at(time_s: float) -> int:
    """Index of the sample nearest to the instant `time_s`."""
    return round(time_s * SAMPLE_RATE)
