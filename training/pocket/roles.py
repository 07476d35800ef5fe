"""The grammar of the pocket base: who the agent is, what it knows, what is asked and answered.

Read from data/pocket/base/*.yaml. A template's `{slot}` is filled from `slots`, from the role
(`kind`, `a_kind`, `title`, `a_title`, `good`) or, for `company`, from both.

Held out of training are, for each slot with eight values or more, about one value in eight by its
hash, and every wording that the file marks with `~`. A set is chosen by `Side`: training draws from
`train` alone, the probe from both.
"""

from __future__ import annotations

import hashlib
import string
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field

from duplex.base import Emotion, Frozen, canonical_json
from duplex.datafiles import CHECKOUT, read_yaml, validate
from duplex.errors import DataFileError

GRAMMAR_FOLDER = CHECKOUT / "data" / "pocket" / "base"
HELD_OUT_MARK = "~"
HELD_OUT_ONE_IN = 8
Scope = Literal["business", "personal"]
Side = Literal["train", "held"]
ROLE_SLOTS = frozenset({"kind", "a_kind", "title", "a_title", "good", "company", "who"})
_SOUNDS_LIKE_YOU = ("used ", "uni", "euro")


class Business(Frozen):
    """A place with somebody who answers. goods: in the singular, without an article."""

    kind: str
    title: str
    suffix: str
    goods: tuple[str, ...] = Field(min_length=4)


class Topic(Frozen):
    """A fact that a prompt may hold. `slot` is what an answer must name; `good` says that the
    fact is of one of the role's goods."""

    scope: Literal["business", "personal", "any"]
    slot: str
    good: bool = False
    fact: tuple[str, ...] = ()
    ask: tuple[str, ...] = Field(min_length=3)
    answer: tuple[str, ...] = Field(min_length=2)


class Mood(Frozen):
    """How the agent feels: its sentence in the prompt, what it starts answers with."""

    emotion: Emotion
    weight: int = Field(ge=1)
    prompt: tuple[str, ...]
    opener: tuple[str, ...]
    feeling: tuple[str, ...]


class Pair(Frozen):
    """Something the user says, and what the agent says to that."""

    user: tuple[str, ...]
    agent: tuple[str, ...]


class Greet(Frozen):
    user: tuple[str, ...]
    reply: tuple[str, ...]


class Story(Frozen):
    lines: tuple[str, ...]
    reaction: tuple[str, ...]


class Talk(Frozen):
    """The content of talk.yaml."""

    topics: dict[str, Topic]
    heads: dict[Scope, tuple[str, ...]]
    moods: dict[str, Mood]
    greeting: dict[Scope, tuple[str, ...]]
    greet: Greet
    refusal: tuple[str, ...]
    feeling: tuple[str, ...]
    small: dict[str, Pair]
    bye: Pair
    story: dict[str, Story]
    extra: dict[Scope, tuple[str, ...]]
    cut: tuple[str, ...]
    after_cut: tuple[str, ...]
    listening: tuple[str, ...]


class Roles(Frozen):
    """The content of roles.yaml."""

    businesses: dict[str, Business]
    personal: dict[str, str]


@dataclass(frozen=True)
class Grammar:
    """Everything that is drawn from. `slots` hold `name` too: both lists of names."""

    slots: dict[str, tuple[str, ...]]
    roles: Roles
    talk: Talk

    def values(self, slot: str, side: Side) -> tuple[str, ...]:
        """Values of a slot on one side of the split; all of them on both where there are
        few, or none is held out."""
        if slot == "name":
            return (*self.values("female", side), *self.values("male", side))
        every = self.slots[slot]
        if len(every) < HELD_OUT_ONE_IN:
            return every
        held = tuple(v for v in every if side_of(v) == "held")
        if not held or side == "train":
            return tuple(v for v in every if v not in held)
        return held

    @cached_property
    def digest(self) -> str:
        """sha256 of all that the files hold."""
        content = [self.slots, self.roles.model_dump(), self.talk.model_dump(mode="json")]
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()

    @property
    def role_ids(self) -> tuple[str, ...]:
        return (*self.roles.businesses, *self.roles.personal)

    def scope_of(self, role: str) -> Scope:
        return "business" if role in self.roles.businesses else "personal"

    def topics_of(self, role: str) -> tuple[str, ...]:
        """Ids of the topics that a role can know about."""
        scope = self.scope_of(role)
        return tuple(
            name for name, topic in self.talk.topics.items() if topic.scope in ("any", scope)
        )


def side_of(value: str) -> Side:
    """The side of the split that a value is on, whatever other values there are."""
    digest = hashlib.sha256(value.encode()).digest()  # the same in every slot
    return "held" if digest[0] % HELD_OUT_ONE_IN == 0 else "train"


def wordings(templates: tuple[str, ...], side: Side) -> tuple[str, ...]:
    """The templates of one side; where none is marked, all of them on both."""
    marked = tuple(t.removeprefix(HELD_OUT_MARK) for t in templates if t[:1] == HELD_OUT_MARK)
    plain = tuple(t for t in templates if t[:1] != HELD_OUT_MARK)
    return marked if side == "held" and marked else plain


def slots_in(template: str) -> tuple[str, ...]:
    """Names of the slots of a template, in order."""
    return tuple(name for _, name, _, _ in string.Formatter().parse(template) if name)


def filled(template: str, values: dict[str, str]) -> str:
    """A template with its slots filled, and the first letter of each sentence a capital.

    Raises:
        KeyError: a slot without a value.
    """
    text = template.format_map(values).strip()
    for mark in (". ", "? ", "! ", ": "):
        text = mark.join(part[:1].upper() + part[1:] for part in text.split(mark))
    return text


def with_article(noun: str) -> str:
    """`a lamp`, `an oven`, `a used phone`."""
    vowel = noun[0] in "aeio" or (noun[0] == "u" and not noun.startswith(_SOUNDS_LIKE_YOU))
    return f"{'an' if vowel else 'a'} {noun}"


def load_grammar(folder: Path = GRAMMAR_FOLDER) -> Grammar:
    """The grammar of a folder's slots.yaml, roles.yaml and talk.yaml, checked together.

    Raises:
        DataFileError: a file that breaks its schema, or a template with a slot that nothing fills.
    """
    slots = {name: tuple(values) for name, values in read_yaml(folder / "slots.yaml").items()}
    slots["name"] = (*slots["female"], *slots["male"])
    roles: Roles = validate(Roles, read_yaml(folder / "roles.yaml"), folder / "roles.yaml")
    talk: Talk = validate(Talk, read_yaml(folder / "talk.yaml"), folder / "talk.yaml")
    faults = list(_faults(slots, talk))
    if faults:
        raise DataFileError(f"{folder / 'talk.yaml'}: {'; '.join(faults)}")
    return Grammar(slots, roles, talk)


def _faults(slots: dict[str, tuple[str, ...]], talk: Talk):
    known = {*slots, *ROLE_SLOTS}
    for name, topic in talk.topics.items():
        if topic.slot not in known:
            yield f"topics.{name}.slot must be a slot, found {topic.slot}"
        allowed = {topic.slot, "good"} if topic.good else {topic.slot}
        for part in ("fact", "ask", "answer"):
            for template in getattr(topic, part):
                foreign = [slot for slot in slots_in(template) if slot not in allowed]
                if foreign:
                    yield f"topics.{name}.{part} must use {sorted(allowed)}, found {foreign}"
        for template in (*topic.fact, *topic.answer):
            if topic.slot not in slots_in(template):
                yield f"topics.{name} must name its {topic.slot}, found {template!r}"
    for scope, heads in talk.heads.items():
        for head in heads:
            if "facts" not in slots_in(head):
                yield f"heads.{scope} must have {{facts}}, found {head!r}"
