"""Voice samples for prompts: cut, brought to -24 LUFS, read from files that may be anything.

PersonaPlex prompts with a mono sample at -24 LUFS (FACTS, section 3). Its own 18 packaged
voices are something else: input embeddings and a token cache, which no tokens can replay.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np

from duplex.errors import RecordError
from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE

LOUDNESS_LUFS = -24.0
PEAK_LIMIT = 0.99
CLOSE_ENOUGH_DB = 0.05
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
        raise RecordError(describe_voice_tensor(path))
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise RecordError(f"{path.name}: must be a recording, cannot be read: {error}") from None
    if samples.shape[1] != 1:
        raise RecordError(f"{path.name}: must be mono, found {samples.shape[1]} channels")
    if not len(samples) or not np.isfinite(samples).all():
        raise RecordError(f"{path.name}: must hold finite samples, found none or NaN")
    mono = samples[:, 0]
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ").astype(np.float32)
    return mono


def describe_voice_tensor(path: Path) -> str:
    """What a `.pt` given as a voice is, and why it cannot be one."""
    import torch

    try:
        value = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises many kinds on a hostile file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        return f"{path.name}: must be a mono WAV, found a .pt that cannot be read: {reason}"
    if is_packaged_voice(value):
        known = f"PersonaPlex's packaged voice {path.stem}"
        name = known if path.stem in PACKAGED_VOICES else "a voice packaged as PersonaPlex's are"
        frames = tuple(value["embeddings"].shape)
        return (
            f"{path.name}: is {name} (embeddings {list(frames)} and a token cache). It is no audio "
            "and no codes, so no tensor can hold it: give a mono WAV of the voice instead."
        )
    return f"{path.name}: must be a mono WAV, found a .pt with {type(value).__name__}"


def is_packaged_voice(value: object) -> bool:
    """Whether a loaded `.pt` has the form of PersonaPlex's voices."""
    import torch

    return (
        isinstance(value, dict)
        and set(value) == {"embeddings", "cache"}
        and all(isinstance(part, torch.Tensor) for part in value.values())
    )
