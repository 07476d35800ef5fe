"""What flows between the stages: frozen records, written as one JSON object a line.

Each record has an `id` that is unique within its stage and names what it is about.
Audio and tensors are not in the record: it holds the sha256 of a blob beside it.
`digest` of a record is the sha256 of its canonical JSON, so blobs are covered too.

Times are seconds from the start of the conversation unless a name says otherwise.
Roles are the model's view: `agent` is what the model plays (the customer), `user` is
the person who talks to it (the barista). What people write, personas and scenarios, is in
`duplex/characters.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from duplex.base import (
    Emotion,
    Frozen,
    Intensity,
    Language,
    Record,
    Role,
    Sha256,
    Slug,
    Text,
    canonical_json,
)
from duplex.characters import Domain, GapRange, Persona, Scenario


class Backchannel(Frozen):
    """A word of the listener while the other one goes on speaking."""

    text: Text
    after_word: int = Field(ge=1, description="words of the turn that it is in, spoken before it")


class Turn(Frozen):
    """What one side says.

    `cut_after_words`: the next turn, of the other side, cuts in after so many words; what comes
    later is not spoken, but for the moment in which both speak.
    """

    role: Role
    text: Text
    gap_frames: int | None = Field(
        default=None, description="pause before it, below zero an overlap; None: drawn later"
    )
    emotion: Emotion | None = None
    intensity: Intensity | None = None
    cut_after_words: int | None = Field(default=None, ge=1)
    backchannels: tuple[Backchannel, ...] = ()

    @model_validator(mode="after")
    def _places_are_in_the_text(self) -> Turn:
        words = len(self.text.split())
        places = [backchannel.after_word for backchannel in self.backchannels]
        places += [self.cut_after_words] if self.cut_after_words else []
        if places and max(places) > words:
            raise ValueError(
                f"a place in a turn must be within its {words} words, found {max(places)}"
            )
        return self


class Dialogue(Record):
    """A conversation in words. `writer` says what wrote it: `scripted`, `import` or a model.

    `prompts`: what `system_prompt` was drawn from, where the prompts were written for it.
    """

    persona_id: Slug
    persona_name: Text
    scenario_id: Slug
    system_prompt: Text
    mood: str
    first_speaker: Role
    gap_after_user: GapRange = Field(description="pause before the agent answers")
    gap_other: GapRange = Field(description="any other pause")
    turns: tuple[Turn, ...] = Field(min_length=2)
    writer: Text
    prompts: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _first_turn(self) -> Dialogue:
        if self.turns[0].role != self.first_speaker:
            raise ValueError(
                f"the first turn must be spoken by first_speaker ({self.first_speaker}), "
                f"found {self.turns[0].role}"
            )
        if self.turns[-1].cut_after_words:
            raise ValueError("nobody cuts in on the last turn: it has no cut_after_words")
        return self


class Voice(Record):
    """A voice of an engine. `params` is what the engine needs to make it again.

    `sample`: mono 24 kHz WAV of the voice at -24 LUFS, for engines that clone; `transcript` is
    what it says. A recorded voice names where it is from and on what consent it is used.
    `proof`: a mono WAV of a sentence that the voice has spoken here, to be listened to.
    """

    engine: Text
    role: Role
    persona_id: Slug | None = None
    params: dict[str, str | int | float]
    language: Language = "en"
    sample: Sha256 | None = None
    transcript: Text | None = None
    licence: Text
    source: Text | None = None
    consent: Text | None = None
    proof: Sha256 | None = None


class Word(Frozen):
    text: str
    start_s: float = Field(ge=0)
    end_s: float = Field(ge=0)


class SpokenTurn(Frozen):
    """A turn, or a word within the other side's turn, on the conversation's timeline.

    `text` and `words` are what was spoken: of a turn that was cut, the part before the cut.
    """

    kind: Literal["turn", "backchannel"] = "turn"
    role: Role
    text: Text
    voice_id: Slug
    start_s: float = Field(ge=0)
    end_s: float = Field(gt=0)
    words: tuple[Word, ...]
    emotion: Emotion | None = None
    cut: bool = Field(default=False, description="the other side cut it short")


class SpeechQuality(Frozen):
    """What the checks measured on a conversation's utterances: how many were transcribed, the
    worst and the mean word error rate of those, how much the one that sounds least like its voice
    does, how many were refused and spoken again, and how many of them had their words timed by
    what: engine, recogniser, or letters, which is a guess."""

    utterances: int = Field(ge=1)
    transcribed: int = Field(default=0, ge=0)
    worst_wer: float | None = None
    mean_wer: float | None = None
    worst_similarity: float | None = None
    retries: int = Field(default=0, ge=0)
    timed_by: dict[str, int] = Field(default={})


class Speech(Record):
    """A spoken conversation: stereo 24 kHz WAV, left agent, right user.

    `turns` are sorted by start. `text_digest` is of the dialogue as it was written, which
    decides what counts as one conversation: an interruption leaves out what it cuts.
    """

    dialogue_id: Slug
    persona_id: Slug
    scenario_id: Slug
    system_prompt: Text
    first_speaker: Role
    audio: Sha256 = Field(description="of the WAV in blobs/")
    num_samples: int = Field(gt=0)
    turns: tuple[SpokenTurn, ...]
    text_digest: Sha256 | None = None
    quality: SpeechQuality | None = None


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
    `text_digest` is of all turns' words as they were written, or where that is unknown as they
    were spoken: two clips with one text are one conversation.
    """

    speech_id: Slug
    dialogue_id: Slug | None = None
    persona_id: Slug
    voices: tuple[Slug, ...] = Field(default=(), description="the agent's")
    text_digest: Sha256 | None = None
    voice_sample: Slug | None = Field(default=None, description="id of the prompt's VoiceSample")
    tensor: Sha256 = Field(description="of the .pt in blobs/")
    num_frames: int = Field(gt=0)
    prompt: tuple[FrameSpan, ...]
    turns: tuple[FrameSpan, ...]
    text_tokens: int = Field(ge=0, description="of the dialogue, dropped ones too")
    dropped_tokens: int | None = Field(default=None, ge=0)
    late_tokens: int | None = Field(default=None, ge=0)
    alignment: Text = Field(description="as in the config, or import")
    padding: Literal["pad", "zero"] = "pad"
    layout: Literal["personaplex", "coffee"] = "personaplex"
    split: Literal["train", "valid"]
    split_by: Literal["persona", "conversation"] | None = Field(
        default=None, description="what was held out whole"
    )
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
    audio: Sha256 = Field(description="of the WAV in blobs/")
    num_frames: int = Field(gt=0)


class Artifact(Record):
    """A file that a whole stage made: an adapter, a checkpoint, a report."""

    path: Text = Field(description="relative to the stage's folder")
    sha256: Sha256
    num_bytes: int = Field(ge=0)
    facts: dict[str, Any] = Field(default={}, description="what its stage says of it")


class Proof(Record):
    """What a server showed when it was probed.

    `frames_equal`: whether all 17 rows of the prompt were those of a training tensor with the
    same prompt; None where there is no such tensor to compare with.
    """

    prompt: str = Field(description="empty where the model was trained without prompts")
    expected_digest: Sha256 = Field(description="of the prompt's tokens as we make them")
    served_digest: Sha256 = Field(description="of those in the model's own input")
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
    metrics: dict[str, float | int | None] = Field(description="by name: docs/evaluation.md")
    audio: Sha256 | None = Field(default=None, description="of the conversation's WAV")


# Written out, not registered: a reader finds every type of a `parts/` line here.
RECORD_TYPES: dict[str, type[Record]] = {
    "Domain": Domain,
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
