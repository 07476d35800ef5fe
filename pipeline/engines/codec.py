"""Mimi as the stages use it: float audio -> codes, and the codec's own constants.

A recording is encoded whole, its two channels as one batch: the latents are those of the
server's frame-by-frame encoding to 1e-5 (the codec is causal), without its cost. Within, each
part of the codec goes as far at once as it should:

    convolutions   `CHUNK_FRAMES` at a time, each with what they look back on: their activations
                   at 24 kHz are what takes the memory, and what fits the cache goes faster
    transformer    `WINDOW_FRAMES` at a time, with all that its layers look back on
    quantizer      `WINDOW_FRAMES` at a time

so an hour takes little more memory than a minute. Streaming in blocks is no way to do this: a
block of T positions overwrites T places of the attention's ring before its first position is
read (moshi 0.2.13).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from duplex.frames import FRAME_RATE, FRAME_SAMPLES, SAMPLE_RATE, frames_covering_samples
from duplex.streams import CODEBOOKS, CodecTokens

if TYPE_CHECKING:
    import torch
    from moshi.models.compression import MimiModel

STEADY_STATE_FRAMES = 375  # beyond the codec transformer's context of 250 frames
SINE_HZ = 440.0
SINE_AMPLITUDE = 0.5
CHUNK_FRAMES = 125
WINDOW_FRAMES = 3000  # as long as the LM's context: no dialogue for one clip is longer
CONV_FRAMES = 8  # more than the convolutions look back on
# Whose steady tokens are `streams.KYUTAI_TOKENS`.
KYUTAI_CODEC = "tokenizer-e351c8d8-checkpoint125.safetensors"


def encode(mimi: MimiModel, channels: np.ndarray) -> np.ndarray:
    """Codes of whole recordings, each channel by itself.

    Args:
        channels: float32 [C, S] at 24 kHz; padded with zeros to whole frames.

    Returns:
        int64 [C, 8, T].
    """
    return encode_long(mimi, lambda start, stop: channels[:, start:stop], channels.shape[1])


def encode_long(
    mimi: MimiModel,
    read: Callable[[int, int], np.ndarray],
    num_samples: int,
    *,
    window_frames: int = WINDOW_FRAMES,
    chunk_frames: int = CHUNK_FRAMES,
) -> np.ndarray:
    """Codes of a recording of any length in bounded memory.

    Args:
        read: float32 [C, stop - start] of samples [start, stop).

    Returns:
        int64 [C, 8, T].
    """
    import torch

    with _alone():
        found = latents(mimi, read, num_samples, window_frames, chunk_frames)
        codes = [mimi.quantizer.encode(part) for part in found.split(window_frames, dim=2)]
        return torch.cat(codes, dim=2)[:, :CODEBOOKS].cpu().numpy().astype(np.int64)


def latents(
    mimi: MimiModel,
    read: Callable[[int, int], np.ndarray],
    num_samples: int,
    window_frames: int = WINDOW_FRAMES,
    chunk_frames: int = CHUNK_FRAMES,
) -> torch.Tensor:
    """float32 [C, D, T] before the quantizer; arguments as in `encode_long`."""
    import torch

    with _alone():
        sound = torch.cat(list(_convolved(mimi, read, num_samples, chunk_frames)), dim=2)
        return mimi._to_framerate(_attended(mimi, sound, window_frames))


def _convolved(
    mimi: MimiModel, read: Callable[[int, int], np.ndarray], num_samples: int, chunk_frames: int
) -> Iterator[torch.Tensor]:
    """[C, D, chunk * P] of each chunk in turn: the convolutions' output, P positions a frame."""
    import torch

    device = next(mimi.parameters()).device
    per_frame = _positions_per_frame(mimi)
    for start in range(0, frames_covering_samples(num_samples), chunk_frames):
        first = max(0, start - CONV_FRAMES)
        samples = read(
            first * FRAME_SAMPLES, min((start + chunk_frames) * FRAME_SAMPLES, num_samples)
        )
        missing = -samples.shape[1] % FRAME_SAMPLES
        whole = np.pad(samples, ((0, 0), (0, missing))).astype(np.float32, copy=False)
        yield mimi.encoder(torch.from_numpy(whole)[:, None].to(device))[
            :, :, (start - first) * per_frame :
        ]


def _attended(mimi: MimiModel, sound: torch.Tensor, window_frames: int) -> torch.Tensor:
    """[C, D, T * P]: the codec's transformer over all of it, window by window."""
    import torch

    if mimi.encoder_transformer is None:
        return sound
    per_frame = _positions_per_frame(mimi)
    lookback, parts = lookback_frames(mimi), []
    for start in range(0, sound.shape[2] // per_frame, window_frames):
        first = max(0, start - lookback)
        window = sound[:, :, first * per_frame : (start + window_frames) * per_frame]
        (attended,) = mimi.encoder_transformer(window)
        parts.append(attended[:, :, (start - first) * per_frame :])
    return torch.cat(parts, dim=2)


def _positions_per_frame(mimi: MimiModel) -> int:
    return round(mimi.encoder_frame_rate / mimi.frame_rate)


@contextmanager
def _alone() -> Iterator[None]:
    """Without gradients, without the library's compiler, on one thread.

    The library compiles on first use: dear, and it needs a C++ compiler. On a CPU the number of
    threads decides how sums are rounded, and so where near ties fall: one thread gives training
    and server the same prompt, several processes give the speed.
    """
    import torch
    from moshi.utils.compile import no_compile

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), no_compile():
            yield
    finally:
        torch.set_num_threads(before)


def encode_batch(mimi: MimiModel, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Codes of several recordings in one pass, padded at the right with zeros.

    Args:
        recordings: float32 [C, S_i] each, with one C.

    Returns:
        int64 [C, 8, T_i] each. The codec is causal: padding at the right changes nothing but
        the rounding of a batch of another size.
    """
    longest = max(recording.shape[1] for recording in recordings)
    rows = [np.pad(r, ((0, 0), (0, longest - r.shape[1]))) for r in recordings]
    codes = encode(mimi, np.concatenate(rows))
    channels = recordings[0].shape[0]
    return [
        codes[i * channels : (i + 1) * channels, :, : frames_covering_samples(r.shape[1])]
        for i, r in enumerate(recordings)
    ]


def decode(mimi: MimiModel, codes: np.ndarray) -> np.ndarray:
    """The sound of one side's codes: int64 [8, T] -> float32 [S], 1920 samples a frame."""
    import torch

    device = next(mimi.parameters()).device
    with _alone():
        rows = torch.from_numpy(np.ascontiguousarray(codes))[None].to(device)
        return mimi.decode(rows)[0, 0].float().cpu().numpy()


def lookback_frames(mimi: MimiModel) -> int:
    """How many frames before a frame the codec's transformer can look back on."""
    encoder: Any = mimi.encoder_transformer
    positions = sum(layer.self_attn.context - 1 for layer in encoder.transformer.layers)
    return math.ceil(positions / _positions_per_frame(mimi))


def measure_tokens(mimi: MimiModel) -> CodecTokens:
    """What this codec makes of digital silence and of the prompt's sine, in its steady state.

    Kyutai's checkpoint gives the constants that PersonaPlex publishes; any other codec has
    its own. Where the steady state still alternates between codes, the commonest counts.
    Measured on the CPU wherever the codec is, so that training and server get the same.
    """
    if next(mimi.parameters()).device.type != "cpu":
        mimi = copy.deepcopy(mimi).to("cpu")
    num_samples = STEADY_STATE_FRAMES * FRAME_SAMPLES
    time_s = np.arange(num_samples) / SAMPLE_RATE
    sine = SINE_AMPLITUDE * np.sin(2 * math.pi * SINE_HZ * time_s)
    codes = encode(mimi, np.stack([np.zeros(num_samples), sine]).astype(np.float32))
    steady = codes[:, :, -int(2 * FRAME_RATE) :]
    silence, tone = ([_commonest(row) for row in channel] for channel in steady)
    return CodecTokens(tuple(silence), tuple(tone))


def _commonest(row: np.ndarray) -> int:
    return int(np.bincount(row).argmax())
