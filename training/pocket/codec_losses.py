"""What decoded sound is held to: its spectra at four resolutions. Pure.

B sounds of S samples, N bands, T columns. A codec of 900 bits a second cannot keep the phase, so
spectra count and the waveform hardly does.

    mel        L1 of log mel magnitudes, mean over windows of 256 … 2048 samples
    magnitude  L1 of linear magnitudes over the original's: peaks, loud formants
    wave       L1 of samples over the original's

The last two are shares of the original, or of a sound of -40 dBFS where that is louder, since
what silence is divided by must not be nothing.

Source: multi-scale mel losses as of SoundStream (arXiv 2107.03312) and Encodec (2210.13438).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from duplex.frames import SAMPLE_RATE

# window in samples -> mel bands; short windows have no bins for more
SCALES = {256: 20, 512: 40, 1024: 64, 2048: 80}
FLOOR = 1e-4  # mean magnitude of a band that counts as silence: -80 dB under a full-scale tone
QUIET = 0.01  # -40 dBFS; noise of that RMS has about QUIET / sqrt(window) in a bin
LOWEST_HZ = 40.0


def spectral_losses(decoded: torch.Tensor, original: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scalars by name, each 0 for equal sounds.

    Args:
        decoded, original: float32 [B, 1, S] or [B, S], S at least 2 048.
    """
    decoded, original = decoded.flatten(0, -2), original.flatten(0, -2)
    mels, magnitudes = [], []
    for window in SCALES:
        found = magnitude_spectrum(decoded, window)
        wanted = magnitude_spectrum(original, window).detach()
        mels.append((log_mel(found, window) - log_mel(wanted, window)).abs().mean())
        faintest = QUIET / math.sqrt(window)
        magnitudes.append((found - wanted).abs().mean() / wanted.mean().clamp(min=faintest))
    wave = (decoded - original).abs().mean() / original.abs().mean().clamp(min=QUIET)
    return {
        "mel": torch.stack(mels).mean(),
        "magnitude": torch.stack(magnitudes).mean(),
        "wave": wave,
    }


def mel_distance(decoded: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """The mel loss by itself, in nats of magnitude: 1 is 8.7 dB."""
    return spectral_losses(decoded, original)["mel"]


def magnitude_spectrum(sound: torch.Tensor, window: int) -> torch.Tensor:
    """float32 [B, window / 2 + 1, T] of [B, S]; a full-scale sine gives 1/2."""
    shape = _hann(window)
    spectrum = torch.stft(
        sound, window, window // 4, window=shape, center=False, return_complex=True
    )
    power = spectrum.real.square() + spectrum.imag.square()
    return torch.sqrt(power + 1e-12) / shape.sum()


def log_mel(magnitude: torch.Tensor, window: int) -> torch.Tensor:
    """float32 [B, N, T] of [B, window / 2 + 1, T]: logs of the mean magnitude in each band."""
    return torch.log(_mel_bands(window) @ magnitude + FLOOR)


@lru_cache
def _hann(window: int) -> torch.Tensor:
    return torch.hann_window(window)


@lru_cache
def _mel_bands(window: int) -> torch.Tensor:
    """float32 [N, window / 2 + 1]: triangles on the mel scale, each summing to 1."""
    edges_mel = torch.linspace(_mel(LOWEST_HZ), _mel(SAMPLE_RATE / 2), SCALES[window] + 2)
    edges_hz = 700 * (10 ** (edges_mel / 2595) - 1)
    bins_hz = torch.linspace(0, SAMPLE_RATE / 2, window // 2 + 1)
    rising = (bins_hz - edges_hz[:-2, None]) / (edges_hz[1:-1] - edges_hz[:-2])[:, None]
    falling = (edges_hz[2:, None] - bins_hz) / (edges_hz[2:] - edges_hz[1:-1])[:, None]
    bands = torch.minimum(rising, falling).clamp(min=0)
    empty = bands.sum(1) == 0  # a band between two bins takes the nearest one
    nearest = (bins_hz - edges_hz[1:-1, None]).abs().argmin(1)
    bands[empty, nearest[empty]] = 1.0
    return bands / bands.sum(1, keepdim=True)


def _mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)
