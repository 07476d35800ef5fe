"""Voice samples for prompts: cut, brought to -24 LUFS, read from files that may be anything.

PersonaPlex prompts with a mono sample at -24 LUFS (its inference code). Its own 18 packaged
voices are something else: input embeddings and a token cache, which no tokens can replay.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from duplex.errors import RecordError
from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE

LOUDNESS_LUFS = -24.0
PEAK_LIMIT = 0.99
CLOSE_ENOUGH_DB = 0.05
LONGEST_FILE_S = 240
SHORTEST_S = 0.8  # the loudness meter's block is 0.4 s
PACKAGED_VOICES = frozenset(
    [f"NAT{sex}{number}" for sex in "FM" for number in range(4)]
    + [f"VAR{sex}{number}" for sex in "FM" for number in range(5)]
)


def voice_sample(samples: np.ndarray, longest_s: float) -> np.ndarray:
    """float32 [S']: a whole number of frames, `longest_s` at most, at -24 LUFS.

    Args:
        samples: float32 [S], mono at 24 kHz.

    Raises:
        RecordError: too short, or nothing to hear.
    """
    num_frames = min(len(samples), round(longest_s * SAMPLE_RATE)) // FRAME_SAMPLES
    kept = samples[: num_frames * FRAME_SAMPLES]
    if len(kept) < SHORTEST_S * SAMPLE_RATE:
        raise RecordError(
            f"a voice sample must have at least {SHORTEST_S} s, found {len(kept) / SAMPLE_RATE:.2f}"
        )
    loudness = loudness_lufs(kept)
    if not math.isfinite(loudness):
        raise RecordError("a voice sample must hold speech, found silence")
    gain = 10 ** ((LOUDNESS_LUFS - loudness) / 20)
    gain = min(gain, PEAK_LIMIT / float(np.abs(kept).max()))
    if abs(20 * math.log10(gain)) < CLOSE_ENOUGH_DB:
        return kept  # so that a sample that was made here is not made again
    return (kept * gain).astype(np.float32)


def loudness_lufs(samples: np.ndarray) -> float:
    """Integrated loudness (ITU-R BS.1770-4, by pyloudnorm); -inf for silence.

    Args:
        samples: float32 [S], mono at 24 kHz, 0.4 s at least.
    """
    import pyloudnorm

    with np.errstate(divide="ignore"):  # silence: log of nothing
        return float(pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(samples.astype(np.float64)))


def read_voice(path: Path) -> np.ndarray:
    """float32 [S], a voice sample as a prompt takes it, from a mono recording.

    Raises:
        RecordError: what the file is instead, and what to do.
    """
    import soundfile
    import soxr

    if path.suffix == ".pt":
        raise RecordError(f"{path.name}: must be a mono WAV; {_describe_tensor(path)}")
    try:
        length_s = soundfile.info(str(path)).duration
        if length_s > LONGEST_FILE_S:
            raise RecordError(f"{path.name}: must be at most {LONGEST_FILE_S} s, is {length_s:.0f}")
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise RecordError(f"{path.name}: must be a recording, cannot be read: {error}") from None
    if samples.shape[1] != 1:
        raise RecordError(f"{path.name}: must be mono, found {samples.shape[1]} channels")
    if not len(samples) or not np.isfinite(samples).all():
        raise RecordError(f"{path.name}: must hold finite samples, found none or NaN")
    mono = samples[:, 0]
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ").astype(np.float32)
    return mono


def _describe_tensor(path: Path) -> str:
    """What a `.pt` given as a voice is instead."""
    from pipeline.engines.tensor_file import NotCodesError, read_codes

    try:
        codes, _ = read_codes(path)
    except NotCodesError as error:
        return str(error)
    except OSError as error:
        return f"found a file that cannot be read: {error}"
    return f"found a tensor {list(codes.shape)}"


def is_packaged_voice(value: object) -> bool:
    """Whether a loaded `.pt` has the form of PersonaPlex's voices."""
    import torch

    return (
        isinstance(value, dict)
        and set(value) == {"embeddings", "cache"}
        and all(isinstance(part, torch.Tensor) for part in value.values())
    )
