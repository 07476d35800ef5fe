"""Voice activity by silero-vad (MIT): which parts of a channel are speech.

The model lies in the package as TorchScript and is loaded from there by path: importing
`silero_vad` itself would set torch's thread count for the whole process, and its file helpers
want torchaudio. It sees 512 samples at a time, so a recording streams through: an hour of two
channels takes about 40 s on one core and leaves 113 000 probabilities a channel in memory.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duplex.errors import MissingInputError

VAD_RATE = 16_000
WINDOW = 512  # samples, 32 ms
WINDOW_S = WINDOW / VAD_RATE
PACKAGE, MODULE = "silero-vad", "silero_vad"


@dataclass(frozen=True)
class VadSettings:
    """Speech begins at `threshold` and goes on while the probability stays above `release`."""

    threshold: float = 0.5
    release: float = 0.35
    min_silence_s: float = 0.1  # a shorter dip does not end speech
    min_speech_s: float = 0.1  # shorter speech is a click
    pad_s: float = 0.03
    max_speech_s: float = 28.0  # a recogniser's window; longer speech is cut at its weakest


def revision() -> str:
    try:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} missing"


class VoiceActivity:
    """The model, for any number of recordings one after another."""

    def __init__(self) -> None:
        import torch

        spec = importlib.util.find_spec(MODULE)
        places = list(spec.submodule_search_locations or []) if spec else []
        path = Path(places[0]) / "data" / "silero_vad.jit" if places else None
        if path is None or not path.is_file():
            raise MissingInputError(
                f"voice activity needs the package {PACKAGE} with its model, found none. "
                f"Install it: pip install '{PACKAGE}>=6.2,<7'"
            )
        self._model: Any = torch.jit.load(str(path), map_location="cpu").eval()

    def probabilities(self, blocks: Iterable[np.ndarray]) -> np.ndarray:
        """float32 [C, N]: speech in each 32 ms of each channel.

        Args:
            blocks: float32 [n, C] at 16 kHz, of any lengths; the last window is filled up
                with zeros.
        """
        import torch

        found: list[np.ndarray] = []
        rest: np.ndarray | None = None

        def feed(samples: np.ndarray) -> None:
            windows = np.ascontiguousarray(samples.T, dtype=np.float32)  # [C, n * WINDOW]
            for first in range(0, windows.shape[1], WINDOW):
                window = torch.from_numpy(windows[:, first : first + WINDOW].copy())
                found.append(self._model(window, VAD_RATE)[:, 0].numpy().copy())

        self._model.reset_states()
        with torch.inference_mode():
            for block in blocks:
                joined = block if rest is None else np.concatenate([rest, block])
                whole = len(joined) // WINDOW * WINDOW
                feed(joined[:whole])
                rest = joined[whole:]
            if rest is not None and len(rest):
                feed(np.pad(rest, ((0, WINDOW - len(rest)), (0, 0))))
        return np.stack(found, axis=1) if found else np.zeros((0, 0), dtype=np.float32)


def speech_spans(
    samples: np.ndarray, vad: VoiceActivity | None = None, settings: VadSettings | None = None
) -> list[tuple[float, float]]:
    """(start_s, end_s) of speech, in order, never overlapping.

    Args:
        samples: float32 [S] at 16 kHz, one channel.
    """
    if not len(samples):
        return []
    probabilities = (vad or VoiceActivity()).probabilities([samples[:, None]])[0]
    return spans_of(probabilities, len(samples) / VAD_RATE, settings or VadSettings())


def spans_of(
    probabilities: np.ndarray, duration_s: float, settings: VadSettings
) -> list[tuple[float, float]]:
    """Spans of speech from one channel's probabilities, float32 [N]. Pure."""
    spans: list[tuple[float, float]] = []
    for first, end in _runs(probabilities, settings):
        for start, stop in _cut_long(probabilities, first, end, settings):
            start_s = max(start * WINDOW_S - (settings.pad_s if start == first else 0), 0.0)
            stop_s = min(stop * WINDOW_S + (settings.pad_s if stop == end else 0), duration_s)
            if stop_s > start_s:
                spans.append((round(start_s, 3), round(stop_s, 3)))
    return spans


def _runs(probabilities: np.ndarray, settings: VadSettings) -> list[tuple[int, int]]:
    """[first, end) windows of speech; dips and clicks as the settings say."""
    min_silence = max(round(settings.min_silence_s / WINDOW_S), 1)
    runs: list[tuple[int, int]] = []
    first = weak = None  # where speech began; where it fell below the release
    for index, probability in enumerate(probabilities):
        if probability >= settings.threshold:
            weak = None
            first = index if first is None else first
        elif first is not None and probability < settings.release:
            weak = index if weak is None else weak
            if index + 1 - weak >= min_silence:
                runs.append((first, weak))
                first = weak = None
    if first is not None:
        runs.append((first, len(probabilities) if weak is None else weak))
    return [run for run in runs if (run[1] - run[0]) * WINDOW_S >= settings.min_speech_s]


def _cut_long(
    probabilities: np.ndarray, first: int, end: int, settings: VadSettings
) -> list[tuple[int, int]]:
    """Speech longer than `max_speech_s` in parts, each cut in its second half."""
    longest = int(settings.max_speech_s / WINDOW_S)
    parts = []
    while end - first > longest:
        half = first + longest // 2
        cut = half + int(np.argmin(probabilities[half : first + longest]))
        parts.append((first, cut))
        first = cut
    return [*parts, (first, end)]
