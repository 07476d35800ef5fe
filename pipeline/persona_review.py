"""What a person who reviews personas and scenarios looks for, as rules. Pure: no files.

A `fault` would harm the training or stop the run; a `warning` is for a person to judge. The rules
read words, not meaning: they find what can be found so, and say what they saw.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from duplex.characters import Domain, GapRange, Persona, Scenario
from duplex.frames import FRAME_RATE

WORDS = (35, 80)  # of a prompt
PROMPTS = 3
MOST_FRAMES = 1000  # a third of the model's context of 3,000
LONG_FRAMES = 250  # 20 s before anybody can speak, with the pocket tokenizer's short pieces
NEAR = 0.5  # Jaccard similarity of two-word shingles
LONG_GAP_FRAMES = 40  # 3.2 s of silence inside a conversation
GAP_RATIO = 3.0  # of two personas of one type

# Not one: it is a pronoun too.
_NUMBERS = re.compile(
    r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|"
    r"seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|"
    r"thousand|\d+",
    re.IGNORECASE,
)
_NO_NAMES = frozenset(("I", "I'm", "I've", "I'd", "I'll", "English"))


@dataclass(frozen=True)
class Finding:
    """One line of a review. `about`: the file, or what it concerns as a whole."""

    level: Literal["fault", "warning"]
    about: str
    message: str


def review_persona(
    persona: Persona, domain: Domain, about: str, frames: Sequence[int]
) -> list[Finding]:
    """What a reader of this one file would say. `frames`: how many each prompt takes."""
    faults = [*_fact_faults(persona), *_prompt_faults(persona, frames)]
    warnings = [
        *_prompt_warnings(persona, frames),
        *_paraphrase_warnings(persona),
        *_pattern_warnings(persona),
        *_gap_warnings(persona),
        *_grounding_warnings(persona, domain),
    ]
    return [Finding("fault", about, text) for text in faults] + [
        Finding("warning", about, text) for text in warnings
    ]


def review_scenario(scenario: Scenario, about: str) -> list[Finding]:
    warnings = [
        f"an unanswerable question must be one, found {text!r} without a question mark"
        for text in scenario.unanswerable
        if not text.endswith("?")
    ]
    if len({beat.role for beat in scenario.arc}) < 2:
        warnings.append("both sides should speak in the arc, found one of them")
    for role, beats in itertools.groupby(beat.role for beat in scenario.arc):
        if (length := len(list(beats))) > 2:
            warnings.append(f"{role} has {length} beats of the arc in a row: who answers them?")
    if scenario.interruptions > len(scenario.arc) // 2:
        warnings.append(
            f"{scenario.interruptions} interruptions in an arc of {len(scenario.arc)} beats: there "
            "would be more of them than changes of speaker"
        )
    return [Finding("warning", about, text) for text in warnings]


def review_set(personas: dict[str, Persona], scenarios: dict[str, Scenario]) -> list[Finding]:
    """What shows only when the files lie side by side; keys are what a finding is about."""
    found = list(_double_names(personas))
    prompts = [(about, prompt) for about, p in personas.items() for prompt in p.prompts]
    for (one, first), (other, second) in itertools.combinations(prompts, 2):
        if one != other and similarity(first, second) >= NEAR:
            found.append(
                Finding("fault", other, f"a prompt is nearly one of {one}: {second!r:.60}")
            )
    found += _uneven_gaps(personas)
    titles = Counter(scenario.title.casefold() for scenario in scenarios.values())
    found += [
        Finding("warning", about, f"another scenario is titled {scenario.title!r} too")
        for about, scenario in scenarios.items()
        if titles[scenario.title.casefold()] > 1
    ]
    return found


def coverage(
    domain: Domain, personas: Iterable[Persona], scenarios: Iterable[Scenario]
) -> dict[str, dict[str, int]]:
    """How often each part of the taxonomy is used, zeros included."""
    types = Counter(persona.type for persona in personas)
    chosen = list(scenarios)
    kinds = Counter(scenario.kind for scenario in chosen)
    return {
        "types": {name: types[name] for name in domain.types},
        "kinds": {name: kinds[name] for name in domain.kinds},
        "scenarios": {
            "agent speaks first": sum(s.first_speaker == "agent" for s in chosen),
            "user speaks first": sum(s.first_speaker == "user" for s in chosen),
            "with mood turns": sum(bool(s.moods) for s in chosen),
            "with interruptions": sum(s.interruptions > 0 for s in chosen),
            "with unanswerable questions": sum(bool(s.unanswerable) for s in chosen),
        },
    }


def coverage_warnings(table: dict[str, dict[str, int]]) -> list[Finding]:
    named = {"types": "no persona is of type", "kinds": "no scenario is of kind",
             "scenarios": "there is no scenario:"}  # fmt: skip
    return [
        Finding("warning", "coverage", f"{named[part]} {name}")
        for part, counts in table.items()
        for name, count in counts.items()
        if not count
    ]


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of two-word shingles, in [0, 1]."""
    first, second = _shingles(one), _shingles(other)
    return len(first & second) / len(first | second) if first | second else 1.0


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[\w']+", text.casefold())
    return set(itertools.pairwise(words)) or {(word,) for word in words}


def _holds(text: str, wording: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(wording)}(?!\w)", text, re.IGNORECASE))


# -- one persona


def _fact_faults(persona: Persona) -> Iterator[str]:
    for fact in persona.facts:
        if not any(_holds(fact.value, wording) for wording in fact.says):
            yield (
                f"fact {fact.key}: its value must hold one of its says, or an answer that gives it "
                f"counts as wrong; found {fact.value!r} without {', '.join(fact.says)}"
            )
    names = [fact.value for fact in persona.facts if fact.key == "name"]
    if names and names[0] != persona.name:
        yield f"fact name must be the persona's name, {persona.name}; found {names[0]}"


def _prompt_faults(persona: Persona, frames: Sequence[int]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for number, prompt in enumerate(persona.prompts, start=1):
        plain = " ".join(re.findall(r"[\w']+", prompt.casefold()))
        if plain in seen:
            yield f"prompt {number} is prompt {seen[plain]} again: paraphrase it"
        seen.setdefault(plain, number)
        if (length := frames[number - 1]) > MOST_FRAMES:
            yield (
                f"prompt {number} takes {length} frames, of which the model has 3000 for the "
                f"whole conversation: at most {MOST_FRAMES}"
            )
        if "<" in prompt or ">" in prompt:
            yield f"prompt {number} holds < or >: the prompt's own tags are put around it later"


def _prompt_warnings(persona: Persona, frames: Sequence[int]) -> Iterator[str]:
    if len(persona.prompts) < PROMPTS:
        yield (
            f"{PROMPTS} prompts keep the model from learning one wording by heart, found "
            f"{len(persona.prompts)}"
        )
    for number, prompt in enumerate(persona.prompts, start=1):
        count = len(prompt.split())
        if not WORDS[0] <= count <= WORDS[1]:
            yield f"prompt {number} should have {WORDS[0]} to {WORDS[1]} words, found {count}"
        if LONG_FRAMES < (length := frames[number - 1]) <= MOST_FRAMES:
            yield (
                f"prompt {number} takes {length} frames: {length / FRAME_RATE:.0f} s pass "
                "before anybody speaks"
            )
        if persona.language == "en" and not re.search(r"\b(you|your)\b", prompt, re.IGNORECASE):
            yield f"prompt {number} should speak to the model: You are …; found no you or your"
        if signs := sorted(set(re.findall(r"[\d*_#\[\]{}|\\$%&@]", prompt))):
            yield f"prompt {number} holds {' '.join(signs)}: write it as it is spoken"


def _paraphrase_warnings(persona: Persona) -> Iterator[str]:
    numbered = enumerate(persona.prompts, start=1)
    for (one, first), (other, second) in itertools.combinations(numbered, 2):
        if NEAR <= (share := similarity(first, second)) < 1:
            yield (
                f"prompts {one} and {other} are nearly the same ({share:.0%} of their word pairs): "
                "say it in another order, with other words"
            )


def _pattern_warnings(persona: Persona) -> Iterator[str]:
    for pattern in persona.speech_patterns:
        if not re.fullmatch(r"[^,].*,|, .*[^.?!,]|[^,].*[.?!…]", pattern):
            yield (
                f'speech pattern {pattern!r} has none of the three forms: "Oh my," before a turn, '
                '", I think" at a sentence\'s end, "I expected better." after a turn'
            )
    doubled = [name for name, n in Counter(persona.speech_patterns).items() if n > 1]
    yield from (f"speech pattern {name!r} is there twice" for name in doubled)


def _gap_warnings(persona: Persona) -> Iterator[str]:
    for name in ("gap_after_user", "gap_other"):
        gap: GapRange = getattr(persona, name)
        if gap.high > LONG_GAP_FRAMES:
            yield (
                f"{name} goes up to {gap.high} frames, {gap.high / FRAME_RATE:.1f} s of silence: "
                f"more than {LONG_GAP_FRAMES} sounds like a broken line"
            )
    if persona.backchannels and not persona.backchannel_words:
        yield "backchannels needs backchannel_words, found none"


def _grounding_warnings(persona: Persona, domain: Domain) -> Iterator[str]:
    """Names and numbers that a prompt gives and no fact checks: answers could be made up."""
    wordings = [
        text for fact in persona.facts for text in (fact.value, *fact.says)
    ] + [persona.name, domain.place, domain.title, domain.agent_role, domain.user_role]  # fmt: skip
    known = {word for text in wordings for word in re.findall(r"[\w']+", text.casefold())}
    for number, prompt in enumerate(persona.prompts, start=1):
        loose = [word for word in _names_and_numbers(prompt) if word.casefold() not in known]
        if loose:
            yield (
                f"prompt {number} gives {', '.join(dict.fromkeys(loose))}, which is no fact: what "
                "the persona says of it is never checked. Make it a fact, or leave it out"
            )


def _names_and_numbers(prompt: str) -> Iterator[str]:
    for sentence in re.split(r"(?<=[.?!:])\s+", prompt):
        for position, word in enumerate(re.findall(r"[^\W\d_][\w']*|\d+", sentence)):
            base = word.removesuffix("'s")
            is_name = position > 0 and base[0].isupper() and base not in _NO_NAMES
            if is_name or _NUMBERS.fullmatch(base):
                yield base


# -- several personas


def _double_names(personas: dict[str, Persona]) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for about, persona in personas.items():
        if persona.name.casefold() in first:
            taken = first[persona.name.casefold()]
            yield Finding(
                "warning", about, f"name {persona.name} is taken by {taken}: an answer to it "
                "does not show which of the two prompts was read"
            )  # fmt: skip
        first.setdefault(persona.name.casefold(), about)


def _uneven_gaps(personas: dict[str, Persona]) -> Iterator[Finding]:
    by_type: dict[str, list[tuple[str, float]]] = {}
    for about, persona in personas.items():
        gap = persona.gap_after_user
        by_type.setdefault(persona.type, []).append((about, (gap.low + gap.high) / 2))
    for kind, members in by_type.items():
        middle = median(value for _, value in members)
        for about, value in members if len(members) > 2 else ():
            if max(value, middle) > GAP_RATIO * max(min(value, middle), 0.5):
                yield Finding(
                    "warning", about, f"its pauses last {value:g} frames on average, those of "
                    f"{kind} personas {middle:g}: is the type right?"
                )  # fmt: skip


def worst(findings: Sequence[Finding]) -> bool:
    """Whether one of them is a fault."""
    return any(finding.level == "fault" for finding in findings)
