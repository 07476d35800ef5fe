"""From a scenario's arc to a plan of beats of the wanted length.

A plan is a row of segments: exchanges with those of their beats that are used. It is grown or
trimmed exchange by exchange at random until it has the drawn number of turns, and drawn again
when it got stuck. Beats of one role in a row become one turn, so turns always alternate.
Cost: about 1.3 ms for 8 to 10 turns, 0.6 ms for 25, on one core.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import groupby

from duplex.base import Role
from duplex.characters import Beat, Scenario
from duplex.errors import DataFileError, RequestError
from pipeline.engines.scripted_grammar import Exchange, Grammar

# How a plan is sought, one way after the other: how often, whether exchanges are dropped by rank,
# and the highest rank that may go. The last way leaves fragments without hello and goodbye; only
# dialogues of a few turns come to it.
_WAYS = ((50, True, 4), (100, False, 4), (1000, False, 5))
_STEPS = 60  # far more than the exchanges that any plan can hold
UNKNOWN = "unknown"  # the exchange that asks what no prompt answers
MIN_FACTS = 2  # what a customer must tell in every conversation


@dataclass(frozen=True)
class Segment:
    exchange: Exchange
    intents: tuple[str, ...]


def split_arc(scenario: Scenario, grammar: Grammar) -> list[Segment]:
    """The arc as segments. Raises DataFileError for an intent or a role that nobody knows."""
    for position, beat in enumerate(scenario.arc):
        role = grammar.roles.get(beat.intent)
        if role != beat.role:
            found = f"which is spoken by {role}" if role else "which is not in exchanges.yaml"
            raise DataFileError(
                f"scenario {scenario.id}, beat {position}: the arc has {beat.role} say "
                f"{beat.intent}, {found}; the intents are: {', '.join(sorted(grammar.roles))}"
            )
    segments: list[Segment] = []
    for name, beats in groupby(scenario.arc, key=lambda beat: grammar.owners[beat.intent].name):
        intents = tuple(beat.intent for beat in beats)
        exchange = grammar.owners[intents[0]]
        if not _in_order(intents, exchange.intents):
            raise DataFileError(
                f"scenario {scenario.id}: the beats of the exchange {name} must come in the order "
                f"{', '.join(exchange.intents)}, found {', '.join(intents)}"
            )
        segments.append(Segment(exchange, intents))
    return segments


def plan_beats(
    scenario: Scenario, grammar: Grammar, rng: random.Random, *, min_turns: int, max_turns: int
) -> list[Beat]:
    """Beats that make `min_turns` to `max_turns` turns and tell at least two facts.

    Raises RequestError when the grammar cannot fill so many, or the arc cannot be cut so short.
    """
    if not 2 <= min_turns <= max_turns:
        raise RequestError(
            f"a dialogue needs 2 <= min_turns <= max_turns, found {min_turns} and {max_turns}"
        )
    arc = split_arc(scenario, grammar)
    exchanges = [e for e in grammar.exchanges if e.name != UNKNOWN or scenario.unanswerable]
    aim = rng.randint(min_turns, max_turns)
    reached: set[int] = set()
    for attempts, by_rank, highest in _WAYS:
        for _ in range(attempts):
            # The first way keeps to one length, so that lengths spread evenly.
            target = aim if by_rank else rng.randint(min_turns, max_turns)
            segments = _fit(arc, grammar, exchanges, rng, target, by_rank=by_rank, highest=highest)
            length = _length(segments, grammar)
            if len(_told(segments)) >= MIN_FACTS:
                reached.add(length)
                if min_turns <= length <= max_turns:
                    return [
                        Beat(role=grammar.roles[intent], intent=intent)
                        for segment in segments
                        for intent in segment.intents
                    ]
    lengths = f"{min(reached)} to {max(reached)}" if reached else "no"
    raise RequestError(
        f"the scripted writer must tell {MIN_FACTS} facts in {min_turns} to {max_turns} turns of "
        f"the scenario {scenario.id}; the plans that tell them have {lengths} turns. "
        f"Ask for another length (dialogues.min_turns, dialogues.max_turns) or change the arc"
    )


def _fit(
    arc: list[Segment],
    grammar: Grammar,
    exchanges: list[Exchange],
    rng: random.Random,
    target: int,
    *,
    by_rank: bool,
    highest: int,
) -> list[Segment]:
    segments = list(arc)
    for _ in range(_STEPS):
        length = _length(segments, grammar)
        if length > target:
            removable = [s for s in segments if 0 < (s.exchange.drop or 0) <= highest]
            if by_rank:
                lowest = min((s.exchange.drop or 0 for s in removable), default=0)
                removable = [s for s in removable if s.exchange.drop == lowest]
            if not removable:
                break
            _remove(segments, rng.choice(removable))
        elif length < target:
            addable = [exchange for exchange in exchanges if _may_add(exchange, segments)]
            if len(_told(segments)) < MIN_FACTS:  # first things first
                addable = [exchange for exchange in addable if exchange.name != UNKNOWN]
            if not addable:
                break
            (exchange,) = rng.choices(addable, [exchange.weight for exchange in addable])
            _insert(segments, exchange, grammar, rng)
        else:
            break
    return segments


def _told(segments: list[Segment]) -> set[str]:
    return {fact for segment in segments for fact in segment.exchange.tells}


def _length(segments: list[Segment], grammar: Grammar) -> int:
    roles: list[Role] = [grammar.roles[intent] for s in segments for intent in s.intents]
    return sum(1 for _ in groupby(roles))


def _remove(segments: list[Segment], segment: Segment) -> None:
    position = next(i for i, present in enumerate(segments) if present is segment)
    del segments[position]
    names = {s.exchange.name for s in segments}
    orphans = [s for s in segments if s.exchange.needs and not names & set(s.exchange.needs)]
    for orphan in orphans:
        if orphan.exchange.drop is not None:
            segments[:] = [s for s in segments if s is not orphan]


def _may_add(exchange: Exchange, segments: list[Segment]) -> bool:
    present = [segment.exchange for segment in segments]
    names = [other.name for other in present]
    return (
        bool(exchange.grow)
        and names.count(exchange.name) < exchange.repeats
        and (not exchange.needs or any(name in names for name in exchange.needs))
        and not any(name in names for name in exchange.not_with)
        and not any(exchange.name in other.not_with for other in present)
    )


def _insert(
    segments: list[Segment], exchange: Exchange, grammar: Grammar, rng: random.Random
) -> None:
    ranks = {other.name: rank for rank, other in enumerate(grammar.exchanges)}
    own = ranks[exchange.name]
    # A new object each time: `_remove` tells two chats apart by identity.
    segment = Segment(exchange, rng.choice(exchange.grow))
    fixed = [i for i, s in enumerate(segments) if not s.exchange.roams]
    after = next((i for i in fixed if ranks[segments[i].exchange.name] > own), len(segments))
    if exchange.roams:
        first = 1 + next(i for i in fixed if "order" in segments[i].exchange.tells)
        after = rng.randint(min(first, after), after)
    segments.insert(after, segment)


def _in_order(intents: tuple[str, ...], beats: tuple[str, ...]) -> bool:
    remaining = iter(beats)
    return all(intent in remaining for intent in intents)
