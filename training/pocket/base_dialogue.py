"""Dialogues drawn from units: who the agent is, what is asked, who speaks when. Pure.

A dialogue asks for facts of the prompt, in any order, by questions and answers that the bank holds
in the two speakers' voices. One question in eight asks for a fact that the prompt doesn't hold,
and is refused. Around them: greetings by either side, moods, small talk, stories with backchannels,
long answers over which the user says "mhm" or cuts in.

Legend: times are in frames of 80 ms.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from training.pocket.base_prompts import Character, Fact, Prompted, more_facts, worded
from training.pocket.base_units import (
    NEUTRAL,
    SAMPLE_ACT,
    UnitIndex,
    company_of,
)
from training.pocket.base_voices import (
    AGENT_VOICES,
    Speaker,
    agent_speaker,
    gender_of,
    users,
)
from training.pocket.roles import Grammar, Scope, Side

REFUSED, SAMPLED, AGENT_FIRST, EXTRA, CUT, SHORT_CUT = 0.12, 0.5, 0.35, 0.25, 0.5, 0.12
STORY, SMALL, FEELING, GREETED, OPENER, BYE = 0.12, 0.3, 0.2, 0.4, 0.2, 0.4
ANSWER_GAP = (3, 6)
PAUSE = (1, 2)  # between the sentences of one turn: shorter than any answer's gap
ASK_GAP, LONG_ASK_GAP, LONG_SHARE = (3, 12), (12, 45), 0.2
AGENT_FIRST_LEAD, USER_FIRST_LEAD = (10, 18), (2, 8)
TAIL = (8, 24)
YIELD = (2, 5)  # frames that a speaker goes on when cut short
MOST_QUESTIONS = 5


@dataclass(frozen=True)
class Said:
    """Units said in a row by one side, by their places.

    gap: frames after the last end of either side, or of a backchannel after the other's start;
    cut: the next turn starts before this one is over, which stops `yields` frames later.
    """

    role: Literal["agent", "user"]
    units: tuple[int, ...]
    gap: int
    kind: Literal["turn", "backchannel"] = "turn"
    cut: bool = False
    yields: int = 0


@dataclass(frozen=True)
class Dialogue:
    """prompt: the system text, and where it tells what; sample: place of the voice sample's unit,
    or None."""

    character: Character
    prompt: Prompted
    agent: Speaker
    user: Speaker
    sample: int | None
    said: tuple[Said, ...]
    pauses: tuple[int, ...] = field(repr=False)
    tail: int = 0


def draw_dialogue(
    grammar: Grammar, index: UnitIndex, rng: random.Random, side: Side = "train"
) -> Dialogue:
    """A dialogue of training, or of the held-out side: values, wordings and user voices of its
    own."""
    return _Draw(grammar, index, rng, side).dialogue()


class _Draw:
    """One dialogue in the making."""

    def __init__(self, grammar: Grammar, index: UnitIndex, rng: random.Random, side: Side):
        self.grammar, self.index, self.rng = grammar, index, rng
        self.side: Side = side
        voice = rng.choice(list(AGENT_VOICES))
        moods = grammar.talk.moods
        mood = rng.choices(list(moods), [m.weight for m in moods.values()])[0]
        self.mood = mood if side == "train" else NEUTRAL
        self.agent = agent_speaker(voice, self.mood)
        self.user = rng.choice(users(side))
        self.role = rng.choice(grammar.role_ids)
        self.scope: Scope = grammar.scope_of(self.role)
        self.facts: list[Fact] = []
        self.refused: list[str] = []
        self.name = rng.choice(grammar.values(gender_of(voice), side))
        self.company = ""
        if self.scope == "business":
            surname = rng.choice(grammar.values("surname", side))
            self.company = company_of(grammar, self.role, surname)
        self.said: list[Said] = []

    def dialogue(self) -> Dialogue:
        rng, grammar = self.rng, self.grammar
        self._opening()
        topics = list(grammar.topics_of(self.role))
        for topic in rng.sample(topics, rng.randint(2, MOST_QUESTIONS)):
            if rng.random() < FEELING / 2:
                self._exchange("feeling", "feeling")
            if rng.random() < SMALL / 2:
                name = rng.choice(list(grammar.talk.small))
                self._exchange(f"small/{name}", f"small/{name}")
            if rng.random() < STORY / 2:
                self._story()
            self._question(topic)
        if not self.said:  # a small bank may lack all of these questions
            self._exchange("feeling", "feeling")
        if rng.random() < BYE:
            self._exchange("bye", "bye")
        count = rng.randint(0, 2)
        facts = self.facts + more_facts(
            grammar, self.role, self.facts, count, rng, self.side, self.refused
        )
        character = Character(self.role, self.name, self.company, self.mood, tuple(facts))
        samples = self.index.find(agent_speaker(self.agent.voice, NEUTRAL), SAMPLE_ACT)
        sample = rng.choice(samples) if samples and rng.random() < SAMPLED else None
        pauses = tuple(rng.randint(*PAUSE) for one in self.said for _ in one.units)
        prompt = worded(grammar, character, rng, self.side)
        return Dialogue(
            character, prompt, self.agent, self.user, sample, tuple(self.said), pauses,
            rng.randint(*TAIL),
        )  # fmt: skip

    # -- parts

    def _unit(self, role: Literal["agent", "user"], act: str, side: Side = "train") -> int | None:
        speaker = self.agent if role == "agent" else self.user
        places = self.index.find(speaker, act, self.role, side)
        return self.rng.choice(places) if places else None

    def _say(self, role: Literal["agent", "user"], units: Sequence[int | None], **how) -> None:
        places = tuple(place for place in units if place is not None)
        if places:
            self.said.append(Said(role, places, how.pop("gap", self._gap(role)), **how))

    def _gap(self, role: Literal["agent", "user"]) -> int:
        if role == "agent":
            return self.rng.randint(*ANSWER_GAP)
        long = self.rng.random() < LONG_SHARE
        return self.rng.randint(*(LONG_ASK_GAP if long else ASK_GAP))

    def _opening(self) -> None:
        rng = self.rng
        if rng.random() < AGENT_FIRST:
            lead = rng.randint(*AGENT_FIRST_LEAD)
            self._say("agent", [self._unit("agent", f"greeting/{self.scope}")], gap=lead)
        elif rng.random() < GREETED:
            lead = rng.randint(*USER_FIRST_LEAD)
            self._say("user", [self._unit("user", "greet")], gap=lead)
            self._say("agent", [self._unit("agent", "reply")])
        # else a question opens: `_question` finds that nothing has been said.

    def _exchange(self, act: str, reply: str) -> None:
        self._say("user", [self._unit("user", act)], **self._lead())
        self._say("agent", [self._unit("agent", reply)])

    def _lead(self) -> dict[str, int]:
        return {} if self.said else {"gap": self.rng.randint(*USER_FIRST_LEAD)}

    def _story(self) -> None:
        """Two sentences of the user's; the agent says "mhm" over the second one's start or not."""
        rng = self.rng
        tone = rng.choice(list(self.grammar.talk.story))
        places = self.index.find(self.user, f"story/{tone}")
        lines = rng.sample(places, min(2, len(places)))
        self._say("user", lines, **self._lead())
        if len(lines) == 2 and rng.random() < 0.5:
            gap = rng.randint(14, 20)
            self._say("agent", [self._unit("agent", "listening")], gap=gap, kind="backchannel")
        self._say("agent", [self._unit("agent", f"reaction/{tone}")])

    def _question(self, name: str) -> None:
        rng, topic = self.rng, self.grammar.talk.topics[name]
        ask = self._ask(name)
        if ask is None:
            return
        refused = bool(topic.fact) and rng.random() < REFUSED
        answer = self._unit("agent", "refusal") if refused else self._answer(name)
        if answer is None:
            return
        if refused:
            self.refused.append(name)
        else:
            good = dict(self.index.units[ask].values).get("good", "")
            self._learn(name, answer, good)
        greets = not self.said and rng.random() < GREETED
        first = self._unit("user", "greet") if greets else None
        self._say("user", [first, ask], **self._lead())
        mood = 0.5 if self.mood != NEUTRAL else OPENER
        opener = self._unit("agent", "opener") if rng.random() < mood and not refused else None
        extra = self._unit("agent", f"extra/{self.scope}") if rng.random() < EXTRA else None
        if extra is not None and not refused:
            self._long_answer([opener, answer, extra])
        elif rng.random() < SHORT_CUT:
            self._cut_answer([opener, answer])
        else:
            self._say("agent", [opener, answer])

    def _ask(self, name: str) -> int | None:
        side = self.side if self.rng.random() < 0.5 else "train"
        found = self._unit("user", f"ask/{name}", side)
        return found if found is not None else self._unit("user", f"ask/{name}")

    def _answer(self, name: str) -> int | None:
        places = self.index.find(self.agent, f"answer/{name}", self.role, self.side)
        return self.rng.choice(places) if places else None

    def _learn(self, name: str, answer: int, good: str) -> None:
        """The prompt holds what is answered."""
        topic = self.grammar.talk.topics[name]
        value = self.index.units[answer].value(topic.slot)
        if name == "name":
            self.name = value
        elif name == "company":
            self.company = value
        self.facts.append(Fact(name, value, good))

    def _long_answer(self, units: Sequence[int | None]) -> None:
        """The user lets it pass, says "mhm", or cuts in."""
        rng = self.rng
        if rng.random() < CUT:
            self._cut_answer(units)
            return
        self._say("agent", units)
        if rng.random() < 0.5:
            gap = rng.randint(12, 24)
            self._say("user", [self._unit("user", "listening")], gap=gap, kind="backchannel")

    def _cut_answer(self, units: Sequence[int | None]) -> None:
        self._say("agent", units, cut=True, yields=self.rng.randint(*YIELD))
        self._say("user", [self._unit("user", "cut")], gap=0)
        self._say("agent", [self._unit("agent", "after_cut")])
