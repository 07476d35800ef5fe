"""What a text says, as words: facts told, runs shared, numbers, writing systems. Pure.

Words are compared in lower case, without punctuation, as `duplex/words.py` finds them.
Nothing here understands a sentence: each function says what it counts.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from duplex.characters import Persona
from duplex.records import Turn
from duplex.words import has_words, plain, without_words
from duplex.words import words_of as words

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBERS = {word: value for value, word in enumerate(ONES)} | {
    word: 10 * value for value, word in enumerate(TENS, start=2)
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
NUMBER_WORDS = frozenset({*_NUMBERS, *_SCALES})

# Writing system of a language, by how Unicode names its letters; others are Latin.
_SCRIPTS: dict[str, tuple[str, ...]] = {
    "ja": ("HIRAGANA", "KATAKANA", "CJK", "IDEOGRAPHIC"),
    "zh": ("CJK", "IDEOGRAPHIC"),
    "ko": ("HANGUL", "CJK"),
    "hi": ("DEVANAGARI",),
    "mr": ("DEVANAGARI",),
    "ne": ("DEVANAGARI",),
    "ta": ("TAMIL",),
    "te": ("TELUGU",),
    "kn": ("KANNADA",),
    "ml": ("MALAYALAM",),
    "bn": ("BENGALI",),
    "ru": ("CYRILLIC",),
    "uk": ("CYRILLIC",),
    "bg": ("CYRILLIC",),
    "el": ("GREEK",),
    "ar": ("ARABIC",),
    "fa": ("ARABIC",),
    "he": ("HEBREW",),
    "th": ("THAI",),
}


def spoken(turn: Turn) -> str:
    """What is heard of a turn: the words before the cut."""
    if turn.cut_after_words is None:
        return turn.text
    return " ".join(turn.text.split()[: turn.cut_after_words])


def said_by(turns: Iterable[Turn], role: str) -> str:
    return " ".join(spoken(turn) for turn in turns if turn.role == role)


def has_phrase(text: str, phrase: str) -> bool:
    """As `has_words`, whatever the punctuation: `Come on,` is in `oh come on`."""
    return f" {' '.join(words(phrase))} " in f" {' '.join(words(text))} "


def facts_told(persona: Persona, text: str) -> set[str]:
    """Keys of the facts of which `text` holds a wording that counts."""
    return {
        fact.key for fact in persona.facts if any(has_words(text, wording) for wording in fact.says)
    }


def patterns_used(persona: Persona, text: str) -> set[str]:
    return {pattern for pattern in persona.speech_patterns if has_phrase(text, pattern)}


def without_facts(persona: Persona, text: str) -> str:
    """`text` less the wordings of the facts."""
    for fact in persona.facts:
        for wording in sorted((*fact.says, fact.value), key=len, reverse=True):
            text = without_words(text, wording)
    return text


def shingles(text: str, size: int = 3) -> set[str]:
    """All runs of `size` words; a shorter text is one run."""
    found = words(text)
    if len(found) <= size:
        return {" ".join(found)} if found else set()
    return {" ".join(found[i : i + size]) for i in range(len(found) - size + 1)}


def distinct_share(texts: Iterable[str], size: int) -> float:
    """distinct-n: different runs of `size` words over all such runs; 0 without any.

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function", arXiv:1510.03055.
    """
    total, different = 0, set[tuple[str, ...]]()
    for text in texts:
        found = words(text)
        runs = [tuple(found[i : i + size]) for i in range(len(found) - size + 1)]
        total += len(runs)
        different.update(runs)
    return len(different) / total if total else 0.0


def longest_run(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """The longest row of words that both hold, in order and without a gap. O(len x len)."""
    best, end = 0, 0
    above = [0] * (len(other) + 1)
    for index, word in enumerate(one):
        row = [0] * (len(other) + 1)
        for column, candidate in enumerate(other):
            if word == candidate:
                row[column + 1] = above[column] + 1
                if row[column + 1] > best:
                    best, end = row[column + 1], index + 1
        above = row
    return list(one[end - best : end])


def number(spelled: Sequence[str]) -> int | None:
    """`["twenty", "five"]` -> 25; None for what is no number in English words."""
    total, current, seen = 0, 0, False
    for word in spelled:
        if word == "and" and seen:
            continue
        if word in _NUMBERS:
            current += _NUMBERS[word]
        elif word in _SCALES:
            current = max(current, 1) * _SCALES[word]
            if word != "hundred":
                total, current = total + current, 0
        else:
            return None
        seen = True
    return total + current if seen else None


def foreign_letters(text: str, language: str) -> str:
    """The letters that are not of the language's writing system.

    Where that is not Latin, Latin letters may stand in it (names, brands) up to half of all.
    """
    own = _SCRIPTS.get(language, ("LATIN",))
    letters = [c for c in plain(text) if c.isalpha() and not (c.isascii() and own == ("LATIN",))]
    foreign = [c for c in letters if not unicodedata.name(c, "").startswith(own)]
    if own != ("LATIN",):
        latin = [c for c in foreign if unicodedata.name(c, "").startswith("LATIN")]
        if 2 * len(latin) <= len(letters):
            foreign = [c for c in foreign if c not in latin]
    return "".join(foreign)
