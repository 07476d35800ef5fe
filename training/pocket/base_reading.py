"""Clips that teach to read, before hearing and speaking: facts of the prompt, said in silence.

Behind an ordinary prompt the agent says its facts in any order, one sentence after the other, in
the text row alone; all audio rows hold the codec's silence and carry no loss. Nothing needs to be
understood but the prompt, and a clip is a third as long as a dialogue: so attention learns to copy
from the prompt early. Half of the values are a slot's, half any words of the grammar, so that what
is copied is what stands there and not what is likely.

Shapes: T frames.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from duplex.streams import (
    AGENT_ROWS,
    TEXT_PAD,
    TEXT_ROW,
    USER_ROWS,
    CodecTokens,
    build_prompt,
    prompt_tokens,
)
from training.batches import Clip
from training.pocket.base_clips import TrainingClip
from training.pocket.base_labels import TOLD, no_labels
from training.pocket.base_prompts import Character, Fact, more_facts, told_row, worded
from training.pocket.base_units import company_of, is_held_out
from training.pocket.roles import Grammar, filled, wordings

FACTS = (2, 6)
ANY_WORDS = 0.5  # of the values
GAP = (1, 4)
TAIL = 4


def reading_clip(
    grammar: Grammar,
    tokenizer: Any,
    tokens: CodecTokens,
    words: Sequence[str],
    rng: random.Random,
    name: str,
    acts: Mapping[str, int],
) -> TrainingClip:
    """A prompt and its facts as text.

    Args:
        words: of which half of the values are made.
        acts: numbers of what users do, for the labels of the prompt's facts (`told_row`).
    """
    character, facts = _character(grammar, words, rng)
    prompted = worded(grammar, character, rng, "train")
    prompt = build_prompt(prompt_tokens(tokenizer, prompted.text), tokens)
    head = prompt.training_codes()
    row: list[int] = []
    for fact in facts:
        topic = grammar.talk.topics[fact.topic]
        sentence = filled(
            rng.choice(wordings(topic.answer, "train")), {"good": fact.good, topic.slot: fact.value}
        )
        row += [TEXT_PAD] * rng.randint(*GAP) + list(tokenizer.encode(sentence))
    row += [TEXT_PAD] * TAIL
    codes = np.zeros((17, len(row)), dtype=np.int64)
    codes[TEXT_ROW] = row
    codes[AGENT_ROWS] = codes[USER_ROWS] = np.asarray(tokens.silence)[:, None]
    frames = head.shape[1]
    whole = np.concatenate([head, codes], axis=1).astype(np.int16)
    labels = no_labels(whole.shape[1])
    labels[:frames, TOLD] = told_row(tokenizer, prompt, prompted, acts)[:, None]
    silent = np.zeros(whole.shape[1], dtype=bool)
    return TrainingClip(Clip(name, whole, frames, frames), silent, labels)


def _character(
    grammar: Grammar, words: Sequence[str], rng: random.Random
) -> tuple[Character, list[Fact]]:
    def drawn(slot: str, value: str, most: int = 1) -> str:
        """The value, or any words that are not a held-out one."""
        if rng.random() > ANY_WORDS:
            return value
        other = " ".join(rng.sample(words, rng.randint(1, most)))
        return value if is_held_out(slot, other, grammar) else other

    role = rng.choice(grammar.role_ids)
    name = drawn("name", rng.choice(grammar.values("name", "train"))).capitalize()
    company = ""
    said = [Fact("name", name)]
    if grammar.scope_of(role) == "business":
        surname = drawn("surname", rng.choice(grammar.values("surname", "train"))).capitalize()
        company = company_of(grammar, role, surname)
        said.append(Fact("company", company))
    slots = {name: topic.slot for name, topic in grammar.talk.topics.items()}
    facts = more_facts(grammar, role, [], rng.randint(*FACTS), rng, "train")
    facts = [replace(fact, value=drawn(slots[fact.topic], fact.value, most=3)) for fact in facts]
    mood = rng.choice(list(grammar.talk.moods))
    said += facts
    rng.shuffle(said)
    return Character(role, name, company, mood, tuple(facts)), said
