"""A recogniser that was told all texts beforehand, the same for each of the sounds it compares."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soxr

from duplex.frames import SAMPLE_RATE
from duplex.metrics import word_error_rate, words_of
from pipeline.engines.listening import ToldPocketSphinx, language_model
from pipeline.engines.recogniser import RECOGNISER_RATE, PocketSphinx

PADDING_S = 0.2


class Told(ToldPocketSphinx):
    """PocketSphinx with one language model of all texts."""

    def __init__(self, texts: Sequence[str]):
        super().__init__()
        spoken = [word for text in texts for word in words_of(text) if word in self._sounds]
        self._known = set(spoken)
        lines = [
            f"{word}({number}) {sounds}" if number > 1 else f"{word} {sounds}"
            for word in sorted(self._known)
            for number, sounds in enumerate(self._sounds[word], start=1)
        ]
        with tempfile.TemporaryDirectory(prefix="duplex-codec-") as name:
            words, model = Path(name, "words.dict"), Path(name, "words.arpa")
            words.write_text("\n".join([*lines, ""]), encoding="utf-8")
            model.write_text(language_model(spoken, ()), encoding="utf-8")
            PocketSphinx.__init__(self, dict=str(words), lm=str(model))

    def errors(self, text: str, samples: np.ndarray) -> tuple[float, int]:
        """Word errors, and the words of the text that the dictionary has."""
        reference = [word for word in words_of(text) if word in self._known]
        if not reference:
            return 0.0, 0
        return word_error_rate(reference, self.heard(samples)) * len(reference), len(reference)

    def heard(self, samples: np.ndarray) -> list[str]:
        """The words in sound at 24 kHz."""
        level = float(np.abs(samples).max(initial=1e-6))
        padded = np.pad(samples * (0.5 / level), round(PADDING_S * SAMPLE_RATE))
        resampled = soxr.resample(padded, SAMPLE_RATE, RECOGNISER_RATE).astype(np.float32)
        return [word.text for word in self.transcribe(resampled, "en")]

    def knows(self, text: str) -> bool:
        """Whether it can hear each word of the text."""
        return all(word in self._known for word in words_of(text))
