"""Recognisers: speech of one speaker -> words with times.

    faster-whisper   the `asr` extra (MIT); a model's name, or a folder in CTranslate2's form
    pocketsphinx     (BSD) a stand-in of low accuracy: English only, its model in the wheel

A recogniser is given one turn, or a part of one, at a time and keeps nothing in between, so the
order of the turns changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import unicodedata
from collections.abc import Callable, Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np

from duplex.errors import MissingInputError, RequestError
from duplex.files import sha256_file
from duplex.records import Word

RecogniserName = Literal["faster-whisper", "pocketsphinx"]
RECOGNISERS: tuple[str, ...] = get_args(RecogniserName)
DEFAULT_MODEL = "small"
RECOGNISER_RATE = 16_000

# Guards against text that nobody said: Whisper loops on noise and fills silence from memory.
TOKENS_PER_SECOND, MIN_TOKENS, MAX_TOKENS = 15, 10, 224
NO_REPEAT_NGRAM = 3
MAX_COMPRESSION_RATIO = 2.4
MIN_LOG_PROBABILITY = -1.0
MAX_NO_SPEECH = 0.6
LOOP_WORDS = 6
DITHER = 0.002  # -54 dBFS
SCRIPTS = {
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt", "nl", "pl", "cs", "sv"), "LATIN"),
    **dict.fromkeys(("ru", "uk", "bg"), "CYRILLIC"),
    "el": "GREEK",
}

WordT = TypeVar("WordT")


class Recogniser(Protocol):
    def transcribe(self, samples: np.ndarray, language: str) -> tuple[Word, ...]:
        """Words of one speaker, in order, times from the start of `samples`.

        Args:
            samples: float32 [S] at 16 kHz.
            language: as in ISO 639-1: `en`.
        """
        ...

    def revision(self) -> str:
        """Engine, version and model: the same revision gives the same words."""
        ...


def make_recogniser(name: str, model: str | None, language: str) -> Recogniser:
    """
    Raises:
        RequestError: no recogniser of that name, or it has no such language.
        MissingInputError: its package or its model is not there.
    """
    if name not in RECOGNISERS:
        raise RequestError(f"--recogniser must be one of {', '.join(RECOGNISERS)}; found {name}")
    if not re.fullmatch(r"[a-z]{2,3}", language):
        raise RequestError(f"--language must be a code such as en, found {language!r}")
    if name == "faster-whisper":
        return FasterWhisper(model or DEFAULT_MODEL)
    if model:
        raise RequestError("--recogniser-model is for faster-whisper; pocketsphinx has its own")
    if language != "en":
        raise RequestError(f"pocketsphinx knows English only, found --language {language}")
    return PocketSphinx()


class FasterWhisper:
    """Whisper by CTranslate2, greedy, each call by itself.

    Args:
        model: a size (`small`), a hub name (`owner/name`), or a folder with `model.bin`,
            `config.json`, `tokenizer.json`. Names are looked up in the hub's cache first;
            under HF_HUB_OFFLINE=1 nowhere else.
    """

    def __init__(self, model: str):
        require("faster_whisper", "faster-whisper", "pip install 'duplex-workbench[asr]'")
        import faster_whisper
        from faster_whisper.utils import download_model

        folder = Path(model)
        if folder.is_dir():
            needed = ("model.bin", "config.json", "tokenizer.json")
            missing = [name for name in needed if not (folder / name).is_file()]
            if missing:  # without its tokenizer the library would ask the hub for another's
                raise MissingInputError(
                    f"{folder}: must be a Whisper model in CTranslate2's form, found no "
                    f"{', '.join(missing)}. Make one with ct2-transformers-converter "
                    "--copy_files tokenizer.json preprocessor_config.json"
                )
            identity = sha256_file(folder / "model.bin")[:12]
        else:
            try:
                folder = Path(download_model(model))
            except (ValueError, OSError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
                raise MissingInputError(
                    f"--recogniser-model {model}: must be a Whisper size, a hub name or a local "
                    f"folder that is there, cannot be had: {reason}. Without a network, "
                    "fetch it elsewhere and give its folder, or use --recogniser pocketsphinx "
                    "(English, less accurate)"
                ) from None
            identity = folder.name  # the hub's commit
        try:
            self._model: Any = faster_whisper.WhisperModel(str(folder))
        except (ValueError, RuntimeError, OSError) as error:
            raise MissingInputError(f"{folder}: must be a Whisper model, found: {error}") from None
        version = importlib.metadata.version("faster-whisper")
        self._revision = f"faster-whisper {version} {Path(model).name} {identity}"

    def revision(self) -> str:
        return self._revision

    def transcribe(self, samples: np.ndarray, language: str) -> tuple[Word, ...]:
        seconds = len(samples) / RECOGNISER_RATE
        if seconds < 0.05:
            return ()
        segments, _ = self._model.transcribe(
            np.ascontiguousarray(samples, dtype=np.float32),
            language=language,
            beam_size=1,
            temperature=0.0,
            word_timestamps=True,
            condition_on_previous_text=False,
            no_repeat_ngram_size=NO_REPEAT_NGRAM,
            compression_ratio_threshold=MAX_COMPRESSION_RATIO,
            log_prob_threshold=MIN_LOG_PROBABILITY,
            no_speech_threshold=MAX_NO_SPEECH,
            max_new_tokens=token_limit(seconds),
        )
        return tuple(trusted_words(segments, language, seconds))


def token_limit(seconds: float) -> int:
    """Most tokens that speech of this length can hold."""
    return min(MAX_TOKENS, max(MIN_TOKENS, int(TOKENS_PER_SECOND * seconds)))


def trusted_words(segments: Iterable[Any], language: str, seconds: float) -> list[Word]:
    """Words of faster-whisper's segments, less those that the guards refuse.

    Greedy decoding has no second try, so a segment that the library would decode again at a
    higher temperature is left out here.
    """
    words: list[Word] = []
    for segment in segments:
        if segment.compression_ratio > MAX_COMPRESSION_RATIO:
            continue
        if segment.avg_logprob < MIN_LOG_PROBABILITY:
            continue
        if not in_script(segment.text, language):
            continue
        words += [
            Word(
                text=word.word.strip(),
                start_s=min(max(float(word.start), 0.0), seconds),
                end_s=min(max(float(word.end), float(word.start), 0.0), seconds),
            )
            for word in until_loop(segment.words or ())
        ]
    return words


def until_loop(
    words: Iterable[WordT], text_of: Callable[[WordT], str] = attrgetter("word")
) -> list[WordT]:
    """The words before a loop, with its first word; empty ones left out.

    A word `LOOP_WORDS` times in a row is a loop. The guard that this follows ends at the third
    token, and tokens are smaller than words: people do say "no, no, no" and go on.
    """
    kept: list[WordT] = []
    run = 0
    for word in words:
        text = text_of(word)
        if not text.strip():
            continue
        same = bool(kept) and _plain(text_of(kept[-1])) == _plain(text)
        run = run + 1 if same else 1
        kept.append(word)
        if run == LOOP_WORDS:
            return kept[: 1 - LOOP_WORDS]
    return kept


def in_script(text: str, language: str) -> bool:
    """Whether most letters are of the language's script; languages that we do not know pass."""
    script = SCRIPTS.get(language)
    letters = [character for character in text if character.isalpha()]
    if script is None or not letters:
        return True
    fitting = sum(unicodedata.name(letter, "").startswith(script) for letter in letters)
    return fitting * 2 >= len(letters)


def _plain(word: str) -> str:
    return re.sub(r"\W+", "", word).lower()


class PocketSphinx:
    """CMU's small recogniser: a stand-in where no Whisper model is at hand.

    Cepstral means are taken over each utterance, not carried from the one before. Faint noise,
    the same each time, is laid under it: digital silence spoils the means (logarithms of zero).
    On speech with pauses of zeros, told its text, it took the word error rate from .37 to .07.
    """

    def __init__(self, **settings: Any) -> None:
        require("pocketsphinx", "pocketsphinx", "pip install pocketsphinx")
        import pocketsphinx

        self._decoder: Any = pocketsphinx.Decoder(
            samprate=RECOGNISER_RATE, cmn="batch", loglevel="FATAL", **settings
        )
        self._rate: int = self._decoder.get_config()["frate"]

    def revision(self) -> str:
        return f"pocketsphinx {importlib.metadata.version('pocketsphinx')} en-us dithered"

    def transcribe(self, samples: np.ndarray, language: str) -> tuple[Word, ...]:
        if len(samples) < RECOGNISER_RATE // 20:
            return ()
        noise = np.random.default_rng(0).normal(0, DITHER, len(samples))
        pcm = (np.clip(samples + noise, -1.0, 1.0) * 32767).astype("<i2")
        self._decoder.reinit_feat()  # else its front end carries something over
        self._decoder.start_utt()
        self._decoder.process_raw(pcm.tobytes(), full_utt=True)
        self._decoder.end_utt()
        seconds = len(samples) / RECOGNISER_RATE
        words = []
        for segment in self._decoder.seg() or ():
            if segment.word.startswith(("<", "[", "+")):  # silence, noise
                continue
            words.append(
                Word(
                    text=re.sub(r"\(\d+\)$", "", segment.word),  # a pronunciation's number
                    start_s=min(segment.start_frame / self._rate, seconds),
                    end_s=min((segment.end_frame + 1) / self._rate, seconds),
                )
            )
        return tuple(words)


def require(module: str, package: str, install: str) -> None:
    """
    Raises:
        MissingInputError: the package is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingInputError(
            f"a recording without a transcript needs the recogniser {package}, found it not "
            f"installed. Install it: {install}; or put transcripts beside the recordings"
        )
