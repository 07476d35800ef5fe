"""Where a persona's speech pattern fits into a turn.

The form of a pattern says where it goes: `Oh dear,` before the turn, `, I think` before the
last mark of its first full sentence, and a sentence of its own after the turn.
"""

from __future__ import annotations

import random
import re
from collections import Counter

from duplex.characters import Persona

SHARE = 0.4  # of the customer's turns carry a pattern

_MERRY = frozenset({"friendly", "enthusiast"})
# Nobody says "oh, lovely" before a complaint or an allergy.
_GRAVE = frozenset(
    {
        "describe-problem",
        "restate-order",
        "give-allergy",
        "ask-ingredients",
        "answer-food",
        "judge-drink",
        "pay",
    }
)
# A sentence after the turn comments on something: it fits where the customer reacts.
_REACTIONS = frozenset(
    {
        "greet-back",
        "mind-wait",
        "confirm-usual",
        "check-pickup",
        "confirm-order",
        "order-for-others",
        "confirm-group",
        "answer-tray",
        "answer-here",
        "accept-ingredients",
        "react-price",
        "pay",
        "react-wait",
        "answer-chat",
        "follow-remark",
        "check-cup",
        "accept-remake",
        "restate-order",
    }
)
# A tail softens or sharpens a request or an answer; after thanks or a goodbye it is odd.
_TAILED = frozenset(
    {
        "mind-wait",
        "give-pickup",
        "confirm-usual",
        "ask-board",
        "ask-still-open",
        "describe-problem",
        "restate-order",
        "give-order",
        "confirm-order",
        "order-for-others",
        "answer-food",
        "give-allergy",
        "ask-ingredients",
        "ask-drink",
        "give-name",
        "ask-price",
        "react-price",
        "ask-wait",
        "react-wait",
        "answer-chat",
        "remark",
        "say-first-visit",
    }
)
# Doubt in a name or an allergy would be doubt in a fact.
_FIRM = frozenset({"give-name", "give-pickup", "give-allergy"})
_DOUBTFUL = frozenset({"nervous", "indecisive"})
_MAX_USES = 3  # of one pattern in one conversation
_GREETING = re.compile(r"^(?:Oh|Um|Sorry|Hi|Hey|Well|Hm)(?:, |\. )")
_MIN_SENTENCE_WORDS = 3


class PatternPicker:
    """Spreads the patterns of one persona over one conversation."""

    def __init__(self, persona: Persona, rng: random.Random):
        self._persona = persona
        self._rng = rng
        self._counts: Counter[str] = Counter()
        # Words that keep their capital when a pattern goes before them.
        self._proper = {
            word for fact in persona.facts for word in re.findall(r"\b[A-Z]\w*", fact.value)
        }

    @property
    def any_used(self) -> bool:
        return bool(self._counts)

    def add(self, text: str, intents: list[str], *, must: bool = False) -> str:
        """`text` with a pattern that fits a turn of these intents, or as it is.

        `must` takes the first pattern that fits whatever the draw, for a conversation that
        would end without any.
        """
        if intents[-1] == "farewell-back" or (not must and self._rng.random() > SHARE):
            return text
        fitting = [
            pattern
            for pattern in self._persona.speech_patterns
            if self._fits(pattern, intents) and self._counts[pattern] < _MAX_USES
        ]
        if not fitting:
            return text
        least = min(self._counts[pattern] for pattern in fitting)
        pattern = self._rng.choice([p for p in fitting if self._counts[p] == least])
        self._counts[pattern] += 1
        return self._put(pattern, text, intents[0])

    def add_anywhere(self, text: str) -> str:
        """For a persona none of whose patterns fitted any turn."""
        pattern = self._rng.choice(self._persona.speech_patterns)
        self._counts[pattern] += 1
        return self._put(pattern, text, "")

    def _fits(self, pattern: str, intents: list[str]) -> bool:
        kind, first = self._persona.type, intents[0]
        if pattern.endswith(","):
            return not (kind in _MERRY and first in _GRAVE)
        if pattern.startswith(","):
            if kind in _MERRY and first.startswith("ask-"):
                return False
            return first in _TAILED and not (kind in _DOUBTFUL and first in _FIRM)
        return intents[-1] in _REACTIONS

    def _put(self, pattern: str, text: str, intent: str) -> str:
        if pattern.endswith(","):
            return f"{pattern} {self._after_opener(pattern, text)}"
        if pattern.startswith(","):
            is_request = intent == "give-order" or intent.startswith("ask-")
            return _with_tail(pattern, text, after_question=is_request)
        return f"{text} {pattern if pattern[-1] in '.!?' else pattern + '.'}"

    def _after_opener(self, opener: str, text: str) -> str:
        greeting = _GREETING.match(text)
        # "Um, sorry, um, yes" is one um too many.
        if greeting and len(text) > len(greeting[0]) + 8:
            word = greeting[0].strip(" ,.").lower()
            if word in re.findall(r"\w+", opener.lower()):
                text = text[len(greeting[0]) :]
        first = re.split(r"[^\w']", text, maxsplit=1)[0]
        if first == "I" or first.startswith("I'") or first in self._proper:
            return text
        return text[0].lower() + text[1:]


def _with_tail(tail: str, text: str, *, after_question: bool) -> str:
    """`text` with the tail in its first full sentence; in a statement, where there is one,
    unless `after_question` says that the question is the request."""
    sentences = re.findall(r"[^.?!]+[.?!]+", text)
    full = [i for i, s in enumerate(sentences) if len(s.split()) >= _MIN_SENTENCE_WORDS]
    stated = [i for i in full if not sentences[i].endswith("?")]
    target = next(iter((full if after_question else stated) or full), len(sentences) - 1)
    sentence = sentences[target]
    mark = re.search(r"[.?!]+$", sentence)
    if mark is None:
        return text
    sentences[target] = f"{sentence[: mark.start()]}{tail}{mark[0]}"
    return "".join(sentences)
