"""espeak-ng through the interface of all speech engines.

It speaks all 17 languages of data/speech/languages.yaml. A voice keeps its variant, pitch and
rate when it speaks another language than its own; a voice of another engine is given a variant by
the hash of its id, for espeak cannot sound like anybody. Kanji would be spelled out as "Chinese
letter": such a text is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re

from duplex.config_data import SpeechSection
from duplex.errors import RecordError, RequestError
from pipeline.engines import espeak
from pipeline.engines.engines import language_map
from pipeline.engines.speaking import Capabilities, SpeechRequest, Utterance

NAME = "espeak"
LANGUAGES = frozenset(
    ("en", "hi", "es", "fr", "de", "it", "pt", "ja", "ko", "zh", "ms")
) | {"ta", "te", "mr", "kn", "ml", "bn"}  # fmt: skip
CAPABILITIES = Capabilities(
    languages=LANGUAGES,
    licence="GPL-3.0-or-later (the engine)",
    word_times=True,
    emotion=True,
    seeded=False,
    checked=0.0,
)
STRANGERS = ("f2", "m3", "f5", "m7", "Annie", "max", "f1", "m6")
KANJI = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


def revision(section: SpeechSection) -> str:
    return espeak.revision()


def missing(section: SpeechSection) -> str | None:
    if importlib.util.find_spec(espeak.MODULE) is None:
        return f"the package {espeak.PACKAGE}: pip install -e '.[espeak]'"
    return None


def make(section: SpeechSection) -> EspeakSpeech:
    return EspeakSpeech()


class EspeakSpeech:
    """A `SpeechEngine`; the seed changes nothing."""

    capabilities = CAPABILITIES

    def __init__(self, timeout_s: float = espeak.TIMEOUT_S):
        self._engine = espeak.EspeakEngine(timeout_s)

    def synthesize(self, request: SpeechRequest) -> Utterance:
        if request.language == "ja" and (found := KANJI.search(request.text)):
            raise RecordError(
                f"Japanese for espeak must be written in kana, found {found[0]!r}: write it in "
                "kana, or choose an engine that reads kanji, speech.engines: {ja: chatterbox}"
            )
        settings = dict(request.settings)
        settings.setdefault("voice", voice_name(request.language))
        if language_of(str(settings["voice"])) != request.language:
            settings["voice"] = voice_name(request.language)
        if request.voice.engine != NAME:
            digest = hashlib.sha256(request.voice.id.encode()).digest()
            settings.setdefault("variant", STRANGERS[digest[0] % len(STRANGERS)])
        spoken = self._engine.synthesize(request.text, settings)
        return Utterance(spoken.samples, spoken.words)

    def close(self) -> None:
        self._engine.close()


def voice_name(language: str) -> str:
    """espeak's name of a language's voice.

    Raises:
        RequestError: espeak has none that is known here.
    """
    row = language_map().get(language)
    if row is None:
        raise RequestError(
            f"espeak must have a voice for the language, data/speech/languages.yaml has none for "
            f"{language}: add its name there"
        )
    return row["espeak"]


def language_of(voice: str) -> str:
    """ISO 639-1 of an espeak voice: en of en-gb-scotland and gmw/en, zh of cmn."""
    code = voice.lower().rpartition("/")[2].partition("-")[0]
    return {"cmn": "zh"}.get(code, code)
