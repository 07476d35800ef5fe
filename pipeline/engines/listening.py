"""Who listens to what the engines spoke, and how.

    auto            faster-whisper where its model is on this machine, else pocketsphinx for
                    English, else nobody; nothing is fetched
    faster-whisper  `speech.checks.recogniser_model`: a size, a hub name or a folder; fetched
    pocketsphinx    English, a stand-in

By itself pocketsphinx is no judge: its word error rate on 168 utterances of espeak's voices is
.82. Here it is given a language model of the text and of common words, which leaves it free to
hear something else, and faint noise under digital silence. Measured: .06 on 228 right texts
(over .5 on 4), .5 and more on 114 wrong ones.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from duplex.config_data import UtteranceChecks
from duplex.errors import MissingInputError
from duplex.frames import SAMPLE_RATE
from duplex.metrics import words_of
from duplex.records import Word
from pipeline.engines.recogniser import (
    DEFAULT_MODEL,
    RECOGNISER_RATE,
    PocketSphinx,
    Recogniser,
    make_recogniser,
    require,
)

PADDING_S = 0.2
# A share of the language model goes to these, so that another text can be heard as another.
COMMON = """
the of and a to in is you that it he was for on are as with his they i at be this have from
or one had by word but not what all were we when your can said there use an each which she
do how their if will up other about out many then them these so some her would make like him
into time has look two more write go see number no way could people my than first water been
call who now find long down day did get come made may part over new sound take only little
work know place year live me back give most very after thing our just name good man think
say great where help through much before line right too mean old any same tell came want
show also around three small set put end does another well large must big even such because
turn here why ask need home try kind hand again off away house point letter still learn
"""
SCRIPT_SHARE, ORDER_SHARE, STOP_SHARE = 0.7, 0.97, 0.1


@dataclass(frozen=True)
class Heard:
    """words: times from the start of the utterance. known: None where the recogniser could have
    heard any word, else those of the text that it has."""

    words: tuple[Word, ...]
    known: set[str] | None = None


def choose_recogniser(checks: UtteranceChecks) -> str | None:
    """The recogniser of a config on this machine; None: nobody listens. Imports nothing heavy."""
    if checks.recogniser == "none":
        return None
    if checks.recogniser != "auto":
        return checks.recogniser
    whisper = importlib.util.find_spec("faster_whisper") is not None
    if whisper and model_at_hand(checks.recogniser_model or DEFAULT_MODEL):
        return "faster-whisper"
    return "pocketsphinx" if importlib.util.find_spec("pocketsphinx") is not None else None


def model_at_hand(model: str) -> bool:
    """Whether a Whisper model is a folder, or in the hub's cache: nothing is fetched unasked."""
    if Path(model).is_dir():
        return True
    from huggingface_hub.constants import HF_HUB_CACHE

    name = model if "/" in model else f"Systran/faster-whisper-{model}"
    return (Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots").is_dir()


def missing_recogniser(checks: UtteranceChecks) -> str | None:
    """What the chosen recogniser lacks on this machine, and how to get it."""
    name, model = choose_recogniser(checks), checks.recogniser_model or DEFAULT_MODEL
    if name == "faster-whisper":
        if importlib.util.find_spec("faster_whisper") is None:
            return "the package faster-whisper: pip install -e '.[asr]'"
        if not model_at_hand(model):
            return f"the weights {model} (MIT), which it downloads when it first listens"
    if name == "pocketsphinx" and importlib.util.find_spec("pocketsphinx") is None:
        return "the package pocketsphinx: pip install pocketsphinx"
    return None


def recogniser_revision(checks: UtteranceChecks) -> str:
    """For keys; a model from the hub counts by its name."""
    name = choose_recogniser(checks)
    if name is None:
        return "none"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "missing"
    if name == "pocketsphinx":
        return f"{name} {version}"
    return f"{name} {version} {checks.recogniser_model or DEFAULT_MODEL}"


class Listener:
    """One recogniser, loaded at its first use. Not for several threads at once."""

    def __init__(self, checks: UtteranceChecks):
        self._checks = checks
        self._name = choose_recogniser(checks)
        self._recogniser: Recogniser | None = None

    def hears(self, language: str) -> bool:
        """Whether there is anybody to listen to this language."""
        return self._name == "faster-whisper" or (self._name == "pocketsphinx" and language == "en")

    def hear(self, samples: np.ndarray, language: str, text: str) -> Heard:
        """
        Args:
            samples: float32 [S] at 24 kHz.
            text: what it should say, for a recogniser that needs to be told.

        Raises:
            MissingInputError: the package or the model is not here.
        """
        import soxr

        if not self.hears(language):
            raise MissingInputError(f"no recogniser for {language} is at hand")
        if self._recogniser is None:
            assert self._name is not None
            self._recogniser = (
                ToldPocketSphinx()
                if self._name == "pocketsphinx"
                else make_recogniser(self._name, self._checks.recogniser_model, language)
            )
        level = float(np.abs(samples).max(initial=0.0))
        padded = np.pad(samples * (0.5 / level if level else 1.0), round(PADDING_S * SAMPLE_RATE))
        resampled = soxr.resample(padded, SAMPLE_RATE, RECOGNISER_RATE).astype(np.float32)
        if isinstance(self._recogniser, ToldPocketSphinx):
            words, known = self._recogniser.transcribe_told(resampled, text)
            return Heard(_shifted(words, len(samples)), known)
        return Heard(_shifted(self._recogniser.transcribe(resampled, language), len(samples)))

    def close(self) -> None:
        self._recogniser = None


def _shifted(words: Sequence[Word], num_samples: int) -> tuple[Word, ...]:
    """Times without the padding, within the utterance."""
    end_s = num_samples / SAMPLE_RATE
    return tuple(
        Word(
            text=word.text,
            start_s=min(max(word.start_s - PADDING_S, 0.0), end_s),
            end_s=min(max(word.end_s - PADDING_S, 0.0), end_s),
        )
        for word in words
    )


class ToldPocketSphinx(PocketSphinx):
    """PocketSphinx that is told what may be said, among other words.

    Each utterance gets a decoder of its own with a dictionary of these words: a language model
    for the whole dictionary takes 4 s to add, this one 0.2 s, and nothing is carried over.
    """

    def __init__(self) -> None:
        require("pocketsphinx", "pocketsphinx", "pip install pocketsphinx")
        import pocketsphinx

        self._sounds: dict[str, list[str]] = {}
        path = Path(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict"))
        for line in path.read_text(encoding="utf-8").splitlines():
            word, _, sounds = line.partition(" ")
            self._sounds.setdefault(word.partition("(")[0], []).append(sounds)

    def transcribe_told(self, samples: np.ndarray, text: str) -> tuple[tuple[Word, ...], set[str]]:
        """The words heard, and those of the text that its dictionary has."""
        spoken = [word for word in words_of(text) if word in self._sounds]
        if not spoken:
            return (), set()
        others = [word for word in COMMON.split() if word in self._sounds]
        lines = [
            f"{word}({number}) {sounds}" if number > 1 else f"{word} {sounds}"
            for word in sorted({*spoken, *others})
            for number, sounds in enumerate(self._sounds[word], start=1)
        ]
        with tempfile.TemporaryDirectory(prefix="duplex-listen-") as name:
            words, model = Path(name, "words.dict"), Path(name, "words.arpa")
            words.write_text("\n".join([*lines, ""]), encoding="utf-8")
            model.write_text(language_model(spoken, others), encoding="utf-8")
            super().__init__(dict=str(words), lm=str(model))
        return self.transcribe(samples, "en"), set(spoken)


def language_model(spoken: Sequence[str], others: Sequence[str]) -> str:
    """An ARPA bigram model: the text's words in their order, and any word after any other."""
    words = sorted({*spoken, *others})
    single = dict.fromkeys(words, (1 - SCRIPT_SHARE) / len(words))
    for word in spoken:
        single[word] += SCRIPT_SHARE / len(spoken)
    single = {word: share * (1 - STOP_SHARE) for word, share in single.items()} | {
        "</s>": STOP_SHARE
    }
    pairs: dict[str, dict[str, int]] = {}
    sequence = ["<s>", *spoken, "</s>"]
    for word, following in itertools.pairwise(sequence):
        row = pairs.setdefault(word, {})
        row[following] = row.get(following, 0) + 1

    def log(share: float) -> str:
        return f"{math.log10(share):.4f}"

    lines = ["\\data\\", f"ngram 1={len(words) + 2}", f"ngram 2={sum(map(len, pairs.values()))}"]
    lines += ["", "\\1-grams:"]
    for word in ("<s>", "</s>", *words):
        seen = sum(single[following] for following in pairs.get(word, {}))
        backoff = (1 - ORDER_SHARE) / max(1 - seen, 1e-6) if word in pairs else 1.0
        lines.append(f"{log(single.get(word, 1e-10))} {word} {log(backoff)}")
    lines += ["", "\\2-grams:"]
    for word, row in pairs.items():
        total = sum(row.values())
        lines += [f"{log(ORDER_SHARE * n / total)} {word} {after}" for after, n in row.items()]
    return "\n".join([*lines, "", "\\end\\", ""])
