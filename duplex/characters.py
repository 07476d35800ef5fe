"""Who the model plays and what it meets: the files that people write under `data/`.

A domain is a place with two roles: a coffee shop with customers (the agent, which the model
plays) and a barista (the user). Personas are characters in it, scenarios its situations. All
three are data: another domain is another folder, not another program.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from duplex.base import Emotion, Frozen, Intensity, Language, Record, Role, Share, Slug, Text
from duplex.words import has_words


class Mood(Frozen):
    """An emotion and how strong it is; engines map it to what they have."""

    emotion: Emotion = "neutral"
    intensity: Intensity = 1.0


class Domain(Record):
    """A place and its two roles. Written by people in `data/domains/*.yaml`.

    `types` maps the kinds of persona to their mood; `kinds` is the taxonomy of scenarios.
    `topic` are words of which a conversation on the subject has some; `user_lines` are what
    only the user's side says ("how can I help you"): from the agent they are a role inversion.
    """

    title: Text
    place: Text = Field(description='as in "in a coffee shop"')
    agent_role: Text
    user_role: Text
    language: Language = "en"
    types: dict[Slug, Mood] = Field(min_length=1)
    kinds: dict[Slug, Text] = Field(min_length=1)
    topic: tuple[Text, ...] = Field(min_length=1)
    user_lines: tuple[Text, ...] = Field(min_length=1)


class Fact(Frozen):
    """Something that the persona's prompt says and that its answers can be checked against.

    `says` lists the wordings that count as having said it (matched case-insensitively on
    whole words; what a word is in each script: `duplex/words.py`).
    """

    key: Slug
    value: Text
    says: tuple[Text, ...] = Field(min_length=1)


class GapRange(Frozen):
    """Inclusive range of a pause, in frames of 80 ms."""

    low: int = Field(ge=0, le=250)
    high: int = Field(ge=0, le=250)

    @model_validator(mode="after")
    def _ordered(self) -> GapRange:
        if self.low > self.high:
            raise ValueError(f"low must not exceed high, found {self.low} > {self.high}")
        return self


class VoiceTraits(Frozen):
    """What a persona should sound like; engines map it to what they have."""

    gender: Literal["female", "male"]
    age: Literal["young", "adult", "old"] = "adult"
    accent: str = Field(default="en-us", description="as espeak names its voices: en-gb-scotland")
    pitch: int = Field(default=50, ge=0, le=99, description="50 is the engine's own")
    rate_wpm: int = Field(default=175, ge=100, le=300)


class Persona(Record):
    """A character that the model plays. Written by people in `data/personas/*.yaml`."""

    name: Text
    domain: Slug = "coffee-shop"
    type: Slug = Field(description="one of the domain's types, which gives the mood")
    language: Language = "en"
    traits: tuple[Text, ...] = Field(min_length=1)
    speech_patterns: tuple[Text, ...] = Field(min_length=1, description="phrases that it uses")
    facts: tuple[Fact, ...] = Field(min_length=1)
    gap_after_user: GapRange = Field(description="pause before it answers")
    gap_other: GapRange = Field(description="any other pause")
    interrupts: Share = Field(default=0, description="of its turns that may, cut in on the user")
    backchannels: Share = Field(default=0, description="of the user's long turns, answered within")
    backchannel_words: tuple[Text, ...] = Field(
        default=("mm-hm",), description="what it says within the user's turns"
    )
    voice: VoiceTraits
    prompts: tuple[Text, ...] = Field(min_length=1, description="paraphrases of one system prompt")

    @field_validator("facts")
    @classmethod
    def _fact_keys_differ(cls, facts: tuple[Fact, ...]) -> tuple[Fact, ...]:
        keys = [fact.key for fact in facts]
        doubled = sorted({key for key in keys if keys.count(key) > 1})
        if doubled:
            raise ValueError(f"each fact needs a key of its own, found twice: {', '.join(doubled)}")
        return facts

    @model_validator(mode="after")
    def _prompts_hold_the_facts(self) -> Persona:
        """A model must not be trained on a fact that its prompt never gave."""
        unsaid = [
            f"prompt {number} does not say {fact.key}: {fact.value}"
            for number, prompt in enumerate(self.prompts, start=1)
            for fact in self.facts
            if not any(has_words(prompt, wording) for wording in (*fact.says, fact.value))
        ]
        if unsaid:
            raise ValueError(f"each prompt must hold each fact, {'; '.join(unsaid)}")
        return self


class Beat(Frozen):
    """One step of a scenario's arc: who speaks, and to what end."""

    role: Role
    intent: Slug


class MoodTurn(Frozen):
    """From this beat of the arc on, the agent's mood is another one."""

    at: Slug = Field(description="an intent of the arc")
    mood: Mood


class Scenario(Record):
    """A situation that personas meet. Written by people in `data/scenarios/*.yaml`.

    `unanswerable` are questions of the user that no persona's prompt answers: the agent is to
    say so in character. `interruptions` is how many there should be, of either side.
    """

    domain: Slug = "coffee-shop"
    kind: Slug = Field(default="routine", description="one of the domain's kinds")
    title: Text
    setting: Text
    moods: tuple[MoodTurn, ...] = ()
    interruptions: int = Field(default=0, ge=0, le=10)
    unanswerable: tuple[Text, ...] = ()
    known: tuple[Slug, ...] = Field(
        default=(), description="keys of facts that the user knows from before"
    )
    first_speaker: Role = "user"
    arc: tuple[Beat, ...] = Field(min_length=4, description="what happens, in order")

    @model_validator(mode="after")
    def _first_beat(self) -> Scenario:
        if self.arc[0].role != self.first_speaker:
            raise ValueError(
                f"the first beat must be spoken by first_speaker ({self.first_speaker}), "
                f"found {self.arc[0].role}"
            )
        return self

    @model_validator(mode="after")
    def _moods_turn_in_the_arc(self) -> Scenario:
        intents = {beat.intent for beat in self.arc}
        unknown = [turn.at for turn in self.moods if turn.at not in intents]
        if unknown:
            raise ValueError(f"a mood turns at an intent of the arc, found {', '.join(unknown)}")
        return self
