"""What is wrong with a channel's sound that can be read from its samples. Pure.

    clipped_share  samples in runs of 3 and more at .999 of full scale and over, on one side /
                   all samples: a peak that was cut off is flat, one that only reaches it is not
    speech_dbfs    active speech level: 10 log10 of the mean energy of the frames with speech
    floor_dbfs     silence floor: the median level of the frames without speech that are not beside
                   one with, since speech fades in and out there; a click does not move it
    dc_offset      mean of the samples

Levels are dBFS where full scale is 1.0 (a full sine is -3), no lower than -120: digital silence has
no level. They are plain levels, with no weighting and no gate but the speech activity given, so
that -24 here is what speech is made at in this project (`duplex.mixing.normalize_loudness`).

Shapes: S samples at 24 kHz, T frames of 80 ms. Cost: linear in the samples.
Sources: ITU-T P.56 (speech level over active speech alone, here on frames instead of an envelope).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from duplex.frames import FRAME_SAMPLES, frames_covering_samples
from duplex.metrics import segments

CLIP_LEVEL = 0.999
CLIP_RUN = 3
LOWEST_DBFS = -120.0  # 16-bit rounding alone is at -101


@dataclass(frozen=True)
class SoundQuality:
    """Levels are None where there is no frame to take them from."""

    clipped_share: float
    speech_dbfs: float | None
    floor_dbfs: float | None
    dc_offset: float


def sound_quality(samples: np.ndarray, active: np.ndarray) -> SoundQuality:
    """
    Args:
        samples: float [S] at 24 kHz, full scale 1.0.
        active: bool [T], where the channel holds speech (`duplex.metrics.speech_activity`).

    Raises:
        ValueError: samples that are not finite, or not of as many frames as `active`.
    """
    require_finite(samples)
    num_frames = frames_covering_samples(len(samples))
    if active.shape != (num_frames,):
        raise ValueError(
            f"speech activity must have the {num_frames} frames of the {len(samples)} samples, "
            f"found {active.shape}"
        )
    if not num_frames:
        return SoundQuality(0.0, None, None, 0.0)
    energies = _frame_energies(samples, num_frames)
    beside = np.convolve(active, np.ones(3), mode="full")[1:-1] > 0
    speech, silence = energies[active], energies[~beside]
    return SoundQuality(
        clipped_share=clipped_share(samples),
        speech_dbfs=_dbfs(float(speech.mean())) if len(speech) else None,
        floor_dbfs=_dbfs(float(np.median(silence))) if len(silence) else None,
        dc_offset=float(np.mean(samples, dtype=np.float64)),
    )


def clipped_share(samples: np.ndarray) -> float:
    """Share of samples in flat runs at full scale; see the head of this file. 0 without samples."""
    clipped = sum(
        run.end - run.start
        for side in (samples >= CLIP_LEVEL, samples <= -CLIP_LEVEL)
        for run in segments(side)
        if run.end - run.start >= CLIP_RUN
    )
    return clipped / len(samples) if len(samples) else 0.0


def require_finite(samples: np.ndarray) -> None:
    """
    Raises:
        ValueError: a sample is NaN or infinite: any measure of it would be too.
    """
    bad = np.flatnonzero(~np.isfinite(samples))
    if len(bad):
        raise ValueError(
            f"samples must be finite numbers; {len(bad)} of {len(samples)} are not, the first is "
            f"{samples[bad[0]]} at sample {bad[0]}. A codec or model that gives such is broken"
        )


def _frame_energies(samples: np.ndarray, num_frames: int) -> np.ndarray:
    """Mean square of each frame, float64 [T]; the last over the samples that it has."""
    squares = np.zeros(num_frames * FRAME_SAMPLES)
    squares[: len(samples)] = np.square(samples, dtype=np.float64)
    counts = np.full(num_frames, FRAME_SAMPLES)
    counts[-1] = len(samples) - (num_frames - 1) * FRAME_SAMPLES
    return squares.reshape(num_frames, FRAME_SAMPLES).sum(axis=1) / counts


def _dbfs(energy: float) -> float:
    return max(LOWEST_DBFS, 10 * math.log10(energy)) if energy > 0 else LOWEST_DBFS
