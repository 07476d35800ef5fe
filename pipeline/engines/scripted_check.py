"""Whether what a customer says agrees with the persona's facts. Rules, not understanding.

`contradictions` finds claims of a known form ("my name is …", "I'll have …", "I only have …
dollars", "I'm allergic to …") whose content is not the persona's. It proves that the scripted
grammar keeps to the facts, because the grammar makes its claims in these forms.

`claims` are the rules of the coffee shop for any writer: free speech has irony, second thoughts
and orders for others, so only what is plain counts. It sees only part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from duplex.characters import Fact, Persona
from duplex.records import Turn
from duplex.wording import has_words, spoken
from pipeline.engines.scripted_menu import SIZES, Menu

_NAME = re.compile(r"\b(?:[Mm]y name is|[Mm]y name's|[Cc]all me|under the name) ([A-Z][a-z]+)")
_SHORT_NAME = re.compile(r"\b(?:[Ii]t's|I'm|[Uu]nder|This is) ([A-Z][a-z]+)\b")
_ORDER = re.compile(
    r"\b(?:i'll (?:have|take|stay with|go with)|i'd (?:like|love)|(?:can|could|may) i (?:have|get)|"
    r"i want|i (?:always )?(?:get|drink|order)|i ordered|i asked for|my usual is|for me|give me|"
    r"just)\b([^.?!]*)",
    re.IGNORECASE,
)
_PLAIN_ORDER = re.compile(
    r"\b(?:i'll (?:have|take|go with)|(?:can|could|may) i (?:please )?(?:have|get)|give me|get me|"
    r"i'd like|my usual is|i always (?:get|drink|order))\b([^.?!,;:\N{EM DASH}]*)[^.?!]*",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"\b(?:but|no|not|or|actually|instead|wait|maybe|perhaps|for (?:my|him|her|them|the|a)|if|to|"
    r"than|like last|never|without|was|were|had)\b",
    re.IGNORECASE,
)
_MONEY = re.compile(
    r"\b(?:i (?:only )?(?:have|brought|set aside)|i've (?:only )?got|all of my|"
    r"my (?:own |limit is |budget is )?)\b[^.?!]*?\b([a-z]+(?: [a-z]+)?) (?:dollars|bucks)\b",
    re.IGNORECASE,
)
_ALLERGIC = re.compile(r"\ballergic to ([^.?!,]+)|\b(?:an?|my) ([a-z ]+?) allergy\b", re.IGNORECASE)
_WORK = re.compile(r"\b(?:i work as|i am by trade) ([^.?!,]+)", re.IGNORECASE)
_FROM = re.compile(r"\b(?:I'm from|I am from|I come from|I was born in) ([A-Z][a-z]+)")
_HOME_GEAR = re.compile(r"\bat home (?:with|on) (an? [^.?!,]+)", re.IGNORECASE)

# A fact's key -> what nobody says of whom the fact is true.
_DENIALS: dict[str, re.Pattern[str]] = {
    "allergy": re.compile(
        r"\bno allergies\b|\bnot allergic\b|"
        r"\bi (?:can )?(?:have|eat|drink) (?:anything|everything)\b",
        re.IGNORECASE,
    ),
    "diet": re.compile(r"\bi (?:can )?(?:have|eat|drink) (?:anything|everything)\b", re.IGNORECASE),
    "hurry": re.compile(
        r"\b(?:no rush|no hurry|take your time|not in a (?:hurry|rush)|all the time in the world|"
        r"all day to spare)\b",
        re.IGNORECASE,
    ),
    "companion": re.compile(r"\b(?:just me|on my own|by myself|i'm alone)\b", re.IGNORECASE),
    "occasion": re.compile(r"\b(?:nothing special|a day like any other)\b", re.IGNORECASE),
}


def contradictions(persona: Persona, turns: Iterable[Turn], menu: Menu) -> list[str]:
    """One line for each claim of the customer that is not the persona's."""
    facts = {fact.key: fact for fact in persona.facts}
    found: list[str] = []
    for position, turn in enumerate(turns):
        if turn.role != "agent":
            continue
        for fault in _faults(facts, turn.text, menu):
            found.append(f"turn {position}: {fault}: {turn.text!r}")
    return found


def claims(persona: Persona, turns: Iterable[Turn], menu: Menu) -> list[str]:
    """One line for each plain claim of the customer that is not the persona's."""
    facts = {fact.key: fact for fact in persona.facts}
    found: list[str] = []
    for position, turn in enumerate(turns):
        if turn.role != "agent":
            continue
        text = spoken(turn).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        faults = [*_plain_orders(facts, text, menu), *_avoid_faults(facts, text, menu)]
        faults += [
            f"says {match[1]}, but {key} is {facts[key].value}"
            for key, pattern in (("job", _WORK), ("home", _FROM))
            for match in pattern.finditer(text)
            if key in facts and not any(has_words(match[0], says) for says in facts[key].says)
        ]
        for key in ("allergy", "diet"):
            # "I can eat anything but nuts" denies nothing.
            if key in facts and not any(has_words(text, says) for says in facts[key].says):
                faults += [f"denies {key}"] if _DENIALS[key].search(text) else []
        found += [f"turn {position}: {fault}: {turn.text!r}" for fault in faults]
    return found


def _plain_orders(facts: dict[str, Fact], text: str, menu: Menu) -> Iterable[str]:
    """An order with nothing after it that takes it back, and for nobody else."""
    if "order" not in facts:
        return
    own = facts["order"].value
    for match in _PLAIN_ORDER.finditer(text):
        clause = match[1]
        drink = menu.find_drink(clause)
        if drink is None or drink == menu.find_drink(own) or _TAKEN_BACK.search(match[0]):
            continue
        yield f"orders something other than {own}"


def _faults(facts: dict[str, Fact], text: str, menu: Menu) -> list[str]:
    faults: list[str] = []
    checks: list[Callable[[dict[str, Fact], str, Menu], Iterable[str]]] = [
        _name_faults,
        _order_faults,
        _avoid_faults,
        _plain_faults,
    ]
    for check in checks:
        faults += check(facts, text, menu)
    for key, pattern in _DENIALS.items():
        if key in facts and pattern.search(text):
            faults.append(f"denies {key} ({facts[key].value})")
    return faults


def _name_faults(facts: dict[str, Fact], text: str, menu: Menu) -> Iterable[str]:
    known = {word for fact in facts.values() for word in re.findall(r"[A-Z][a-z]+", fact.value)}
    for match in (*_NAME.finditer(text), *_SHORT_NAME.finditer(text)):
        if "name" in facts and match[1] not in known:
            yield f"gives another name than {facts['name'].value}"


def _order_faults(facts: dict[str, Fact], text: str, menu: Menu) -> Iterable[str]:
    if "order" not in facts:
        return
    own = facts["order"].value
    for match in _ORDER.finditer(text):
        drink = menu.find_drink(match[1])
        if drink is None:
            continue
        sizes = [size for size in SIZES if has_words(match[1], size) and not has_words(own, size)]
        if drink != menu.find_drink(own) or sizes:
            yield f"orders something other than {own}"


def _avoid_faults(facts: dict[str, Fact], text: str, menu: Menu) -> Iterable[str]:
    allergy = facts.get("allergy")
    for match in _ALLERGIC.finditer(text):
        claimed = (match[1] or match[2]).strip()
        if allergy is None:
            yield f"claims an allergy to {claimed} that nobody gave it"
        elif not any(has_words(claimed, wording) for wording in (allergy.value, *allergy.says)):
            yield f"claims an allergy to {claimed}, not to {allergy.value}"
    for key in ("allergy", "diet", "dislike"):
        if key in facts:
            word = re.escape(facts[key].value)
            if re.search(rf"\b(?:i love|i like|extra|with plenty of|lots of) {word}\b", text, re.I):
                yield f"asks for {facts[key].value} ({key})"


def _plain_faults(facts: dict[str, Fact], text: str, menu: Menu) -> Iterable[str]:
    for key, pattern in (("budget", _MONEY), ("job", _WORK), ("home", _FROM), ("gear", _HOME_GEAR)):
        for match in pattern.finditer(text):
            if key in facts and not any(has_words(match[0], says) for says in facts[key].says):
                yield f"says {match[1]}, but {key} is {facts[key].value}"
