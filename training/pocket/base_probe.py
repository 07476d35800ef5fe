"""The pocket base speaks freely: held-out users ask, on a fixed timetable, and it answers.

Each run is one character with a prompt of its own, asked up to five questions by a voice that
training never heard, one every six seconds or so, whatever the agent does. In half of the runs
the prompt is worded as training never was, and so are the questions of most topics; up to half of
the facts have values that no prompt of training held. One question in six asks for what the prompt
lacks.

To see whether the agent yields, a batch runs twice with the same seed. In the second run the user
cuts in where the agent was speaking in the first. Up to there both are equal to the bit, since
noise is drawn by place and not by content: what differs is the agent's reaction.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duplex.config import SamplingSection
from duplex.streams import AGENT_ROWS, TEXT_PAD, TEXT_ROW, USER_ROWS, build_prompt, prompt_tokens
from training.batches import Clip
from training.free_running import FreeRun, run_freely
from training.pocket.base_bank import Bank
from training.pocket.base_measures import Question, place_to_cut
from training.pocket.base_prompts import Character, Fact, more_facts, worded
from training.pocket.base_units import NEUTRAL, SAMPLE_ACT, UnitIndex, company_of
from training.pocket.base_voices import (
    AGENT_VOICES,
    Speaker,
    agent_speaker,
    gender_of,
    users,
)
from training.pocket.roles import Grammar, Side

SAMPLING = SamplingSection(text_temperature=0.1, text_topk=10, audio_temperature=0.1, audio_topk=50)
RUN_FRAMES = 375  # 30 s
LEAD_FRAMES = 5
WAIT_FRAMES = 54  # from the end of a question to the next one
REFUSED = 1 / 6
CUT_INTO = 9  # frames of speech before the user cuts in


@dataclass(frozen=True)
class Probe:
    """One run to be made. sample: place of the voice sample's unit, or None; asked: places of the
    user's units, one for each question."""

    character: Character
    prompt: str
    agent_voice: str
    user: Speaker
    sample: int | None
    asked: tuple[int, ...]
    questions: tuple[Question, ...]


def draw_probe(
    grammar: Grammar,
    bank: Bank,
    index: UnitIndex,
    rng: random.Random,
    asking: Sequence[Speaker] = tuple(users("held")),
) -> Probe:
    """A run's character, prompt and questions. asking: users, one of whom asks."""
    voice = rng.choice(list(AGENT_VOICES))
    user = rng.choice(asking)
    role = rng.choice(grammar.role_ids)
    wording: Side = rng.choice(("train", "held"))
    sides: dict[str, Side] = {}
    name = _value(grammar, gender_of(voice), "name", sides, rng)
    company = ""
    if grammar.scope_of(role) == "business":
        company = company_of(grammar, role, _value(grammar, "surname", "company", sides, rng))
    asked: list[tuple[int, Fact | None, str]] = []
    facts: list[Fact] = []
    refused: list[str] = []
    topics = grammar.topics_of(role)
    for topic in rng.sample(topics, len(topics)):
        unit = _ask(index, user, topic, role, wording, rng)
        if unit is None or len(asked) == 5:
            continue
        if grammar.talk.topics[topic].fact and rng.random() < REFUSED:
            asked.append((unit, None, topic))
            refused.append(topic)
            continue
        fact = _fact(grammar, bank, topic, unit, role, (name, company), sides, rng)
        facts += [fact] if grammar.talk.topics[topic].fact else []
        asked.append((unit, fact, topic))
    facts += more_facts(grammar, role, facts, rng.randint(0, 2), rng, "train", refused)
    character = Character(role, name, company, NEUTRAL, tuple(facts))
    samples = index.find(agent_speaker(voice, NEUTRAL), SAMPLE_ACT)
    sample = rng.choice(samples) if rng.random() < 0.5 else None
    questions, units, at = [], [], LEAD_FRAMES
    for unit, fact, topic in asked:
        end = at + bank.speech_frames(unit)
        if end + WAIT_FRAMES // 2 > RUN_FRAMES:
            break
        says = None if fact is None else fact.value
        others = _others(grammar, topic, role, says)
        held = sides.get(topic) == "held"
        asked_held = bank.units[unit].side == "held"  # not every voice has such a question
        questions.append(
            Question(at, end, topic, says, others, held, wording == "held", asked_held)
        )
        units.append(unit)
        at = end + WAIT_FRAMES
    prompt = worded(grammar, character, rng, wording).text
    return Probe(character, prompt, voice, user, sample, tuple(units), tuple(questions))


def _ask(
    index: UnitIndex, user: Speaker, topic: str, role: str, side: Side, rng: random.Random
) -> int | None:
    places = index.find(user, f"ask/{topic}", role, side) or index.find(user, f"ask/{topic}", role)
    return rng.choice(places) if places else None


def _fact(
    grammar: Grammar,
    bank: Bank,
    topic: str,
    unit: int,
    role: str,
    known: tuple[str, str],
    sides: dict[str, Side],
    rng: random.Random,
) -> Fact:
    if topic in ("name", "company"):
        return Fact(topic, known[topic == "company"])
    section = grammar.talk.topics[topic]
    good = dict(bank.units[unit].values).get("good", "")
    if section.slot == "good":
        return Fact(topic, rng.choice(grammar.roles.businesses[role].goods))
    return Fact(topic, _value(grammar, section.slot, topic, sides, rng), good)


def _value(
    grammar: Grammar, slot: str, topic: str, sides: dict[str, Side], rng: random.Random
) -> str:
    """A value of either side, noted in `sides`; those of short lists are all of training's."""
    side: Side = rng.choice(("train", "held"))
    value = rng.choice(grammar.values(slot, side))
    known = any(value in grammar.values(other, "train") for other in grammar.slots)
    sides[topic] = "train" if known else "held"
    return value


def _others(grammar: Grammar, topic: str, role: str, says: str | None) -> tuple[str, ...]:
    """All other values that an answer on a topic could have."""
    slot = grammar.talk.topics[topic].slot
    if slot == "good":
        every = tuple(grammar.roles.businesses[role].goods)
    elif slot == "company":
        every = ()
    else:
        every = (*grammar.values(slot, "train"), *grammar.values(slot, "held"))
    return tuple(value for value in every if value != says)


# -- runs


def probe_clip(
    probe: Probe, bank: Bank, tokenizer: Any, cut: tuple[int, int] | None, name: str
) -> Clip:
    """What a free run is given: the prompt, and the user's codes behind it.

    Args:
        cut: frame and unit of an interruption; it takes the place of what was there.
    """
    silence = np.asarray(bank.tokens.silence)[:, None]
    codes = np.zeros((17, RUN_FRAMES), dtype=np.int64)
    codes[TEXT_ROW], codes[AGENT_ROWS] = TEXT_PAD, silence
    noise = bank.rooms[probe.user.state]
    codes[USER_ROWS] = noise[:, np.arange(RUN_FRAMES) % noise.shape[1]]
    if probe.user.state == "quiet":
        codes[USER_ROWS] = silence
    said = [(q.start, unit) for q, unit in zip(probe.questions, probe.asked, strict=True)]
    for start, unit in (*said, *([cut] if cut else [])):
        part = bank.codes[unit][:, : RUN_FRAMES - start]
        codes[USER_ROWS, start : start + part.shape[1]] = part
    voice = None if probe.sample is None else bank.codes[probe.sample].astype(np.int64)
    tokens = prompt_tokens(tokenizer, probe.prompt)
    prompt = build_prompt(tokens, bank.tokens, voice=voice).training_codes()
    whole = np.concatenate([prompt, codes], axis=1).astype(np.int16)
    return Clip(name, whole, prompt.shape[1], prompt.shape[1])


def run_probes(
    lm: Any,
    probes: Sequence[Probe],
    bank: Bank,
    tokenizer: Any,
    seed: int,
    cuts: Sequence[tuple[int, int] | None] | None = None,
) -> list[FreeRun]:
    """One batch of runs. cuts: of each run, the frame and the unit of an interruption."""
    chosen = cuts or [None] * len(probes)
    clips = [
        probe_clip(probe, bank, tokenizer, cut, f"probe-{number}")
        for number, (probe, cut) in enumerate(zip(probes, chosen, strict=True))
    ]
    return run_freely(lm, clips, RUN_FRAMES, SAMPLING, seed)


def choose_cut(
    probe: Probe, speaking: np.ndarray, index: UnitIndex, rng: random.Random
) -> tuple[int, int] | None:
    """Where and with what the user cuts in on an agent that was `speaking` (bool [T])."""
    units = index.find(probe.user, "cut")
    starts = [*(q.start for q in probe.questions[1:]), RUN_FRAMES]
    for question, before in zip(probe.questions, starts, strict=True):
        cut = place_to_cut(speaking, question.end, before, CUT_INTO)
        if cut is not None and units:
            return cut, rng.choice(units)
    return None
