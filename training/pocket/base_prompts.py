"""What a prompt says of its character, in one of its wordings, and where it says which fact. Pure.

In training a part of the fact sentences have a word or two that are of other sentences: a fact is
found by its value and by what is left, as it must be where a wording is new. Now and then nothing
is left that tells it.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duplex.streams import Prompt, system_text
from training.pocket.codec_labels import IGNORED
from training.pocket.roles import Grammar, Side, filled, with_article, wordings

BETWEEN = " "  # sentences
SLIPPED, MOST_SLIPS = 0.2, 2  # of the fact sentences of training; words of each


@dataclass(frozen=True)
class Fact:
    """One fact that a prompt holds; `good` is what it is of, where its topic is of goods."""

    topic: str
    value: str
    good: str = ""


@dataclass(frozen=True)
class Character:
    """Who the agent is, and all that its prompt says."""

    role: str
    name: str
    company: str
    mood: str
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True)
class Told:
    """Where a text tells a fact: characters [start, end), from its value to its sentence's end."""

    topic: str
    start: int
    end: int


@dataclass(frozen=True)
class Prompted:
    """A prompt's text, and where it tells what."""

    text: str
    told: tuple[Told, ...] = ()


def worded(grammar: Grammar, character: Character, rng: random.Random, side: Side) -> Prompted:
    """The system text in one of its wordings, its facts in any order."""
    scope = grammar.scope_of(character.role)
    values = {"name": character.name, "company": character.company}
    if scope == "business":
        business = grammar.roles.businesses[character.role]
        values |= {"kind": business.kind, "a_kind": with_article(business.kind)}
        values |= {"title": business.title, "a_title": with_article(business.title)}
    else:
        values["who"] = grammar.roles.personal[character.role]
    sentences: list[tuple[str, Fact | None]] = []
    for fact in character.facts:
        topic = grammar.talk.topics[fact.topic]
        if topic.fact:
            template = rng.choice(wordings(topic.fact, side))
            if side == "train" and rng.random() < SLIPPED:
                template = _with_slips(template, grammar, rng)
            given = {"good": fact.good, topic.slot: fact.value}
            sentences.append((filled(template, given), fact))
    mood = rng.choice(wordings(grammar.talk.moods[character.mood].prompt, side))
    sentences += [(mood, None)] if mood else []
    rng.shuffle(sentences)
    head = rng.choice(wordings(grammar.talk.heads[scope], side))
    text = filled(head, {**values, "facts": BETWEEN.join(sentence for sentence, _ in sentences)})
    text = text.removesuffix(" Information:")  # where there is none
    return Prompted(text, tuple(_told(head, sentences, values)))


def _with_slips(template: str, grammar: Grammar, rng: random.Random) -> str:
    """A template in which up to two words, but no slot, are of any topic's sentence."""
    words = template.split()
    plain = [place for place, word in enumerate(words) if "{" not in word]
    others = [topic.fact for topic in grammar.talk.topics.values() if topic.fact]
    for place in rng.sample(plain, min(rng.randint(1, MOST_SLIPS), len(plain) // 2)):
        other = rng.choice(wordings(rng.choice(others), "train")).split()
        found = [word.strip(".,:").lower() for word in other if "{" not in word]
        mark = words[place][len(words[place].rstrip(".,:")) :]
        words[place] = rng.choice(found or ["it"]) + mark
    return " ".join(words)


def _told(
    head: str, sentences: Sequence[tuple[str, Fact | None]], values: Mapping[str, str]
) -> Iterator[Told]:
    """Where the filled head tells its facts; filling changes no length but those of slots."""
    at = 0
    for words, slot, _, _ in string.Formatter().parse(head):
        at += len(words)
        if slot == "facts":
            for sentence, fact in sentences:
                if fact is not None:
                    value = _last_word_match(fact.value, sentence)
                    yield Told(fact.topic, at + value, at + len(sentence))
                at += len(sentence) + len(BETWEEN)
            at -= len(BETWEEN) if sentences else 0
        elif slot:
            if slot in ("name", "company"):
                yield Told(slot, at, at + len(values[slot]))
            at += len(values[slot])


def _last_word_match(value: str, sentence: str) -> int:
    """Where a value stands in its sentence; 0 if it cannot be told."""
    found = list(re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", sentence, re.IGNORECASE))
    return found[-1].start() if found else 0


def told_row(
    tokenizer: Any, prompt: Prompt, prompted: Prompted, acts: Mapping[str, int]
) -> np.ndarray:
    """int16 [T] of a prompt's training codes: the question that the piece read last answers.

    Args:
        acts: numbers of what users do; `ask/TOPIC` is a question's.
    """
    row = np.full(prompt.num_frames - 1, IGNORED, dtype=np.int16)
    first = next((start for label, start, _ in prompt.training_spans() if label == "text"), 0)
    whole = system_text(prompted.text)
    lead = whole.index(prompted.text.strip())

    def in_bytes(place: int) -> int:
        return len(whole[: lead + place].encode())

    spans = [  # a piece's are in bytes
        (acts[f"ask/{told.topic}"], in_bytes(told.start), in_bytes(told.end))
        for told in prompted.told
        if f"ask/{told.topic}" in acts
    ]
    for place, piece in enumerate(tokenizer.encode(whole, return_type="proto").pieces):
        for act, start, end in spans:
            if piece.begin < end and piece.end > start:
                row[first + place + 1] = act  # place t has read the frame before it
    return row


def more_facts(
    grammar: Grammar,
    role: str,
    known: Sequence[Fact],
    count: int,
    rng: random.Random,
    side: Side,
    avoided: Sequence[str] = (),
) -> list[Fact]:
    """Up to `count` further facts that nobody asks for, of other topics or other goods."""
    taken = {fact.topic for fact in known} | set(avoided)
    goods = {fact.good for fact in known}
    found: list[Fact] = []
    for name in rng.sample(grammar.topics_of(role), len(grammar.topics_of(role))):
        topic = grammar.talk.topics[name]
        if len(found) == count:
            break
        if not topic.fact or (name in taken and not topic.good):
            continue
        if topic.slot == "good":
            value = rng.choice(grammar.roles.businesses[role].goods)
        else:
            value = rng.choice(grammar.values(topic.slot, side))
        good = ""
        if topic.good:
            left = [g for g in grammar.roles.businesses[role].goods if g not in goods]
            if not left or name in avoided:
                continue
            good = rng.choice(left)
            goods.add(good)
        found.append(Fact(name, value, good))
    return found
