"""What every speech engine offers: text and a voice in, 24 kHz samples out.

    espeak          rules, every language here; exact word times; a process of its own
    openai-speech   any server with `/v1/audio/speech`
    chatterbox      an isolated script, JSON lines on its pipes; the pattern for others
    moshi-tts       moshi's own `TTSModel`; word times
    csm, dia        through transformers; pocket-tts through its package

An engine's module, listed in `engines.py`, has beside its class:

    CAPABILITIES: Capabilities
    revision(section: SpeechSection) -> str     id, version and weights, for keys
    make(section: SpeechSection) -> SpeechEngine
    missing(section: SpeechSection) -> str | None    what is not here, and how to get it

A revision is part of the key of each record that the engine spoke: it changes whenever the same
request would give other samples. Keys are made before any work: no such module imports torch,
nor anything heavy, before its engine speaks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from duplex.base import Emotion
from duplex.config_data import SpeechSection
from duplex.records import Voice, Word

Settings = Mapping[str, str | int | float]

# Who timed the words: the engine itself, a recogniser that heard them, or the letters of the
# text laid evenly over the speech that was found.
TimedBy = Literal["engine", "recogniser", "letters"]


@dataclass(frozen=True)
class Checks:
    """What the checks measured on an utterance that passed.

    wer: of its transcript against its text; None where it was not transcribed.
    similarity: of its speaker to the voice's sample, or its proof, cosine; None where it was not
        compared.
    retries: tries before this one that were refused.
    """

    wer: float | None = None
    similarity: float | None = None
    retries: int = 0


@dataclass(frozen=True)
class Utterance:
    """samples: float32 [S] at 24 kHz. words: times from its start; None where it knows none.

    An engine leaves the other fields as they are: `Speaker` fills them in. `speaker` is the id of
    the voice that spoke, for engines that are to hear it as context; None: unknown.
    """

    samples: np.ndarray = field(repr=False)
    words: tuple[Word, ...] | None
    words_by: TimedBy = "engine"
    checks: Checks | None = None
    speaker: str | None = None


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do. `languages`: ISO 639-1; None: nobody can say, as of a server.

    cloning: a voice may have a `sample` to sound like. seeded: another seed gives other speech,
    so that a bad utterance is worth another try. parallel: `synthesize` may be called from
    several threads at once. checked: share of its utterances that a recogniser hears, unless
    the config says otherwise.
    """

    languages: frozenset[str] | None
    licence: str
    cloning: bool = False
    word_times: bool = False
    emotion: bool = False
    context: bool = False  # speaks better when it hears what was said before
    seeded: bool = True
    parallel: bool = False
    checked: float = 1.0
    weights: str | None = None  # the hub repository that it downloads

    def speaks(self, language: str) -> bool:
        return self.languages is None or language in self.languages


@dataclass(frozen=True)
class SpeechRequest:
    """One utterance to speak.

    `sample` is the path of the voice's recording, where it has one; `proof` of the sentence that
    the voice was proven by. `context` is what was said
    before, (text, utterance) with the oldest first, for engines that take it. `adjusted` is what
    language and emotion change of the voice's parameters for the engine that speaks: an engine
    reads `settings`.
    """

    text: str
    voice: Voice
    seed: int
    language: str = "en"
    emotion: Emotion = "neutral"
    intensity: float = 1.0
    sample: Path | None = None
    proof: Path | None = None
    context: tuple[tuple[str, Utterance], ...] = field(default=(), repr=False)
    adjusted: Settings | None = None

    @property
    def settings(self) -> Settings:
        """The engine's parameters: the voice's own, with language and emotion worked in."""
        return self.voice.params if self.adjusted is None else self.adjusted


class SpeechEngine(Protocol):
    """Speaks one request at a time. Starts what it needs at the first one."""

    capabilities: Capabilities

    def synthesize(self, request: SpeechRequest) -> Utterance:
        """
        Raises:
            RequestError: the voice, or the engine's own settings, are wrong.
            MissingInputError: its package or its weights are not here; says how to get them.
            RecordError: this text gives no speech.
            TransientError: it may work next time.
        """
        ...

    def close(self) -> None:
        """Free what it holds: processes, memory. It may be used again."""
        ...


EngineFactory = Callable[[SpeechSection], SpeechEngine]
