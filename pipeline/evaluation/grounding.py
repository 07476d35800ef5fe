"""What a reply names that nobody gave it: numbers and names of neither prompt nor user. Pure.

    numbers   in words or digits, "twenty five" as 25, "half past six" as 6; "one" and "once" by
              themselves are seldom numbers and never count
    names     words with a capital that begin no sentence, other than I, days, months and what often
              begins one (yes, well), where the stop before it is missing

A detail counts as given if the prompt or any user turn so far holds it. Sums are not worked out: an
agent that adds two prices up has invented a number. Spoken text has no quotes and few capitals, so
names are found as far as the model writes them with one.

How often that is wrong on conversations without a fault is measured by
`python -m benchmarks.grounding` (docs/results/grounding.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from duplex.words import words_of

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_DAYS = "monday tuesday wednesday thursday friday saturday sunday"
_MONTHS = "january february march april may june july august september october november december"
_OPENERS = "yes no oh well please thanks thank sorry hi hello hey um and but so ok okay"
_VALUES = {word: value for value, word in enumerate(_ONES.split())} | {
    word: 20 + 10 * place for place, word in enumerate(_TENS.split())
}
_NO_NAMES = {"i", *_OPENERS.split(), *_DAYS.split(), *_MONTHS.split()}


def numbers_in(text: str) -> set[int]:
    """The numbers that a text names."""
    found: set[int] = set()
    words = words_of(text)
    place = 0
    while place < len(words):
        if words[place].isdecimal():
            found.add(int(words[place]))
            place += 1
            continue
        value, place = _spoken(words, place)
        if value is not None:
            found.add(value)
    return found


def _spoken(words: list[str], place: int) -> tuple[int | None, int]:
    """The number that begins at `place`, and the place behind it."""
    start, total = place, 0
    while place < len(words) and words[place] in _VALUES:
        value = _VALUES[words[place]]
        behind_hundred = total >= 100 and total % 100 == 0
        behind_tens = total % 100 >= 20 and total % 10 == 0 and 0 < value < 10
        if place > start and not (behind_hundred or behind_tens):
            break  # "two three" are two numbers
        total += value
        place += 1
        if place < len(words) and words[place] == "hundred":
            total *= 100
            place += 1
            if place < len(words) and words[place] == "and":
                place += 1
    if place == start:
        return None, place + 1
    is_pronoun = words[start:place] == ["one"]
    return (None if is_pronoun else total), place


def names_in(text: str) -> set[str]:
    """Words with a capital in the middle of a sentence, in lower case."""
    found: set[str] = set()
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        for word in re.findall(r"[A-Za-z][\w']*", sentence)[1:]:
            is_i = word[:2].lower() == "i'"
            if word[0].isupper() and not is_i and word.lower() not in _NO_NAMES:
                found.add(word.lower().removesuffix("'s"))
    return found


def invented(reply: str, given: Iterable[str]) -> tuple[str, ...]:
    """Details of a reply that none of the `given` texts holds: numbers first, then names."""
    known = " . ".join(given)
    numbers = numbers_in(reply) - numbers_in(known)
    words = {word.removesuffix("'s") for word in words_of(known)}
    names = {name for name in names_in(reply) if name not in words}
    return (*map(str, sorted(numbers)), *sorted(names))
