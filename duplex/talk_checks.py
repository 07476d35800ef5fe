"""Whether what is said is in character, on the subject, and no machine talking. Pure.

Rules of known forms, not understanding: each finds what it is made for in plain English wording
and lets through what it cannot be sure of. Facts, patterns and topics are found in any script, as
whole words (`duplex/words.py`): where nouns take endings, a fact's `says` lists the forms.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

from duplex.characters import Fact, Persona
from duplex.turn_checks import Seen
from duplex.wording import (
    NUMBER_WORDS,
    facts_told,
    longest_run,
    number,
    patterns_used,
    said_by,
    spoken,
    without_facts,
    words,
)
from duplex.words import CHARACTERS_A_WORD, UNSPACED, has_words

MIN_TOPIC_SHARE = 0.2  # of the turns hold a word of the subject, or a fact
LEAK_WORDS = 8  # a run of so many of the prompt's own words is no accident
REPEAT_WORDS = 6  # a turn of so many words is not said twice
MAX_SHORT_REPEATS = 3
ECHO_WORDS, ECHO_SHARE = 4, 0.8  # facts aside: a customer confirms its order in the same words

AI_PHRASES = (
    "as an ai", "an ai assistant", "as an artificial intelligence", "i am an ai", "i'm an ai",
    "language model", "as a virtual assistant", "your virtual assistant", "i'm a chatbot",
    "my training data", "my knowledge cutoff", "system prompt", "i cannot assist with",
    "i can't assist with", "i cannot fulfill", "i can't fulfill", "here is the dialogue",
    "here's the dialogue", "as a customer in this scenario", "in this role play",
    "in this roleplay",
)  # fmt: skip
# What those say who serve; an agent that plays who is served does not.
HELPER_PHRASES = (
    "how can i help you", "how may i help you", "how can i assist you", "how may i assist you",
    "i'm here to help you", "i'm here to assist", "happy to assist you", "glad to assist you",
    "is there anything else i can help", "is there anything else i can assist",
    "anything else i can do for you", "feel free to ask me", "let me know if you need anything",
)  # fmt: skip
# "And then she says, what can I get you"; "welcome to the club, they said".
_REPORTED = re.compile(
    r"\b(?:say|says|said|saying|asks|asked|asking|told|heard|hear|hearing|you ask)\b"
)
_SAID_AFTER = re.compile(
    r"^(?: \w+){0,6}? (?:he|she|they|you|it|who) (?:say|says|said|asks?|asked)\b"
)


# -- the persona


def other_name(seen: Seen) -> str | None:
    """ "My name is X", "call me X"; "I'm X." and "It's X." where a name was asked for."""
    own = _proper_nouns(seen.persona) | set(re.findall(r"\w+", seen.persona.name))
    asked = False
    for index, turn in enumerate(seen.turns):
        text = spoken(turn)
        if turn.role == "user":
            asked = _NAME_ASKED.search(text) is not None
            continue
        # Who gives the own name as well may be Irish, and it may be Monday.
        short = asked and not own & set(re.findall(r"\w+", text))
        matches = [*_NAME_GIVEN.finditer(text), *(_NAME_SHORT.finditer(text) if short else ())]
        for match in matches:
            name = match[1]
            # A short form of the own name is the own name.
            if not any(o.startswith(name[:3]) or name.startswith(o[:3]) for o in own):
                return f"turn {index}: the agent is {seen.persona.name}, and says {match[0]!r}"
    return None


_NAME_GIVEN = re.compile(
    r"\b(?:[Mm]y name is|[Mm]y name's|[Tt]he name is|[Tt]he name's|[Cc]all me|"
    r"under the name(?: of)?) ([A-Z][a-z]+)\b(?!')"
)
_NAME_SHORT = re.compile(
    r"\b(?:[Ii]t's|[Ii]'m|[Tt]his is|[Uu]nder|[Ff]or) ([A-Z][a-z]+)(?=[.,!?]|$)"
)
_NAME_ASKED = re.compile(
    r"\bname\b|\bwho(?:'s| is| are| am) (?:this|it|that|you|i)\b|\band you are\b", re.IGNORECASE
)


def denied_fact(seen: Seen) -> str | None:
    for index, text in _agent_turns(seen):
        if not _NEGATION.search(text):
            continue
        for fact in seen.persona.facts:
            for wording in (*fact.says, fact.value):
                bare = re.sub(r"^(?:an?|the|my|your) ", "", wording)
                if not has_words(text, bare):
                    continue
                is_not, has_none = _denials(bare)
                match = is_not.search(text)
                if match is None and not _is_avoided(seen.persona, fact):
                    match = has_none.search(text)
                if match:
                    return f"turn {index} denies {fact.key} ({fact.value}): {match[0]!r}"
    return None


_NEGATION = re.compile(r"\b(?:no|not|isn't|don't)\b", re.IGNORECASE)


@lru_cache(maxsize=4096)
def _denials(bare: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What nobody says of whom the fact is true; to have none of what is avoided affirms it."""
    what = rf"{re.escape(bare)}(?![\w'])"
    lead = "(?:(?:really|actually|from|called|allergic to|an?|the) )*"
    is_not = (
        rf"\b(?:i'm|i am) (?:not|no) {lead}{what}|"
        rf"\bi (?:don't|do not) come from {what}|\bmy name (?:isn't|is not) {what}"
    )
    has_none = rf"\bi (?:don't|do not) have (?:(?:an?|the|any|my) )?{what}|\bi have no {what}"
    return re.compile(is_not, re.IGNORECASE), re.compile(has_none, re.IGNORECASE)


def _is_avoided(persona: Persona, fact: Fact) -> bool:
    """Whether the prompts speak of the fact in the negative: no sugar, allergic to nuts."""
    wordings = "|".join(re.escape(text) for text in (*fact.says, fact.value))
    negation = r"(?:no|not|don't|without|never|hate|allergic|avoid|off|stand|stomach|dislike)"
    pattern = rf"\b{negation}\b(?:\W+\w+){{0,4}}?\W+(?:{wordings})\b|\b(?:{wordings})\W+free\b"
    return any(re.search(pattern, prompt, re.IGNORECASE) for prompt in persona.prompts)


def other_amount(seen: Seen) -> str | None:
    """ "I have ten dollars" where the fact says five; prices and other units are not claims."""
    own: dict[str, set[int]] = {}
    for fact in seen.persona.facts:
        for wording in (fact.value, *fact.says):
            spelled = words(wording)
            value = number(spelled[:-1]) if len(spelled) > 1 else None
            if value is not None:
                own.setdefault(spelled[-1].rstrip("s"), set()).add(value)
    if not own:
        return None
    for index, text in _agent_turns(seen):
        for match in _CLAIM.finditer(text):
            value, unit = number(match[1].lower().replace("-", " ").split()), match[2].lower()
            amounts = own.get(unit.rstrip("s"))
            if amounts and value is not None and value not in amounts:
                told = " or ".join(str(amount) for amount in sorted(amounts))
                return f"turn {index} says {match[0]!r}, and the fact is {told} {unit}"
    return None


_NUMBER = "|".join(sorted(NUMBER_WORDS, key=len, reverse=True))
_CLAIM = re.compile(
    r"\b(?:i(?: only| just)? (?:have|brought|carry|set aside)|i've(?: only| just)? got|"
    r"my (?:budget|limit) is|i can(?: only| just)? spend|i(?: only| just)? need|i want)"
    r"(?: only| just| about| exactly| all of| up to| a| the)*"
    rf" ((?:{_NUMBER})(?:[ -](?:and |{_NUMBER}))*) (\w+)",
    re.IGNORECASE,
)


def too_few_facts(seen: Seen) -> str | None:
    wanted = min(seen.min_facts, len(seen.persona.facts))
    told = facts_told(seen.persona, said_by(seen.turns, "agent"))
    if len(told) < wanted:
        return f"the agent must tell {wanted} facts, found {', '.join(sorted(told)) or 'none'}"
    return None


def no_pattern(seen: Seen) -> str | None:
    wanted = min(seen.min_patterns, len(seen.persona.speech_patterns))
    used = patterns_used(seen.persona, said_by(seen.turns, "agent"))
    if len(used) < wanted:
        return f"the agent must use {wanted} of its speech patterns, found {len(used)}"
    return None


# -- the conversation


def off_topic(seen: Seen) -> str | None:
    topics = [" ".join(words(entry)) for entry in seen.domain.topic]
    single = {form for topic in topics if " " not in topic for form in (topic, f"{topic}s")}
    several = [f" {topic} " for topic in topics if " " in topic]
    touching = 0
    for turn in seen.turns:
        said = words(turn.text)
        padded = f" {' '.join(said)} "
        touching += (
            not single.isdisjoint(said)
            or any(topic in padded for topic in several)
            or bool(facts_told(seen.persona, turn.text))
        )
    if touching < MIN_TOPIC_SHARE * len(seen.turns):
        return (
            f"{touching} of {len(seen.turns)} turns are on the subject of {seen.domain.id}, "
            f"at least {MIN_TOPIC_SHARE:.0%} must be"
        )
    return None


def assistant_speak(seen: Seen) -> str | None:
    for index, turn in enumerate(seen.turns):
        spelled = f" {' '.join(words(turn.text))} "
        for phrase in AI_PHRASES:
            if f" {phrase} " in spelled:
                return f"turn {index} speaks as a machine: {phrase!r}"
    return None


def role_inversion(seen: Seen) -> str | None:
    spelled_lines = [" ".join(words(line)) for line in seen.domain.user_lines]
    lines = [line for line in (*spelled_lines, *HELPER_PHRASES) if line not in AI_PHRASES]
    for index, text in _agent_turns(seen):
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            spelled = f" {' '.join(words(sentence))} "
            for phrase in lines:
                before, found, after = spelled.partition(f" {phrase} ")
                if not found:
                    continue
                # "You're welcome to it" inverts nothing, nor does what somebody reports.
                reported = _REPORTED.search(before) or _SAID_AFTER.search(f" {after}")
                if not reported and not before.endswith("you're"):
                    return f"turn {index}: the agent says what the user's side says: {phrase!r}"
    return None


def prompt_leak(seen: Seen) -> str | None:
    size = LEAK_WORDS * _pieces_a_word(seen)
    runs: set[tuple[str, ...]] = set()
    for prompt in seen.persona.prompts:
        runs.update(_runs(_first_person(words(prompt)), size))
    for index, turn in enumerate(seen.turns):
        own = _first_person(words(turn.text))
        shared: list[str] = []
        for start, run in enumerate(_runs(own, size)):
            if run in runs:  # consecutive runs overlap in all words but one
                shared = [*shared, own[start + size - 1]] if shared else list(run)
            elif shared:
                break
        quoted = " ".join(shared)
        # "I have a court hearing to get to" is what the prompt is there for.
        if len(words(without_facts(seen.persona, quoted))) >= size:
            return f"turn {index} quotes the prompt: {quoted!r}"
    return None


def _runs(spelled: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(spelled[i : i + size]) for i in range(max(0, len(spelled) - size + 1))]


def _pieces_a_word(seen: Seen) -> int:
    """How many of what `words` gives are a word: characters are where no spaces part them."""
    return CHARACTERS_A_WORD if seen.persona.language in UNSPACED else 1


_PERSONS = {"you": "i", "your": "my", "yours": "mine", "are": "am", "you're": "i'm", "me": "i"}


def _first_person(spelled: list[str]) -> list[str]:
    return [_PERSONS.get(word, word) for word in spelled]


def untold_knowledge(seen: Seen) -> str | None:
    """The user says a name that was not told yet, or "your X", "you're a X" of such a fact."""
    told = set(seen.scenario.known)
    topic = {word for entry in seen.domain.topic for word in words(entry)}
    of_the_subject = {
        fact.key
        for fact in seen.persona.facts
        for word in words(" ".join((fact.value, *fact.says)))
        if word in topic or word.rstrip("s") in topic
    }
    for index, turn in enumerate(seen.turns):
        if turn.role == "agent":
            told |= facts_told(seen.persona, turn.text)  # who cuts in has heard a little more
            continue
        for fact in seen.persona.facts:
            if fact.key in told:
                continue
            for wording in fact.says:
                if all(word[:1].isupper() for word in wording.split()):
                    if re.search(rf"(?<!\w){re.escape(wording)}(?!\w)", turn.text):
                        return f"turn {index}: the user says {wording!r}, which nobody told it"
                    continue
                if fact.key in of_the_subject:
                    continue  # whoever serves says such words unasked
                bare = re.sub(r"^(?:an?|the|my|your|his|her) ", "", wording)
                said = rf"\b(?:your|you're an?|you are an?) {re.escape(bare)}\b"
                if has_words(turn.text, bare) and re.search(said, turn.text, re.IGNORECASE):
                    return f"turn {index}: the user knows of {bare!r}, which nobody told it"
    return None


def repeated_turn(seen: Seen) -> str | None:
    counts: Counter[tuple[str, str]] = Counter()
    spelled, pieces = [" ".join(words(turn.text)) for turn in seen.turns], _pieces_a_word(seen)
    for index, turn in enumerate(seen.turns):
        key = (turn.role, spelled[index])
        counts[key] += 1
        length = len(spelled[index].split()) // pieces
        if counts[key] >= (2 if length >= REPEAT_WORDS else MAX_SHORT_REPEATS) and length > 1:
            return f"turn {index} was said before: {turn.text!r}"
    pairs = [
        pair for pair in pairwise(spelled) if min(len(part.split()) // pieces for part in pair) > 1
    ]
    if len(set(pairs)) < len(pairs):
        doubled = next(pair for pair in pairs if pairs.count(pair) > 1)
        return f"an exchange comes twice: {' / '.join(doubled)!r}"
    return None


def echo(seen: Seen) -> str | None:
    for index, (before, after) in enumerate(pairwise(seen.turns)):
        if (before.role, after.role) != ("user", "agent"):
            continue
        heard = words(without_facts(seen.persona, before.text))
        said = words(without_facts(seen.persona, after.text))
        run = longest_run(heard, said)
        if len(run) >= ECHO_WORDS * _pieces_a_word(seen) and len(run) >= ECHO_SHARE * len(heard):
            return f"turn {index + 1} only says again what the user said: {' '.join(run)!r}"
    return None


def _agent_turns(seen: Seen) -> Iterator[tuple[int, str]]:
    for index, turn in enumerate(seen.turns):
        if turn.role == "agent":
            yield index, spoken(turn).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def _proper_nouns(persona: Persona) -> set[str]:
    return {word for fact in persona.facts for word in re.findall(r"\b[A-Z]\w+", fact.value)}
