"""Emotion and intensity -> an engine's own parameters, by data/speech/emotions.yaml.

value = clamp(the voice's own, or the engine's base, + intensity x the emotion's number). Engines
that the file does not name have no such parameters: their voices are left as they are.
"""

from __future__ import annotations

import re
from functools import cache

from pydantic import Field

from duplex.base import Emotion, Frozen
from duplex.datafiles import CHECKOUT, read_yaml, validate
from pipeline.engines.speaking import Settings

EMOTIONS = CHECKOUT / "data/speech/emotions.yaml"


class EngineEmotions(Frozen):
    """What the emotions change of one engine's parameters."""

    limits: dict[str, tuple[float, float]] = Field(default={})
    base: dict[str, float] = Field(default={})
    emotions: dict[Emotion, dict[str, float]] = Field(default={})
    words: dict[Emotion, dict[str, str]] = Field(default={})


class EmotionMap(Frozen):
    """degrees: (least intensity, word), rising."""

    degrees: tuple[tuple[float, str], ...] = Field(min_length=1)
    engines: dict[str, EngineEmotions]


@cache
def emotion_map() -> EmotionMap:
    """
    Raises:
        DataFileError: the file breaks its schema.
    """
    return validate(EmotionMap, read_yaml(EMOTIONS), EMOTIONS)


def with_emotion(engine: str, settings: Settings, emotion: Emotion, intensity: float) -> Settings:
    """The settings with the emotion worked in, each number within the engine's limits."""
    rows = emotion_map().engines.get(engine)
    if rows is None:
        return settings
    found = dict(settings)
    for name, change in rows.emotions.get(emotion, {}).items():
        own = found.get(name, rows.base.get(name, 0.0))
        if not isinstance(own, int | float):
            continue  # the engine itself says what is wrong with it
        low, high = rows.limits.get(name, (-float("inf"), float("inf")))
        found[name] = round(min(max(own + intensity * change, low), high), 4)
    for name, text in rows.words.get(emotion, {}).items():
        degree = [word for least, word in emotion_map().degrees if intensity >= least]
        filled = text.replace("{degree}", degree[-1] if degree else "")
        found.setdefault(name, re.sub(r" +", " ", filled))
    return found
