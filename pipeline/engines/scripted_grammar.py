"""The grammar of the scripted writer: templates with choices and slots.

    (Hi|Hello), I'd like {order}(|, please).

`(a|b|)` is a choice, also within a choice; `{slot}` is filled in. A template can be used when
its slots are open; within a choice only the alternatives whose slots are open are drawn, so
one line serves personas with and without a fact. Source: `data/grammar/*.yaml`.
"""

from __future__ import annotations

import difflib
import hashlib
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from duplex.base import Frozen, Role
from duplex.errors import DataFileError
from duplex.files import parse_yaml
from pipeline.engines.scripted_menu import Menu, load_menu

CUSTOMER_TYPES = ("angry", "nervous", "friendly", "indecisive", "enthusiast")

# Slots that hold something of the customer, and the fact that they tell.
FACT_SLOTS: dict[str, str] = {
    "name": "name",
    "order": "order",
    "drink": "order",
    "drinks": "order",
    "budget": "budget",
    "avoid": "avoid",
    "hurry": "hurry",
    "job": "job",
    "companion": "companion",
    "home": "home",
    "dislike": "dislike",
    "gear": "gear",
    "occasion": "occasion",
    "food": "food",
}
SHOP_SLOTS = frozenset(
    {
        "price",
        "wait",
        "offer",
        "offers",
        "offer_price",
        "new",
        "new_price",
        "parts",
        "others",
        "wrong",
        "alt",
    }
)
_TOKEN = re.compile(r"[()|]|\{[^{}]*\}|[^(){}|]+")

Slots = Mapping[str, str]


@dataclass(frozen=True)
class Slot:
    name: str


@dataclass(frozen=True)
class Choice:
    options: tuple[Sequence, ...]


@dataclass(frozen=True)
class Sequence:
    parts: tuple[str | Slot | Choice, ...]

    def is_open(self, slots: Slots) -> bool:
        """Whether it can be said with these slots."""
        for part in self.parts:
            if isinstance(part, Slot) and part.name not in slots:
                return False
            if isinstance(part, Choice) and not any(o.is_open(slots) for o in part.options):
                return False
        return True

    def say(self, slots: Slots, rng: random.Random, used: set[str]) -> str:
        """The words. The names of the slots that were filled in are added to `used`."""
        words: list[str] = []
        for part in self.parts:
            if isinstance(part, str):
                words.append(part)
            elif isinstance(part, Slot):
                used.add(part.name)
                words.append(slots[part.name])
            else:
                options = [option for option in part.options if option.is_open(slots)]
                words.append(rng.choice(options).say(slots, rng, used))
        return "".join(words)


def parse(template: str) -> Sequence:
    """Raises ValueError for unbalanced brackets and for a slot that nobody fills."""
    tokens = _TOKEN.findall(template)
    if "".join(tokens) != template:
        raise ValueError(f"a brace is not closed in {template!r}")
    sequence, rest = _parse_sequence(tokens)
    if rest:
        raise ValueError(f"brackets must pair, and | must stand within them: {template!r}")
    return sequence


def _parse_sequence(tokens: list[str]) -> tuple[Sequence, list[str]]:
    parts: list[str | Slot | Choice] = []
    while tokens and tokens[0] not in (")", "|"):
        token, tokens = tokens[0], tokens[1:]
        if token == "(":
            options: list[Sequence] = []
            while True:
                option, tokens = _parse_sequence(tokens)
                options.append(option)
                if not tokens:
                    raise ValueError("a bracket is opened and never closed")
                closing, tokens = tokens[0], tokens[1:]
                if closing == ")":
                    break
            parts.append(Choice(tuple(options)))
        elif token.startswith("{"):
            name = token[1:-1]
            known = [*FACT_SLOTS, *sorted(SHOP_SLOTS)]
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {{{near[0]}}}?" if near else f"; known: {', '.join(known)}"
                raise ValueError(f"there is no slot {token}{hint}")
            parts.append(Slot(name))
        else:
            parts.append(token)
    return Sequence(tuple(parts)), tokens


class Exchange(Frozen):
    """Beats that belong together; the fields are explained in `exchanges.yaml`."""

    name: str
    beats: tuple[str, ...] = Field(min_length=1)
    drop: int | None = Field(default=None, ge=1, le=5)
    grow: tuple[tuple[str, ...], ...] = ()
    weight: float = Field(default=1.0, gt=0)
    repeats: int = Field(default=1, ge=1)
    roams: bool = False
    needs: tuple[str, ...] = ()
    not_with: tuple[str, ...] = ()
    tells: tuple[str, ...] = ()

    @property
    def intents(self) -> tuple[str, ...]:
        return tuple(beat.split()[1] for beat in self.beats)


@dataclass(frozen=True)
class Grammar:
    """Everything under `data/grammar`."""

    menu: Menu
    exchanges: tuple[Exchange, ...]
    roles: Mapping[str, Role]  # intent -> who says it
    owners: Mapping[str, Exchange]  # intent -> its exchange
    lines: Mapping[str, Mapping[str, tuple[Sequence, ...]]]  # speaker -> key -> templates

    def topics(self, speaker: str, intent: str) -> list[str]:
        """The cases that a speaker has lines for, in the file's order."""
        return [key.split("/")[1] for key in self.lines[speaker] if key.startswith(f"{intent}/")]


def load_grammar(folder: Path) -> Grammar:
    """Reads and checks the grammar. Raises DataFileError with the file and the line at fault."""
    paths = sorted(folder.glob("*.yaml"))
    wanted = {"menu", "exchanges", "barista", *CUSTOMER_TYPES}
    missing = sorted(wanted - {path.stem for path in paths})
    if missing:
        raise DataFileError(
            f"{folder} must hold a grammar file for each speaker; "
            f"missing: {', '.join(f'{name}.yaml' for name in missing)}"
        )
    exchanges = _load_exchanges(folder / "exchanges.yaml")
    roles: dict[str, Role] = {}
    owners: dict[str, Exchange] = {}
    for exchange in exchanges:
        for beat in exchange.beats:
            role, intent = beat.split()
            roles[intent] = "user" if role == "user" else "agent"
            owners[intent] = exchange
    lines = {
        path.stem: _load_lines(path) for path in paths if path.stem not in ("menu", "exchanges")
    }
    return Grammar(
        menu=load_menu(folder / "menu.yaml"),
        exchanges=exchanges,
        roles=roles,
        owners=owners,
        lines=lines,
    )


def digest_grammar(folder: Path) -> str:
    """The sha256 of the names and bytes of the grammar's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.yaml")):
        # Line ends are a matter of the checkout, not of the grammar.
        data = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _load_exchanges(path: Path) -> tuple[Exchange, ...]:
    data: Any = parse_yaml(path.read_text(encoding="utf-8"))
    try:
        return TypeAdapter(tuple[Exchange, ...]).validate_python(data)
    except ValidationError as error:
        raise DataFileError(f"{path}: {error}") from error


def _load_lines(path: Path) -> dict[str, tuple[Sequence, ...]]:
    data: Any = parse_yaml(path.read_text(encoding="utf-8"))
    lines: dict[str, tuple[Sequence, ...]] = {}
    for key, templates in _flatten(data).items():
        parsed: list[Sequence] = []
        for template in templates:
            if not isinstance(template, str):
                raise DataFileError(
                    f"{path}: {key}: a template must be text, found {template!r}; quote it"
                )
            try:
                parsed.append(parse(template))
            except ValueError as error:
                raise DataFileError(f"{path}: {key}: {error}") from error
        lines[key] = tuple(parsed)
    return lines


def _flatten(data: dict[str, Any]) -> dict[str, list[Any]]:
    """`ack: {pay: […]}` is a shorter way to write `ack/pay: […]`."""
    flat: dict[str, list[Any]] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update({f"{key}/{inner}": templates for inner, templates in value.items()})
        else:
            flat[key] = value
    return flat
