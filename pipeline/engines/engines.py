"""The speech engines by name, and which of them speaks what.

Written out, not registered. A module is imported when its engine is asked for; the light ones
alone (`revision`, `missing`, `CAPABILITIES` import nothing heavy) are read when keys are made.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, Protocol, cast

from duplex.config import Config
from duplex.config_data import SpeechSection
from duplex.datafiles import CHECKOUT, find_path, load_personas, read_yaml
from duplex.errors import DataFileError, DuplexError, RequestError
from pipeline.engines.speaking import Capabilities, SpeechEngine

ENGINES: dict[str, str] = {
    "espeak": "pipeline.engines.espeak_speech",
    "openai-speech": "pipeline.engines.openai_speech",
    "chatterbox": "pipeline.engines.chatterbox",
    "moshi-tts": "pipeline.engines.moshi_tts",
    "csm": "pipeline.engines.csm",
    "pocket-tts": "pipeline.engines.pocket_tts",
    "dia": "pipeline.engines.dia",
}
LANGUAGES = CHECKOUT / "data/speech/languages.yaml"


class EngineModule(Protocol):
    """What a module of `ENGINES` has."""

    CAPABILITIES: Capabilities

    def revision(self, section: SpeechSection) -> str: ...
    def make(self, section: SpeechSection) -> SpeechEngine: ...
    def missing(self, section: SpeechSection) -> str | None: ...


def engine_module(name: str) -> EngineModule:
    """
    Raises:
        RequestError: no engine of that name.
    """
    if name not in ENGINES:
        raise RequestError(f"a speech engine must be one of {', '.join(ENGINES)}; found {name}")
    return cast(EngineModule, importlib.import_module(ENGINES[name]))


@cache
def language_map() -> dict[str, Any]:
    """languages.yaml: language -> {name, engines, espeak}."""
    found = read_yaml(LANGUAGES)
    if not isinstance(found, dict) or not all(
        isinstance(row, dict) and set(row) == {"name", "engines", "espeak"}
        and set(row["engines"]) <= set(ENGINES) for row in found.values()
    ):  # fmt: skip
        raise DataFileError(
            f"{LANGUAGES}: each language must have name, espeak and engines, these of "
            f"{', '.join(ENGINES)}"
        )
    return found


def engine_for(language: str, section: SpeechSection) -> str:
    """The engine that speaks a language: what `speech.engines` says; `speech.engine` where it
    speaks the language; else the first of languages.yaml that is at hand on this machine.

    Raises:
        RequestError: no engine here speaks it.
    """
    if language in section.engines:
        return section.engines[language]
    if engine_module(section.engine).CAPABILITIES.speaks(language):
        return section.engine
    preferred = language_map().get(language, {}).get("engines", [])
    for name in preferred:
        if engine_module(name).missing(section) is None:
            return name
    raise RequestError(
        f"speech.engine must speak {language}, {section.engine} does not, and none of "
        f"{', '.join(preferred) or 'the others'} is at hand. Name one that does: "
        f"speech.engines: {{{language}: …}}"
    )


def voice_engine(language: str, config: Config) -> str:
    """The engine of a voice: `speech.engines` for its language; `voices.engine` where it speaks
    that; else as `engine_for`.

    Raises:
        RequestError: no engine here speaks it.
    """
    own = config.voices.engine
    if language not in config.speech.engines and engine_module(own).CAPABILITIES.speaks(language):
        return own
    return engine_for(language, config.speech)


def configured_engines(config: Config) -> set[str]:
    """The engines that a config names."""
    return {config.voices.engine, config.speech.engine, *config.speech.engines.values()}


def engines_by_language(config: Config) -> dict[str, str]:
    """The engine of each language of the run's personas; empty where `voices.engine` speaks all
    languages anyway. One that none speaks is left out: the voices stage says it."""
    found = {}
    for language in sorted(_languages(config)):
        try:
            found[language] = voice_engine(language, config)
        except RequestError:
            continue
    return found


def unnamed_engines(config: Config) -> dict[str, str]:
    """Engines that no setting names, for languages of the run's personas: language -> revision.

    They are the machine's choice from languages.yaml, and may be others tomorrow: for the keys of
    folders. A record's key has the revision of those alone that speak in it.
    """
    named = configured_engines(config)
    return {
        language: engine_module(name).revision(config.speech)
        for language, name in engines_by_language(config).items()
        if name not in named
    }


def _languages(config: Config) -> set[str]:
    """Of the run's voices, where the engines of the config don't speak them all anyway."""
    own = engine_module(config.voices.engine).CAPABILITIES
    if own.speaks("en") and all(own.speaks(language) for language in language_map()):
        return set()
    try:
        personas = load_personas(find_path(config.personas.folder), config.personas.only)
    except DuplexError:
        return set(language_map())  # whatever they are; the personas stage says what is wrong
    return {persona.language for persona in personas} | {"en"}
