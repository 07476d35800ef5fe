"""DNSMOS by the package `speechmos` (MIT, models of 9 MB in its wheel): how people would rate the
sound, guessed from the sound alone.

The model hears 9.01 s at 16 kHz; the package repeats what is shorter until it is as long, and
averages windows a second apart over what is longer. It was trained on noisy and denoised speech of
people, not on a codec's output: compare models with it, don't read it as an opinion of listeners.
Give it speech, not a channel that is silent half of the time.

The wheel names no dependencies. It imports librosa, requests, numpy and onnxruntime.

Sources:
    Reddy, Gopal, Cutler 2022, "DNSMOS P.835: a non-intrusive perceptual objective speech quality
        metric to evaluate noise suppressors" (speech, background, overall)
    Reddy, Gopal, Cutler 2021, "DNSMOS" (the older single scale, of ITU-T P.808 ratings)
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any, NamedTuple

import numpy as np

from duplex.errors import MissingInputError
from duplex.frames import SAMPLE_RATE
from duplex.sound_quality import require_finite

PACKAGE, MODULE = "speechmos", "speechmos.dnsmos"
INSTALL = "pip install speechmos librosa requests onnxruntime"
RATE = 16_000
MIN_S = 0.5  # less is repeated to a buzz


class DnsmosScore(NamedTuple):
    """Ratings from 1 (bad) to 5 (excellent): of the whole, of the speech, of the background, and
    on P.808's one scale."""

    overall: float
    speech: float
    background: float
    p808: float


def revision() -> str:
    try:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} missing"


class Dnsmos:
    def __init__(self) -> None:
        """
        Raises:
            MissingInputError: the package or one that it imports is not installed.
        """
        try:
            self._model: Any = importlib.import_module(MODULE)
        except ImportError as error:
            raise MissingInputError(
                f"DNSMOS needs the package {PACKAGE} and what it imports, found: {error}. "
                f"Install it: {INSTALL}"
            ) from None

    def score(self, samples: np.ndarray) -> DnsmosScore | None:
        """Of one clip; None under half a second.

        Args:
            samples: float32 [S] at 24 kHz, mono; what goes beyond full scale is cut off.

        Raises:
            ValueError: samples that are not finite.
        """
        import soxr

        require_finite(samples)
        if len(samples) < MIN_S * SAMPLE_RATE:
            return None
        clip = soxr.resample(samples.astype(np.float32), SAMPLE_RATE, RATE)
        found = self._model.run(np.clip(clip, -1.0, 1.0), RATE)
        names = ("ovrl_mos", "sig_mos", "bak_mos", "p808_mos")
        return DnsmosScore(*(round(float(found[name]), 4) for name in names))
