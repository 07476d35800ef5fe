"""What flows between the stages: frozen records, written as one JSON object a line.

Each record has an `id` that is unique within its stage and names what it is about.
Audio and tensors are not in the record: it holds the sha256 of a blob beside it.
`digest` of a record is the sha256 of its canonical JSON, so blobs are covered too.

Times are seconds from the start of the conversation unless a name says otherwise.
Roles are the model's view: `agent` is what the model plays (the customer), `user` is
the person who talks to it (the barista).
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

Role = Literal["agent", "user"]
PersonaType = Literal["angry", "nervous", "friendly", "indecisive", "enthusiast"]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,95}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


class Record(BaseModel):
    """Base of all records: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Slug

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, UTF-8 kept."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class Frozen(BaseModel):
    """Base of the parts of records that have no id of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Fact(Frozen):
    """Something that the persona's prompt says and that its answers can be checked against.

    `says` lists the wordings that count as having said it (matched case-insensitively on
    whole words).
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
    accent: str = "en-us"
    pitch: int = Field(default=50, ge=0, le=99, description="50 is the engine's own")
    rate_wpm: int = Field(default=175, ge=100, le=300)


class Persona(Record):
    """A character that the model plays. Written by people in `data/personas/*.yaml`."""

    name: Text
    type: PersonaType
    traits: tuple[Text, ...] = Field(min_length=1)
    speech_patterns: tuple[Text, ...] = Field(min_length=1)
    facts: tuple[Fact, ...] = Field(min_length=1)
    gap_after_user: GapRange
    gap_other: GapRange
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
        for number, prompt in enumerate(self.prompts, start=1):
            for fact in self.facts:
                wordings = "|".join(re.escape(text) for text in (*fact.says, fact.value))
                if not re.search(rf"\b(?:{wordings})\b", prompt, re.IGNORECASE):
                    raise ValueError(
                        f"each prompt must hold each fact, prompt {number} does not say "
                        f"{fact.key}: {fact.value}"
                    )
        return self


class Beat(Frozen):
    """One step of a scenario's arc: who speaks, and to what end."""

    role: Role
    intent: Slug


class Scenario(Record):
    """A situation that personas meet. Written by people in `data/scenarios/*.yaml`."""

    title: Text
    setting: Text
    first_speaker: Role = "user"
    arc: tuple[Beat, ...] = Field(min_length=4)

    @model_validator(mode="after")
    def _first_beat(self) -> Scenario:
        if self.arc[0].role != self.first_speaker:
            raise ValueError(
                f"the first beat must be spoken by first_speaker ({self.first_speaker}), "
                f"found {self.arc[0].role}"
            )
        return self


class Turn(Frozen):
    role: Role
    text: Text
    gap_frames: int | None = Field(default=None, description="pause before it; None: drawn later")


class Dialogue(Record):
    """A conversation in words. `writer` says what wrote it: `scripted`, `import` or a model."""

    persona_id: Slug
    persona_name: Text
    scenario_id: Slug
    system_prompt: Text
    mood: str
    first_speaker: Role
    gap_after_user: GapRange
    gap_other: GapRange
    turns: tuple[Turn, ...] = Field(min_length=2)
    writer: Text

    @model_validator(mode="after")
    def _first_turn(self) -> Dialogue:
        if self.turns[0].role != self.first_speaker:
            raise ValueError(
                f"the first turn must be spoken by first_speaker ({self.first_speaker}), "
                f"found {self.turns[0].role}"
            )
        return self


class Voice(Record):
    """A voice of an engine. `params` is what the engine needs to make it again."""

    engine: Text
    role: Role
    persona_id: Slug | None = None
    params: dict[str, str | int | float]
    licence: Text


class Word(Frozen):
    text: str
    start_s: float = Field(ge=0)
    end_s: float = Field(ge=0)


class SpokenTurn(Frozen):
    """A turn on the conversation's timeline."""

    role: Role
    text: Text
    voice_id: Slug
    start_s: float = Field(ge=0)
    end_s: float = Field(gt=0)
    words: tuple[Word, ...]


class Speech(Record):
    """A spoken conversation: stereo 24 kHz WAV, left agent, right user."""

    dialogue_id: Slug
    persona_id: Slug
    scenario_id: Slug
    system_prompt: Text
    first_speaker: Role
    audio: Sha256
    num_samples: int = Field(gt=0)
    turns: tuple[SpokenTurn, ...]


class FrameSpan(Frozen):
    """Frames `[start, end)` of a tensor, and what they hold."""

    label: Text
    start: int = Field(ge=0)
    end: int = Field(ge=0)


class TensorClip(Record):
    """What a `.pt` file holds: int64 `[17, T]`, undelayed, 12.5 Hz.

    `prompt` gives the span of each prompt phase after the frame-0 rule: the tensor starts
    with the *second* prompt frame (layout `coffee`: with the first).
    `late_tokens` stand after the place that the alignment gives them, `dropped_tokens` nowhere;
    None where nobody knows, as in files that came without the text that they were made from.
    `text_digest` is of all turns' words: two clips with one text are one conversation.
    """

    speech_id: Slug
    dialogue_id: Slug | None = None
    persona_id: Slug
    voices: tuple[Slug, ...] = Field(default=(), description="the agent's")
    text_digest: Sha256 | None = None
    voice_sample: Slug | None = Field(default=None, description="id of the prompt's VoiceSample")
    tensor: Sha256
    num_frames: int = Field(gt=0)
    prompt: tuple[FrameSpan, ...]
    turns: tuple[FrameSpan, ...]
    text_tokens: int = Field(ge=0)
    dropped_tokens: int | None = Field(default=None, ge=0)
    late_tokens: int | None = Field(default=None, ge=0)
    alignment: Text
    padding: Literal["pad", "zero"] = "pad"
    layout: Literal["personaplex", "coffee"] = "personaplex"
    split: Literal["train", "valid"]
    split_by: Literal["persona", "conversation"] | None = None
    codec_digest: Sha256
    tokenizer_digest: Sha256


class VoiceSample(Record):
    """What a prompt lets the model hear: a voice at -24 LUFS, or the other side's greeting.

    Mono 24 kHz WAV, a whole number of frames.
    """

    kind: Literal["voice", "greeting"] = "voice"
    voice_id: Slug
    persona_id: Slug
    speech_id: Slug = Field(description="the recording that it was cut from")
    audio: Sha256
    num_frames: int = Field(gt=0)


class Artifact(Record):
    """A file that a whole stage made: an adapter, a checkpoint, a report."""

    path: Text = Field(description="relative to the stage's folder")
    sha256: Sha256
    num_bytes: int = Field(ge=0)
    facts: dict[str, Any] = {}


class Proof(Record):
    """What a server showed when it was probed.

    `frames_equal`: whether all 17 rows of the prompt were those of a training tensor with the
    same prompt; None where there is no such tensor to compare with.
    """

    prompt: str = Field(description="empty where the model was trained without prompts")
    expected_digest: Sha256
    served_digest: Sha256
    num_tokens: int
    frames_equal: bool | None = None
    proven: bool


class Score(Record):
    """What one evaluation item measured on one model."""

    item_id: Slug
    model: Literal["base", "merged"]
    persona_id: Slug | None = None
    prompt: str
    prompt_proven: bool
    transcript: str
    metrics: dict[str, float | int | None]
    audio: Sha256 | None = None


# Written out, not registered: a reader finds every type of a `parts/` line here.
RECORD_TYPES: dict[str, type[Record]] = {
    "Persona": Persona,
    "Scenario": Scenario,
    "Dialogue": Dialogue,
    "Voice": Voice,
    "Speech": Speech,
    "TensorClip": TensorClip,
    "VoiceSample": VoiceSample,
    "Artifact": Artifact,
    "Proof": Proof,
    "Score": Score,
}


def record_line(record: Record) -> str:
    """A record as a line of a `parts/` file: its canonical JSON with its type."""
    value = record.model_dump(mode="json", exclude_none=True)
    return canonical_json({"record": type(record).__name__, **value})


def parse_record(value: dict[str, Any]) -> Record:
    """The record of a `parts/` line.

    Raises:
        KeyError, pydantic.ValidationError: the line is not one of ours.
    """
    fields = dict(value)
    return RECORD_TYPES[fields.pop("record")].model_validate(fields)
