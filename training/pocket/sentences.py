"""Sentences for the codec to hear: all sounds of English in many orders. Seeded, no sense meant.

    corpus      lines of data/pocket/corpus.txt: dialogue, 1 200 different words
    numbers     prices, times, telephone numbers, names and dates in short frames
    words       strings of words of the recogniser's dictionary (CMU, 134 000 words; those of
                4 to 9 letters), a few thousand of them drawn by the seed

One in ten of the corpus's lines and of the drawn words is held out: no training text has it.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pipeline.engines.listening import COMMON
from pipeline.engines.pocket import CORPUS
from pipeline.engines.recogniser import require

DRAWN_WORDS = 4_000
HELD_OUT_OF = 10
FRAMES = (
    "That comes to {price}.",
    "It is {price}, or {price} for two.",
    "We open at {time} and close at {time}.",
    "My number is {digits}.",
    "Call me back on {digits}, please.",
    "Is it {weekday} the {ordinal} of {month}?",
    "My name is {name}, and this is {name}.",
    "Can {name} come on {weekday} at {time}?",
    "{name} needs {number} of them by {weekday}.",
    "Room {number}, on floor {number}!",
    "The reference is {digits}, under {name}.",
    "From {month} to {month} it is {number} a month.",
)
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
LISTS = {
    "name": (
        "Anna Ben Carla David Emma Frank Grace Henry Irene Jack Karen Liam Maya Noah Olivia Paul "
        "Quentin Rachel Steven Tina Ursula Victor Wendy Xavier Yvonne Zoe Brown Clark Jones "
        "Gonzalez Murphy Schmidt Tanaka Okafor Petrov Singh"
    ),
    "weekday": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": (
        "January February March April May June July August September October November December"
    ),
    "ordinal": "first second third fourth fifth sixth ninth tenth twelfth twentieth thirtieth",
}


@dataclass(frozen=True)
class Vocabulary:
    """lines: sentences of the corpus; words: of the dictionary. Neither is in the other split."""

    lines: tuple[str, ...]
    words: tuple[str, ...]


@lru_cache
def load_vocabulary(held_out: bool) -> Vocabulary:
    """
    Raises:
        MissingInputError: pocketsphinx, which brings the dictionary, is not installed.
    """
    require("pocketsphinx", "pocketsphinx", "pip install -e '.[dev]'")
    import pocketsphinx

    corpus = CORPUS.read_text(encoding="utf-8").splitlines()
    lines = [line for line in corpus if line and not line.startswith("<system>")]
    dictionary = Path(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict"))
    entries = (line.partition(" ")[0] for line in dictionary.read_text("utf-8").splitlines())
    words = sorted({word for word in entries if re.fullmatch("[a-z]{4,9}", word)})
    drawn = random.Random(0).sample(words, DRAWN_WORDS)
    return Vocabulary(
        tuple(line for line in lines if _is_held_out(line) is held_out),
        tuple(word for word in drawn if _is_held_out(word) is held_out),
    )


def _is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT_OF == 0


def sentence(
    vocabulary: Vocabulary, rng: random.Random, *, everyday: bool = False, own: bool = True
) -> str:
    """One sentence; `everyday`: of the corpus or with numbers, no strings of words; without `own`
    none of the corpus."""
    kind = rng.random() if own else rng.uniform(0.4, 1)
    if everyday:
        return rng.choice(vocabulary.lines) if kind < 0.6 else _numbers(rng)
    if kind < 0.4:
        return rng.choice(vocabulary.lines)
    return _numbers(rng) if kind < 0.6 else _words(vocabulary, rng)


def _words(vocabulary: Vocabulary, rng: random.Random) -> str:
    common = COMMON.split()
    chosen = [
        rng.choice(vocabulary.words if rng.random() < 0.6 else common)
        for _ in range(rng.randint(3, 12))
    ]
    for place in range(3, len(chosen) - 1):
        if rng.random() < 0.1:
            chosen[place] += ","
    return " ".join(chosen).capitalize() + rng.choice(".....?!")


def _numbers(rng: random.Random) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: _filling(found[1], rng), rng.choice(FRAMES))


def _filling(slot: str, rng: random.Random) -> str:
    if slot in LISTS:
        return rng.choice(LISTS[slot].split())
    if slot == "number":
        return _number(rng)
    if slot == "digits":
        return " ".join(rng.choice(ONES.split()[:10]) for _ in range(rng.randint(4, 8)))
    if slot == "time":
        minutes = rng.choice(("", " thirty", " fifteen", " o'clock"))
        return f"{rng.choice(ONES.split()[1:13])}{minutes}"
    assert slot == "price"
    cents = rng.choice(("", f" and {_number(rng)} cents"))
    return f"{_number(rng)} dollars{cents}"


def _number(rng: random.Random) -> str:
    ones = ONES.split()
    if rng.random() < 0.4:
        return rng.choice(ones)
    hundreds = f"{rng.choice(ones[1:10])} hundred and " if rng.random() < 0.2 else ""
    return f"{hundreds}{rng.choice(TENS.split())} {rng.choice(('', *ones[1:10]))}".strip()
