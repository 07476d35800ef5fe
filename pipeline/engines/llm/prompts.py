"""What a system prompt that is written for an existing dialogue must show. Pure.

It speaks to the character ("You are NAME, …"), has its level's length, and says nothing that the
dialogue does not: each name and each number in it occurs there. Names are told by their capitals
within a sentence, so one at the start of a sentence is not seen, and none is in languages that
write all nouns so; the second person is told in English alone.
"""

from __future__ import annotations

import re

from duplex.characters import Domain
from duplex.records import Dialogue
from duplex.wording import NUMBER_WORDS, ONES, TENS
from duplex.words import CHARACTERS_A_WORD, UNSPACED, plain, written_words

LEVELS: dict[str, tuple[int, int]] = {"brief": (6, 30), "standard": (25, 75), "detailed": (60, 160)}

_SECOND = re.compile(r"^(?:you|your)\b", re.IGNORECASE)
_FIRST = re.compile(r"\b(?:I|my|mine|myself)\b(?!\s*[.\"\N{RIGHT DOUBLE QUOTATION MARK}])")
_QUOTED = re.compile(r"[\"\N{LEFT DOUBLE QUOTATION MARK}][^\"\N{RIGHT DOUBLE QUOTATION MARK}]*.")
_NOUNS_CAPITAL = frozenset({"de", "lb"})
_NUMBER_WORDS = NUMBER_WORDS - {"one"}


def prompt_fault(level: str, text: str, dialogue: Dialogue, domain: Domain) -> str | None:
    """What is wrong with a prompt of a level; None: nothing that can be seen here."""
    low, high = LEVELS[level]
    count = _count_words(text, domain.language)
    if not low <= count <= high:
        return f"the {level} prompt must have {low} to {high} words, found {count}"
    if dialogue.persona_name.lower() not in text.lower():
        return f"the {level} prompt must give the name {dialogue.persona_name}"
    if domain.language == "en":
        if not _SECOND.match(text):
            return f'the {level} prompt must begin with "You" or "Your", found {text:.30}'
        if match := _FIRST.search(_QUOTED.sub("", text)):
            return f"the {level} prompt must say you, not {match[0]}"
    known = _known(dialogue, domain)
    if domain.language not in _NOUNS_CAPITAL:
        for name in _names(text):
            if name.lower() not in known:
                return f"the {level} prompt names {name}, which nobody says in the dialogue"
    for number in _numbers(text):
        if number not in known and _other_form(number) not in known:
            return f"the {level} prompt says {number}, which nobody says in the dialogue"
    return None


def _count_words(text: str, language: str) -> int:
    if language in UNSPACED:
        return len("".join(text.split())) // CHARACTERS_A_WORD
    return len(text.split())


def _words(text: str) -> list[str]:
    return [word.removesuffix("'s") for word in written_words(plain(text))]


def _known(dialogue: Dialogue, domain: Domain) -> set[str]:
    """All words that the prompt may take its names and numbers from, in lower case."""
    texts = [turn.text for turn in dialogue.turns]
    texts += [dialogue.persona_name, domain.place, domain.title]
    return {word.lower() for text in texts for word in _words(text)} | {"i"}


def _names(text: str) -> list[str]:
    """Capitalised words that do not begin a sentence."""
    found = []
    for sentence in re.split(r"(?<=[.!?:;])[\"']?\s+|\n+", text):
        words = _words(re.sub(r"[\"\N{LEFT DOUBLE QUOTATION MARK}]\w+", " ", sentence))
        found += [word for word in words[1:] if word[0].isupper() and not word[0].isdigit()]
    return found


def _numbers(text: str) -> list[str]:
    return [
        word for word in (word.lower() for word in _words(text.replace("-", " ")))
        if word.isdigit() or word in _NUMBER_WORDS
    ]  # fmt: skip


def _other_form(number: str) -> str:
    """`5` for five and five for `5`, as far as twenty and the tens."""
    if number.isdigit():
        value = int(number) if len(number) < 4 else -1
        if 0 <= value < len(ONES):
            return ONES[value]
        return TENS[value // 10 - 2] if 20 <= value < 100 and value % 10 == 0 else number
    if number in ONES:
        return str(ONES.index(number))
    return str(10 * (TENS.index(number) + 2)) if number in TENS else number
