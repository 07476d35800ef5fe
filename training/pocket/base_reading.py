"""Clips that teach to read, before hearing and speaking: facts of the prompt, said in silence.

Behind an ordinary prompt the agent says its facts in any order, one sentence after the other, in
the text row alone; all audio rows hold the codec's silence and carry no loss. Nothing needs to be
understood but the prompt, values come from all of a slot's training values, and a clip is a third
as long as a dialogue: so attention learns to copy from the prompt early.

Shapes: T frames.
"""

from __future__ import annotations

import random
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
from training.pocket.base_dialogue import Character, Fact, more_facts, prompt_text
from training.pocket.base_units import company_of
from training.pocket.roles import Grammar, filled, wordings

FACTS = (2, 6)
GAP = (1, 4)
TAIL = 4


def reading_clip(
    grammar: Grammar, tokenizer: Any, tokens: CodecTokens, rng: random.Random, name: str
) -> TrainingClip:
    """A prompt and its facts as text."""
    character, facts = _character(grammar, rng)
    prompt = prompt_text(grammar, character, rng, "train")
    head = build_prompt(prompt_tokens(tokenizer, prompt), tokens).training_codes()
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
    return TrainingClip(Clip(name, whole, frames, frames), np.zeros(whole.shape[1], dtype=bool))


def _character(grammar: Grammar, rng: random.Random) -> tuple[Character, list[Fact]]:
    role = rng.choice(grammar.role_ids)
    name = rng.choice(grammar.values("name", "train"))
    company = ""
    said = [Fact("name", name)]
    if grammar.scope_of(role) == "business":
        company = company_of(grammar, role, rng.choice(grammar.values("surname", "train")))
        said.append(Fact("company", company))
    facts = more_facts(grammar, role, [], rng.randint(*FACTS), rng, "train")
    mood = rng.choice(list(grammar.talk.moods))
    said += facts
    rng.shuffle(said)
    return Character(role, name, company, mood, tuple(facts)), said
