"""What every speech engine offers: text and a voice in, 24 kHz samples out.

    espeak          rules, every language here; exact word times; a process of its own
    openai-speech   any server with `/v1/audio/speech`
    chatterbox      an isolated script, JSON lines on its pipes; the pattern for others
    moshi-tts       moshi's own `TTSModel`; word times
    csm, dia        through transformers; pocket-tts through its package

An engine's `revision` is part of the key of each record that it spoke: it changes whenever the
same request would give other samples. Keys are made before any work: no engine imports torch,
nor anything heavy, before it speaks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from duplex.base import Emotion
from duplex.records import Voice, Word


@dataclass(frozen=True)
class Utterance:
    """samples: float32 [S] at 24 kHz. words: times from its start; None where it knows none."""

    samples: np.ndarray
    words: tuple[Word, ...] | None


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do. `languages`: ISO 639-1."""

    languages: frozenset[str]
    cloning: bool = False
    word_times: bool = False
    emotion: bool = False
    context: bool = False  # speaks better when it hears what was said before
    weights: str | None = None  # the hub repository that it downloads


@dataclass(frozen=True)
class SpeechRequest:
    """One utterance to speak.

    `sample` is the path of the voice's recording, where it has one. `context` is what was said
    before, oldest first, for engines that take it.
    """

    text: str
    voice: Voice
    seed: int
    language: str = "en"
    emotion: Emotion = "neutral"
    intensity: float = 1.0
    sample: Path | None = None
    context: tuple[tuple[str, Utterance], ...] = field(default=(), repr=False)


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


EngineFactory = Callable[[], SpeechEngine]
