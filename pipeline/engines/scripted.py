"""The scripted writer: dialogues from a seeded grammar, offline. It is not a language model.

Source of the words: `data/grammar`. An arc is grown or trimmed to length (`scripted_plan`), then
each beat is said by a template that is open to its speaker: the customer has all of the persona's
facts, the barista only those that have been told. Prices add up and stay within the budget, food
that is offered to somebody whose allergy is known is free of it, and every dialogue is checked
against the persona before it is returned (`scripted_check`).
Cost: about 3 ms a dialogue on one core (checks apart), after 0.1 s to read the grammar.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from duplex.base import Role
from duplex.characters import Beat, Domain, Persona, Scenario
from duplex.errors import DataFileError, RecordError
from duplex.records import Turn
from duplex.wording import facts_told, said_by
from pipeline.engines.scripted_check import contradictions
from pipeline.engines.scripted_customer import read_persona
from pipeline.engines.scripted_grammar import FACT_SLOTS, Grammar, digest_grammar, load_grammar
from pipeline.engines.scripted_menu import (
    SIZES,
    number_words,
    price_words,
    to_cents,
    with_article,
)
from pipeline.engines.scripted_patterns import PatternPicker
from pipeline.engines.scripted_performance import Line, perform
from pipeline.engines.scripted_plan import MIN_FACTS, plan_beats
from pipeline.engines.writers import (
    Candidate,
    Check,
    Fault,
    OnReject,
    WrittenDialogue,
    draw_prompt,
)

VERSION = 2  # raise it when this code says something else with the same grammar
GRAMMAR_DIR = Path(__file__).resolve().parents[2] / "data" / "grammar"

_ACK_SHARE = 0.5  # of the barista's turns begin with a word on what was just said
_RUSHED = ("rush", "closing")  # exchanges after which nobody sits down
# Beats that answer or repeat what the customer said, so no other acknowledgement goes before.
_REPLIES = frozenset(
    (
        "promise-care", "excuse-wait", "still-open", "read-back", "read-group", "find-order",
        "apologise", "offer-remake", "explain-menu", "answer-board", "describe-drink",
        "answer-ingredients", "answer-remark", "ask-unknown", "farewell", "last-word",
    )
)  # fmt: skip


class ScriptedWriter:
    """A `DialogueWriter`.

    `domain` gives the types their moods; without it no turn has an emotion. `check` decides which
    candidate is kept; `on_reject` hears of the others. `grammar_dir` is `data/grammar` unless a
    test says otherwise.
    """

    def __init__(
        self,
        grammar_dir: Path = GRAMMAR_DIR,
        *,
        domain: Domain | None = None,
        check: Check | None = None,
        on_reject: OnReject | None = None,
        max_candidates: int = 4,
    ):
        self._grammar_dir = grammar_dir
        self._domain = domain
        self._check = check
        self._on_reject = on_reject
        self._max_candidates = max_candidates

    @cached_property
    def grammar(self) -> Grammar:
        """Read when first needed: a run with nothing to write asks for the revision alone."""
        return load_grammar(self._grammar_dir)

    @cached_property
    def _digest(self) -> str:
        return digest_grammar(self._grammar_dir)

    @property
    def revision(self) -> str:
        return f"scripted-{VERSION}:{self._digest[:12]}"

    def check(self, personas: Sequence[Persona]) -> None:
        """Raises DataFileError for the personas that the grammar cannot speak for, all at once."""
        faults = []
        for persona in personas:
            try:
                read_persona(persona, self.grammar)
            except DataFileError as error:
                faults.append(f"  - {persona.id}: {error}")
        if faults:
            raise DataFileError(
                "the scripted writer needs facts that fit its menu (data/grammar/menu.yaml); "
                "nothing was written.\n" + "\n".join(faults)
            )

    def write(
        self,
        persona: Persona,
        scenario: Scenario,
        *,
        seed: int,
        min_turns: int,
        max_turns: int,
        task_id: str = "",
        attempt: int = 0,
    ) -> WrittenDialogue:
        """Raises DataFileError for a persona or arc that the grammar cannot speak for,
        RequestError for a length that it cannot reach, RecordError where no candidate is kept."""
        fault = None
        for number in range(self._max_candidates):
            # The ids keep two personas apart that are given the same seed.
            again = f"/{number}" if number else ""
            rng = random.Random(f"{seed}/{persona.id}/{scenario.id}{again}")
            written = self._candidate(persona, scenario, rng, min_turns, max_turns)
            fault = self._fault(persona, scenario, written.turns)
            if fault is None:
                return written
            if self._on_reject:
                self._on_reject(Candidate(task_id, attempt, number, fault, written.turns))
        assert fault is not None
        raise RecordError(
            f"the dialogue of {persona.id} in {scenario.id} must pass its checks, none of "
            f"{self._max_candidates} did; the last: {fault.code}: {fault.message}. Mend the "
            "grammar or the persona's wordings"
        )

    def _candidate(
        self,
        persona: Persona,
        scenario: Scenario,
        rng: random.Random,
        min_turns: int,
        max_turns: int,
    ) -> WrittenDialogue:
        system_prompt = draw_prompt(persona, rng)
        beats = plan_beats(scenario, self.grammar, rng, min_turns=min_turns, max_turns=max_turns)
        lines = _Talk(self.grammar, persona, beats, rng, scenario.unanswerable).speak()
        turns = perform(lines, persona, scenario, self._domain, self.grammar, rng)
        return WrittenDialogue(turns=turns, system_prompt=system_prompt, mood=persona.type)

    def _fault(self, persona: Persona, scenario: Scenario, turns: tuple[Turn, ...]) -> Fault | None:
        """What the grammar promises, and then what the stage asks for."""
        if faults := contradictions(persona, turns, self.grammar.menu):
            return Fault("contradiction", "; ".join(faults))
        told = facts_told(persona, said_by(turns, "agent"))
        if len(told) < MIN_FACTS:
            found = ", ".join(sorted(told)) or "none"
            return Fault("too-few-facts", f"at least {MIN_FACTS} facts are told, found {found}")
        return self._check(persona, scenario, turns) if self._check else None


@dataclass
class _Talk:
    """One conversation while it is being written."""

    grammar: Grammar
    persona: Persona
    beats: list[Beat]
    rng: random.Random
    unanswerable: Sequence[str] = ()
    known: set[str] = field(default_factory=set)  # facts that the barista has heard
    shop: dict[str, str] = field(default_factory=dict)  # slots that are open to both
    used: Counter[tuple[str, int]] = field(default_factory=Counter)  # templates, to not repeat
    topic: str = ""
    fills: set[str] = field(default_factory=set)  # what the current turn's slots were filled with

    def __post_init__(self) -> None:
        self.customer = read_persona(self.persona, self.grammar)
        self.total = self.customer.item.cents
        self.patterns = PatternPicker(self.persona, self.rng)
        exchanges = {self.grammar.owners[beat.intent].name for beat in self.beats}
        leaves = "hurry" in self.customer.slots or any(name in exchanges for name in _RUSHED)
        self.stays = not leaves and self.rng.random() < 0.6
        self.in_group = "group" in exchanges
        if exchanges & {"regular"}:
            self.known |= {"name", "order"}
        self._stock_shop()

    def _stock_shop(self) -> None:
        """Draws what this shop says and sells today."""
        menu, rng, own = self.grammar.menu, self.rng, self.customer
        others = [name for name in menu.drinks if name != own.item.drink]
        suits = [n for n in others if own.avoids not in menu.drinks[n].holds] or others
        wrong = rng.choice(others)
        size = f"{rng.choice(SIZES)} " if len(menu.drinks[wrong].prices) > 1 else ""
        new = rng.choice(list(menu.news))
        group = rng.choice(menu.groups)
        self.shop |= {
            "alt": rng.choice(suits),
            "wrong": with_article(f"{size}{wrong}"),
            "new": new,
            "new_price": price_words(to_cents(menu.news[new].price)),
            "parts": menu.news[new].parts,
            "others": group.phrase,
            "wait": f"{number_words(rng.randint(3, 7))} minutes",
        }
        self.new_holds = menu.news[new].holds
        if self.in_group:
            self.total += to_cents(group.price)

    def speak(self) -> list[Line]:
        rows: list[tuple[Role, list[str]]] = []
        for beat in self.beats:
            if rows and rows[-1][0] == beat.role:
                rows[-1][1].append(beat.intent)
            else:
                rows.append((beat.role, [beat.intent]))
        lines: list[Line] = []
        last_intent = ""
        for position, (role, intents) in enumerate(rows):
            self.fills = set()
            if role == "user":
                last_text = lines[-1].text if lines else ""
                before = self._acknowledge(last_intent, last_text, intents[0])
                text = _join(before, *(self._say("user", intent) for intent in intents))
            else:
                text = _join(*(self._say("agent", intent) for intent in intents))
                must = not self.patterns.any_used and position >= len(rows) // 2
                text = self.patterns.add(text, intents, must=must)
            lines.append(Line(role, text, tuple(intents), frozenset(self.fills)))
            last_intent = intents[-1]
        if not self.patterns.any_used:
            first = next(i for i, line in enumerate(lines) if line.role == "agent")
            lines[first] = replace(lines[first], text=self.patterns.add_anywhere(lines[first].text))
        return lines

    def _say(self, role: Role, intent: str) -> str:
        """One beat in words, drawn among the templates that are open and least used."""
        if intent == "ask-unknown":
            return self.rng.choice(self.unanswerable)
        self._prepare(intent)
        speaker = self.persona.type if role == "agent" else "barista"
        lines = self.grammar.lines[speaker]
        case = self._case(intent)
        key = f"{intent}/{case}" if f"{intent}/{case}" in lines else intent
        slots = self._open_slots(role)
        open_lines = [
            (index, line) for index, line in enumerate(lines.get(key, ())) if line.is_open(slots)
        ]
        if not open_lines:
            raise DataFileError(
                f"data/grammar/{speaker}.yaml must have a line for {key} that works without facts "
                f"beyond {', '.join(sorted(slots))}; found none"
            )
        least = min(self.used[key, index] for index, _ in open_lines)
        index, line = self.rng.choice([e for e in open_lines if self.used[key, e[0]] == least])
        self.used[key, index] += 1
        filled: set[str] = set()
        text = line.say(slots, self.rng, filled)
        self.fills |= {slots[slot] for slot in filled}
        if role == "agent":
            self.known |= {FACT_SLOTS[slot] for slot in filled if slot in FACT_SLOTS}
        elif intent == "find-order":
            self.known.add("order")  # the app has told it
        return _sentence_case(text)

    def _open_slots(self, role: Role) -> dict[str, str]:
        own = self.customer.slots
        if role == "agent":
            return {**own, **self.shop}
        return {**{s: own[s] for s in own if FACT_SLOTS[s] in self.known}, **self.shop}

    def _prepare(self, intent: str) -> None:
        """Opens the slots that depend on what has been said so far."""
        menu = self.grammar.menu
        if intent == "offer-food":
            foods = [
                name
                for name, food in menu.foods.items()
                if "avoid" not in self.known or self.customer.avoids not in food.holds
            ]
            self.offered = self.rng.choice(foods)
            self.shop["offer"] = with_article(self.offered)
            self.shop["offers"] = f"{self.offered}s"
            self.shop["offer_price"] = price_words(to_cents(menu.foods[self.offered].price))
        elif intent == "find-order":
            self.known.add("order")
        elif intent in ("state-price", "react-price"):
            self.shop["price"] = price_words(self.total)
        elif intent in ("chat", "remark"):
            speaker = "barista" if intent == "chat" else self.persona.type
            self.topic = self._draw_topic(intent, self.grammar.topics(speaker, intent))

    def _draw_topic(self, intent: str, topics: list[str]) -> str:
        """A topic that is new here; one that brings out a fact only if it is still untold."""
        facts = set(FACT_SLOTS.values())
        open_topics = [
            topic
            for topic in topics
            if not self.used[f"topic:{intent}/{topic}", 0]
            and (topic not in facts or (topic in self.customer.slots and topic not in self.known))
        ]
        # Facts are what the model is to learn, so they come up more often than the weather.
        telling = [topic for topic in open_topics if topic in facts]
        topic = self.rng.choice(
            [*open_topics, *telling, *telling] or [t for t in topics if t not in facts]
        )
        self.used[f"topic:{intent}/{topic}", 0] += 1
        return topic

    def _case(self, intent: str) -> str:
        """Which variant of an intent fits what is so; lines without variants ignore it."""
        own = self.customer
        match intent:
            case "excuse-wait":
                return "angry" if self.persona.type == "angry" else "kind"
            case "ask-allergy":
                return "known" if "avoid" in self.known else ""
            case "mind-wait" | "react-wait":
                return "hurry" if "hurry" in own.slots else "easy"
            case "describe-problem":
                is_iced = "iced" in own.item.drink or "cold" in own.item.drink
                return "wrong" if is_iced else self.rng.choice(("wrong", "cold"))
            case "answer-here":
                return "stay" if self.stays else "go"
            case "answer-food":
                return self._answer_food()
            case "give-allergy":
                return "allergy" if own.has_allergy else "diet"
            case "judge-drink":
                return "avoid" if own.avoids in self.new_holds else "no"
            case "react-price":
                return "group" if self.in_group else "own"
            case "hand-over":
                if self.in_group:
                    return "group"
                return "food" if "food" in self.known else "own"
            case "chat" | "answer-chat" | "remark" | "answer-remark" | "follow-remark":
                return self.topic
            case _:
                return ""

    def _answer_food(self) -> str:
        """Takes the food that the persona likes, if there is money for it; else says why not."""
        menu, own = self.grammar.menu, self.customer
        offered = menu.foods[self.offered]
        liked = menu.find_food(own.slots.get("food", ""))
        if liked is not None:
            total = self.total + to_cents(menu.foods[liked].price)
            if total <= own.budget:
                self.total = total
                return "accept"
        reasons = ["no"]
        if own.avoids in offered.holds:
            reasons = ["avoid"]
        elif self.total + to_cents(offered.price) > own.budget:
            reasons.append("budget")
        return self.rng.choice(reasons)

    def _acknowledge(self, last_intent: str, last_text: str, intent: str) -> str:
        """A word of the barista on what was just said, or nothing."""
        lines = self.grammar.lines["barista"]
        asked = last_intent.startswith("ask-") or last_intent == "remark"
        if not last_intent or asked or intent in _REPLIES:
            return ""
        question = last_text.endswith("?")
        if not question and self.rng.random() > _ACK_SHARE:
            return ""
        topic = "question" if question else last_intent
        keys = (f"ack/{topic}/{self.persona.type}", f"ack/{topic}")
        for key in keys:
            for line in self.rng.sample(lines.get(key, ()), len(lines.get(key, ()))):
                if line.is_open(self._open_slots("user")):
                    return _sentence_case(line.say(self._open_slots("user"), self.rng, set()))
        return ""


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _sentence_case(text: str) -> str:
    """A capital at the start of each sentence; templates are written without a care for it."""
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(^|[.?!] )([a-z])", lambda m: m[1] + m[2].upper(), text)
