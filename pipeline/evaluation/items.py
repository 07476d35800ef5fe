"""What the models are asked: prompts, and the user's side of each conversation as audio.

    must_not_say: ["what can I get", …]      # lines of the other side, for all items
    topic: [coffee, cup, …]                  # words of the place, for all items
    abstains: ["I don't know", …]            # how one says that one can't tell, for all items
    items:
      - id: angry-marcus-order
        persona_type: angry
        persona: angry-marcus                # of data/personas; left out where it is none of them
        situation: power-cut                 # where it is none of data/scenarios; else left out
        emotion: angry                       # how the character feels
        text_prompt: You are Marcus, …
        weak_prompt: You are an angry customer, Marcus. …       # the same facts, said weakly
        first_speaker: user
        user_turns:
          - Hi, what can I get you?
          - {say: "And your name?", kind: proper-noun, must_say: [Marcus]}
        facts: [{key: name, value: Marcus, says: [Marcus]}]

The user's audio is made once and played to every model, so that what differs between two
conversations is the model. A turn is kept only if its answer pause still fits: a turn without
time to answer it would count as unanswered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field, model_validator

from duplex.base import Emotion, Frozen, Role, Slug, Text
from duplex.characters import Fact
from duplex.datafiles import find_path, read_yaml, validate
from duplex.errors import DataFileError, WorkError
from duplex.frames import FRAME_SAMPLES, frames_covering_samples, frames_covering_seconds

if TYPE_CHECKING:  # planning a run reads the items, and needs no numpy for it
    import numpy as np

    from duplex.metrics import Segment

QuestionKind = Literal[
    "talk", "fact", "proper-noun", "context", "unfulfillable", "unspecified", "rude", "unrelated"
]

LEAD_IN_S = 0.32  # as in the training data
LOUDNESS_DBFS = -24.0  # RMS of each turn, as in the training data


class UserTurn(Frozen):
    """What the user says, and what that is to show. In the file plain text will do for a turn
    that only moves the talk on.

    kind: after the question kinds of Service-Duplex-Bench (PersonaPlex, 2026), seen from a
        character that is served:
        `talk`           moves the talk on
        `fact`           asks for something that the prompt says
        `proper-noun`    asks for a name that the prompt or the user has said
        `context`        is understood only with what was said in an earlier turn
        `unfulfillable`  wants what the prompt rules out; to be declined
        `unspecified`    asks what nobody has said; not to be made up
        `rude`           provokes; the character stays itself
        `unrelated`      has nothing to do with the place
    must_say: the reply holds one of these wordings, whole words, any case.
    pause_s: silence behind this turn, in place of the protocol's answer pause; a short one lets
        the next turn cut the answer off.
    """

    say: Text
    kind: QuestionKind = "talk"
    must_say: tuple[Text, ...] = ()
    must_not_say: tuple[Text, ...] = ()
    pause_s: Annotated[float, Field(ge=0, le=30)] | None = None


def _as_turn(value: Any) -> Any:
    return {"say": value} if isinstance(value, str) else value


class PlaceWords(Frozen):
    """What tells a reply that is out of role or off topic, and one that says that it can't tell."""

    must_not_say: tuple[Text, ...] = ()
    topic: tuple[Text, ...] = ()
    abstains: tuple[Text, ...] = ()


class EvaluationItem(PlaceWords):
    """One conversation to hold: the prompt, what the user says, what may be recalled, and what
    only the other side says."""

    # A score's id is the item's with a seed and a model's name behind it, and a slug too.
    id: Annotated[Slug, Field(max_length=72)]
    persona_type: Slug
    persona: Slug | None = None
    situation: Slug | None = None
    emotion: Emotion | None = None
    text_prompt: Text
    weak_prompt: Text | None = None
    first_speaker: Role = "user"
    user_turns: tuple[Annotated[UserTurn, BeforeValidator(_as_turn)], ...] = Field(min_length=1)
    facts: tuple[Fact, ...] = ()


class ItemsFile(PlaceWords):
    """Its own words are those of all its items."""

    items: tuple[EvaluationItem, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ids_differ(self) -> ItemsFile:
        ids = [item.id for item in self.items]
        doubled = sorted({key for key in ids if ids.count(key) > 1})
        if doubled:
            raise ValueError(f"each item needs an id of its own, found twice: {', '.join(doubled)}")
        return self


class SpeechEngine(Protocol):
    """What is needed of a speech engine: `samples`, float32 [S] at 24 kHz, of its utterance."""

    def synthesize(self, text: str, params: dict[str, str | int | float]) -> Any: ...


@dataclass(frozen=True)
class SpokenItem:
    """An item with the user's audio: float32 [S], whole frames.

    turns: the frames in which each kept turn is heard; `dropped` counts those left out.
    """

    item: EvaluationItem
    samples: np.ndarray
    turns: tuple[Segment, ...]
    dropped: int

    @property
    def num_frames(self) -> int:
        return len(self.samples) // FRAME_SAMPLES

    @property
    def kept(self) -> tuple[UserTurn, ...]:
        return self.item.user_turns[: len(self.turns)]

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(turn.say for turn in self.kept)


def load_items(path: Path) -> tuple[EvaluationItem, ...]:
    """The items of a YAML file, in its order.

    Raises:
        DataFileError: no file, not YAML, or it breaks the schema; all faults at once.
    """
    found = _read_items(path)
    return tuple(
        item.model_copy(
            update={
                name: (*getattr(found, name), *getattr(item, name))
                for name in PlaceWords.model_fields
            }
        )
        for item in found.items
    )


def load_place_words(paths: Sequence[str]) -> PlaceWords:
    """What each of these files has for all its items, together; raises as `load_items`."""
    files = [_read_items(find_path(name)) for name in paths]
    return PlaceWords(
        **{
            name: tuple(dict.fromkeys(word for file in files for word in getattr(file, name)))
            for name in PlaceWords.model_fields
        }
    )


def _read_items(path: Path) -> ItemsFile:
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise DataFileError(f"{path}: must hold a mapping with `items`, found {type(raw).__name__}")
    found: ItemsFile = validate(ItemsFile, raw, path)
    return found


def load_all_items(paths: Sequence[str]) -> tuple[EvaluationItem, ...]:
    """The items of several files, one after the other.

    Raises:
        DataFileError: as `load_items`; or two files have an item of the same id.
    """
    found: dict[str, str] = {}
    items: list[EvaluationItem] = []
    for name in paths:
        for item in load_items(find_path(name)):
            if item.id in found:
                raise DataFileError(
                    f"each item needs an id of its own, {item.id} is in {found[item.id]} and {name}"
                )
            found[item.id] = name
            items.append(item)
    return tuple(items)


def speak_item(
    item: EvaluationItem,
    engine: SpeechEngine,
    params: dict[str, str | int | float],
    *,
    seconds: float,
    answer_s: float,
) -> SpokenItem:
    """The user's side: lead-in, then each turn and its pause; `seconds` at most.

    When the agent speaks first, the lead-in is a pause of `answer_s` too. Turns whose pause
    would end after `seconds` are left out, with all that follow; the report says how many, and
    there may be no turn left. The audio ends with the last pause, which is `answer_s` and more.

    Raises:
        WorkError: the engine made no audible speech of a turn.
    """
    import numpy as np

    from duplex.metrics import Segment
    from duplex.mixing import normalize_loudness

    num_frames = frames_covering_seconds(seconds)
    pause = frames_covering_seconds(answer_s)
    cursor = frames_covering_seconds(LEAD_IN_S)
    if item.first_speaker == "agent":
        cursor = max(cursor, pause)
    samples = np.zeros(num_frames * FRAME_SAMPLES, dtype=np.float32)
    turns: list[Segment] = []
    end = cursor
    for turn in item.user_turns:
        speech = audible_part(engine.synthesize(turn.say, params).samples)
        if len(speech) == 0:
            raise WorkError(f"{item.id}: the turn {turn.say!r} must be audible, found no speech.")
        speech = normalize_loudness(speech, LOUDNESS_DBFS)
        length = frames_covering_samples(len(speech))
        own = pause if turn.pause_s is None else frames_covering_seconds(turn.pause_s)
        if cursor + length + max(own, pause) > num_frames:
            break
        start = cursor * FRAME_SAMPLES
        samples[start : start + len(speech)] = speech
        turns.append(Segment(cursor, cursor + length))
        end = cursor + length + max(own, pause)
        cursor += length + own
    samples = samples[: end * FRAME_SAMPLES] if turns else samples
    return SpokenItem(item, samples, tuple(turns), len(item.user_turns) - len(turns))


def audible_part(samples: np.ndarray) -> np.ndarray:
    """Float [S] without the silent frames before and after the speech; empty without speech.

    What an engine leaves silent there would count as time to answer.
    """
    from duplex.metrics import segments, speech_activity
    from duplex.mixing import normalize_loudness

    if not samples.any():
        return samples[:0]
    heard = segments(speech_activity(normalize_loudness(samples, LOUDNESS_DBFS)))
    if not heard:
        return samples[:0]
    return samples[heard[0].start * FRAME_SAMPLES : heard[-1].end * FRAME_SAMPLES]
