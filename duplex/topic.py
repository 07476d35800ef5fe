"""Whether a reply has to do with anything that was said, and how that changes over a conversation.
Pure.

    content words  words that are not in `STOPWORDS` and have no apostrophe but a possessive's, each
                   in its normal form; a word counts once
    normal form    case folded; then, one after the other: `'s` off; plural `ies` to `y`, `es` off
                   behind s, x, z, ch, sh, other `s` off unless behind s, u, i; `ing` or `ed` off
                   where three letters with a vowel stay; a doubled last consonant made one, a last
                   `e` off. So stop, stops and stopping are one word, and so are make and making.
                   It is no stemmer: `bought` is not `buy`.
    off topic      a reply of `MIN_CONTENT` content words and more, none of which is in the prompt,
                   in what the user has said so far, or among the words of the topic
    drift          off-topic share of the last third of the replies minus that of the first

It misses a stray reply that shares one word with what was said, and it blames an apt one in new
words. English: other languages have no stopwords here and other endings. How often it blames
replies without a fault, and finds those of another place: `python -m benchmarks.grounding`
(docs/results/grounding.md). Cost: linear in the words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from duplex.metrics import says_any
from duplex.words import words_of

MIN_CONTENT = 4
MIN_DRIFT_REPLIES = 6

# Function words, and words that any talk is full of whatever it is about.
STOPWORDS = frozenset(
    """
    a an the this that these those some any no every each all both either neither another other
    one two ones i you he she it we they me him her us them my your his its our their mine yours
    who whom whose which what where when why how there here then than as so too very just only also
    even still again ever never always am is are was were be been being do does did done doing have
    has had having will would shall should can could may might must not nor or and but if because
    while though of to in on at by for from with without about into over under up down out off
    before after between through yes yeah no okay ok oh well um uh hi hello hey bye please thanks
    thank sorry welcome right sure really quite much many more most bit lot thing get got go going
    come let make know think mean say said see look want like need good great nice fine way now
    """.split()  # noqa: SIM905
)
_VOWELS = frozenset("aeiouy")


def content_words(text: str) -> set[str]:
    """The words of a text that say what it is about, in their normal form."""
    found = set()
    for word in words_of(text):
        bare = word.removesuffix("'s")
        if bare not in STOPWORDS and "'" not in bare:
            found.add(normal_form(bare))
    return found


def normal_form(word: str) -> str:
    """One form for the forms of a word; see the head of this file."""
    word = word.casefold().removesuffix("'s")
    if word.endswith("ies") and len(word) > 4:
        word = word[:-3] + "y"
    elif word.endswith(("ses", "xes", "zes", "ches", "shes")):
        word = word[:-2]
    elif word.endswith("s") and len(word) > 3 and word[-2] not in "sui":
        word = word[:-1]
    for ending in ("ing", "ed"):
        rest = word.removesuffix(ending)
        if rest != word and len(rest) >= 3 and not _VOWELS.isdisjoint(rest):
            word = rest
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in _VOWELS:
        word = word[:-1]
    return word[:-1] if len(word) > 3 and word[-1] == "e" else word


def off_topic(
    reply: str, given: Iterable[str], topic: Sequence[str] = (), least: int = MIN_CONTENT
) -> bool:
    """Whether a reply has nothing to do with what was given.

    Args:
        given: the prompt, and the user's turns up to the reply.
        topic: words of the place, in any form; several in one entry count each.
        least: content words that a reply must have to be judged.
    """
    said = content_words(reply)
    if len(said) < least:
        return False
    return all(said.isdisjoint(content_words(text)) for text in (*given, *topic))


def drift(off: Sequence[bool]) -> float | None:
    """Off-topic share in the last third of the replies minus that in the first, -1 to 1.

    A third is a third of their number rounded down, and the rest stands in the middle. None under
    `MIN_DRIFT_REPLIES` replies.

    Args:
        off: for each reply in order, whether it is off topic.
    """
    if len(off) < MIN_DRIFT_REPLIES:
        return None
    third = len(off) // 3
    return (sum(off[-third:]) - sum(off[:third])) / third


def abstains(reply: str, wordings: Sequence[str]) -> bool:
    """Whether a reply says that it can't tell: it holds one of the wordings (`says_any`)."""
    return says_any(reply, wordings)
