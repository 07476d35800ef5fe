"""Mimi as the stages use it: mono float audio -> codes, and the codec's own constants."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from duplex.frames import FRAME_RATE, FRAME_SAMPLES, SAMPLE_RATE, frames_covering_samples
from duplex.streams import CODEBOOKS, CodecTokens

if TYPE_CHECKING:
    from moshi.models.compression import MimiModel

STEADY_STATE_FRAMES = 375  # beyond the codec transformer's context of 250 frames
SINE_HZ = 440.0
SINE_AMPLITUDE = 0.5


def encode(mimi: MimiModel, channels: np.ndarray) -> np.ndarray:
    """Codes of whole recordings, each channel by itself.

    Args:
        channels: float32 [C, S] at 24 kHz; padded with zeros to whole frames.

    Returns:
        int64 [C, 8, T].
    """
    import torch
    from moshi.utils.compile import no_compile

    num_frames = frames_covering_samples(channels.shape[1])
    padded = np.zeros((channels.shape[0], num_frames * FRAME_SAMPLES), dtype=np.float32)
    padded[:, : channels.shape[1]] = channels
    device = next(mimi.parameters()).device
    # Without this the library compiles on first use: dear for one pass, and it needs a compiler.
    with torch.no_grad(), no_compile():
        codes = mimi.encode(torch.from_numpy(padded)[:, None].to(device))
    return codes[:, :CODEBOOKS].cpu().numpy().astype(np.int64)


def measure_tokens(mimi: MimiModel) -> CodecTokens:
    """What this codec makes of digital silence and of the prompt's sine, in its steady state.

    Kyutai's checkpoint gives the constants that PersonaPlex publishes; any other codec has
    its own. Where the steady state still alternates between codes, the commonest counts.
    """
    num_samples = STEADY_STATE_FRAMES * FRAME_SAMPLES
    time_s = np.arange(num_samples) / SAMPLE_RATE
    sine = SINE_AMPLITUDE * np.sin(2 * math.pi * SINE_HZ * time_s)
    codes = encode(mimi, np.stack([np.zeros(num_samples), sine]).astype(np.float32))
    steady = codes[:, :, -int(2 * FRAME_RATE) :]
    silence, tone = ([_commonest(row) for row in channel] for channel in steady)
    return CodecTokens(tuple(silence), tuple(tone))


def _commonest(row: np.ndarray) -> int:
    return int(np.bincount(row).argmax())
