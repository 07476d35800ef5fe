"""Whether a candidate has the form of a dialogue that can be spoken: roles, lengths, signs. Pure.

Each check takes what is `Seen` and returns what is wrong, or None. The list of all checks, with
their codes, is in `duplex/dialogue_checks.py`.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from itertools import pairwise

from duplex.characters import Domain, Persona, Scenario
from duplex.records import Turn
from duplex.wording import foreign_letters, spoken, words

MAX_TURN_WORDS = 70  # some 25 s of speech
MAX_TURN_CHARACTERS = 450  # the same for languages that put no space between words
MAX_BACKCHANNEL_WORDS = 4
MAX_SHARE = 0.85  # of all words, one side's
MIN_WORDS_FOR_SHARE = 40


@dataclass(frozen=True)
class Seen:
    """What a check may look at."""

    persona: Persona
    scenario: Scenario
    domain: Domain
    turns: tuple[Turn, ...]
    min_turns: int
    max_turns: int
    min_facts: int
    min_patterns: int

    def texts(self) -> list[tuple[int, str]]:
        """Everything that is to be spoken, with the number of its turn."""
        rows = [(number, turn.text) for number, turn in enumerate(self.turns)]
        return rows + [(n, b.text) for n, turn in enumerate(self.turns) for b in turn.backchannels]


# -- roles


def unknown_role(seen: Seen) -> str | None:
    for number, turn in enumerate(seen.turns):
        if turn.role not in ("agent", "user"):
            return f"turn {number} is spoken by {turn.role!r}, not by agent or user"
    return None


def first_speaker(seen: Seen) -> str | None:
    wanted = seen.scenario.first_speaker
    if seen.turns and seen.turns[0].role in ("agent", "user") and seen.turns[0].role != wanted:
        return f"the first turn must be spoken by {wanted}, found {seen.turns[0].role}"
    return None


def same_role_twice(seen: Seen) -> str | None:
    for number, (before, after) in enumerate(pairwise(seen.turns)):
        if before.role == after.role:
            return f"turns {number} and {number + 1} are both spoken by {after.role}"
    return None


# -- lengths


def too_few_turns(seen: Seen) -> str | None:
    count = len(seen.turns)
    return f"at least {seen.min_turns} turns, found {count}" if count < seen.min_turns else None


def too_many_turns(seen: Seen) -> str | None:
    count = len(seen.turns)
    return f"at most {seen.max_turns} turns, found {count}" if count > seen.max_turns else None


def empty_turn(seen: Seen) -> str | None:
    for number, text in seen.texts():
        if not words(text):
            return f"turn {number} has no word in it: {text!r}"
    for number, turn in enumerate(seen.turns):
        if not words(spoken(turn)):
            return f"turn {number} is cut before its first word"
    return None


def long_turn(seen: Seen) -> str | None:
    for number, turn in enumerate(seen.turns):
        count = len(turn.text.split())
        if count > MAX_TURN_WORDS or len(turn.text) > MAX_TURN_CHARACTERS:
            return (
                f"turn {number} is a speech of {count} words and {len(turn.text)} characters, "
                f"at most {MAX_TURN_WORDS} and {MAX_TURN_CHARACTERS} are one turn"
            )
        for backchannel in turn.backchannels:
            if len(backchannel.text.split()) > MAX_BACKCHANNEL_WORDS:
                return f"turn {number}: a backchannel is no turn, found {backchannel.text!r}"
    return None


def one_sided(seen: Seen) -> str | None:
    counts = {"agent": 0, "user": 0}
    for turn in seen.turns:
        counts[turn.role] = counts.get(turn.role, 0) + len(spoken(turn).split())
    total = sum(counts.values())
    role = max(counts, key=lambda key: counts[key])
    if total >= MIN_WORDS_FOR_SHARE and counts[role] > MAX_SHARE * total:
        return f"{role} says {counts[role]} of {total} words, at most {MAX_SHARE:.0%} are its share"
    return None


def cut_at_the_end(seen: Seen) -> str | None:
    if seen.turns and seen.turns[-1].cut_after_words:
        return "the last turn is cut, and nobody is left to cut in"
    return None


# -- signs

_URL = re.compile(
    r"\bhttps?://\S*|\bwww\.\S+|\b[\w.]+@[\w.]+\.\w+|\b[\w-]+\.(?:com|org|net|io)\b", re.IGNORECASE
)
_STAGE = re.compile(r"(?<!\*)\*(?!\*)[^*]+\*|\[[^\]]*\]|\([^)]*\)")
_MARKUP = re.compile(r"[*_#<>\[\]{}()|\\/^~=@$%&+\n\r\t`\N{EURO SIGN}\N{POUND SIGN}]")
_DIGIT = re.compile(r"\d")


def _stripped(text: str) -> str:
    """Without what `url` and `stage_direction` find, so that each fault has one code."""
    return _STAGE.sub(" ", _URL.sub(" ", text))


def url(seen: Seen) -> str | None:
    for number, text in seen.texts():
        if match := _URL.search(text):
            return f"turn {number} holds an address: {match[0]!r}"
    return None


def stage_direction(seen: Seen) -> str | None:
    for number, text in seen.texts():
        if match := _STAGE.search(_URL.sub(" ", text)):
            return f"turn {number} holds a stage direction: {match[0]!r}"
    return None


def markup(seen: Seen) -> str | None:
    for number, text in seen.texts():
        if match := _MARKUP.search(_stripped(text)):
            return f"turn {number} holds {match[0]!r}, which nobody says: {text!r}"
    return None


def digits(seen: Seen) -> str | None:
    for number, text in seen.texts():
        if _DIGIT.search(_stripped(text)):
            return f"turn {number} holds digits, numbers are written in words: {text!r}"
    return None


def emoji(seen: Seen) -> str | None:
    for number, text in seen.texts():
        for sign in text if not text.isascii() else "":
            if unicodedata.category(sign) in ("So", "Sk", "Cs", "Co") and sign not in "^`":
                return f"turn {number} holds {sign!r}, which nobody says"
    return None


def foreign_script(seen: Seen) -> str | None:
    for number, text in seen.texts():
        if letters := foreign_letters(text, seen.persona.language):
            return (
                f"turn {number} has letters that are not of {seen.persona.language}: "
                f"{letters[:12]!r}"
            )
    return None
