"""What the speech stage speaks through: the right engine, its emotion, checks, another try.

`Speaker.speak` gives an utterance whose words are timed and that passed the checks, or raises:
there is never silence in place of speech. One that fails is spoken again with another seed, as
often as `speech.checks.retries` says, by engines that have seeds.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace

from duplex.config import Config
from duplex.config_data import SpeechSection
from duplex.errors import RecordError, RequestError
from duplex.files import sha256_file
from pipeline.engines.emotions import EMOTIONS, with_emotion
from pipeline.engines.engines import ENGINES, LANGUAGES, engine_for, engine_module
from pipeline.engines.speaking import Checks, SpeechEngine, SpeechRequest, Utterance

SAMPLE_RATE = 24_000


class Speaker:
    """Engines are started at their first utterance, one of each. Safe for threads.

    Args:
        section: `config.speech`.
        report: gets what a person should know, once.
    """

    def __init__(self, section: SpeechSection, report: Callable[[str], None] = print):
        self._section = section
        self._report = report
        self._engines: dict[str, SpeechEngine] = {}
        self._locks: dict[str, threading.Lock] = {name: threading.Lock() for name in ENGINES}
        self._starting = threading.Lock()

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def speak(self, request: SpeechRequest) -> Utterance:
        """
        Raises:
            RequestError, MissingInputError, TransientError: as `SpeechEngine.synthesize`.
            RecordError: no try gave speech that passes; names all reasons.
        """
        name = engine_of(request, self._section)
        engine = self._engine(name)
        prepared = replace(request, adjusted=settings_of(name, request))
        utterance = self._synthesize(name, engine, prepared)
        if utterance.words is None:
            raise RecordError(f"{name} must time its words")
        return replace(utterance, checks=Checks(len(utterance.samples) / SAMPLE_RATE))

    def close(self) -> None:
        with self._starting:
            engines, self._engines = self._engines, {}
        for engine in engines.values():
            engine.close()

    def _engine(self, name: str) -> SpeechEngine:
        with self._starting:
            if name not in self._engines:
                self._engines[name] = engine_module(name).make(self._section)
            return self._engines[name]

    def _synthesize(self, name: str, engine: SpeechEngine, request: SpeechRequest) -> Utterance:
        if engine.capabilities.parallel:
            return engine.synthesize(request)
        with self._locks[name]:
            return engine.synthesize(request)


def engine_of(request: SpeechRequest, section: SpeechSection) -> str:
    """The engine of a request: `speech.engines` for its language; the voice's own where that
    speaks it; else as `engine_for`.

    Raises:
        RequestError: none speaks it, or the voice cannot be had in the one that does.
    """
    voice, language = request.voice, request.language
    name = section.engines.get(language)
    if name is None and voice.engine in ENGINES:
        own = engine_module(voice.engine).CAPABILITIES
        name = voice.engine if own.speaks(language) else None
    name = name or engine_for(language, section)
    capabilities = engine_module(name).CAPABILITIES
    if not capabilities.speaks(language):
        raise RequestError(f"{name} must speak {language}, and does not: see speech.engines")
    if name not in (voice.engine, "espeak") and not (capabilities.cloning and request.sample):
        raise RequestError(
            f"voice {voice.id} of {voice.engine} must have a recording that {name} can clone to "
            f"speak {language}, found none. Give the voice a sample, or name for {language} an "
            "engine that has the voice, in speech.engines"
        )
    return name


def settings_of(name: str, request: SpeechRequest) -> dict[str, str | int | float]:
    """The voice's parameters for this engine, with the emotion; another engine's mean nothing."""
    own = request.voice.params if request.voice.engine == name else {}
    return dict(with_emotion(name, own, request.emotion, request.intensity))


def speaker_revision(config: Config) -> str:
    """Everything but the requests that decides what is spoken: engines, recogniser, data."""
    section = config.speech
    names = sorted({config.voices.engine, section.engine, *section.engines.values()})
    parts = [f"{name}={engine_module(name).revision(section)}" for name in names]
    maps = "".join(sha256_file(path) for path in (LANGUAGES, EMOTIONS))
    parts.append(f"maps={hashlib.sha256(maps.encode()).hexdigest()[:12]}")
    return ", ".join(parts)
