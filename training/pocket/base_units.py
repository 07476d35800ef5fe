"""Which utterances are spoken: a fixed inventory that dialogues are put together from. Pure.

A unit is one sentence by one speaker. It is encoded once; a dialogue is drawn from the units, not
from audio, so that a few thousand of them give more dialogues than a training can ever see. An
agent's answers are drawn for each voice and mood, a user's questions for each voice and room.

An act is what a unit does: `ask/price`, `answer/price`, `refusal`, `greeting/business` …
`role` is that of the role whose goods or company the unit names; "" for a unit that fits all.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from training.pocket.base_voices import (
    AGENT_VOICES,
    Speaker,
    agent_speaker,
    gender_of,
    users,
)
from training.pocket.roles import Grammar, Side, Topic, filled, slots_in, wordings
from training.pocket.sentences import load_vocabulary, sentence

NEUTRAL = "neutral"
SAMPLE_ACT = "sample"
HEAR_ACT = "hear"
WORDS_ACT = "words"
ALOUD_ACT = "aloud"
LISTENING_ACT = "listening"
MOODY_ALOUD = 4  # in a mood an agent reads aloud a part of what it does without one
WORDS_A_UNIT = (2, 3, 3, 4)
ALOUD_VALUES = 0.5  # of what is read aloud: words of the grammar's values; else of a dictionary
WORDS_ALOUD = (3, 9)
FROM_DICTIONARY = 0.2  # of strange words; the others are of the grammar's values
WHOLLY_STRANGE = 0.4  # of strange values; of the others one word is another


@dataclass(frozen=True)
class Amounts:
    """Utterances of each act and speaker; the first number is that of a neutral agent."""

    answers: int = 64
    moody_answers: int = 16
    strange_answers: int = 32
    questions: int = 3
    good_questions: int = 12
    held_answers: int = 4
    others: int = 4
    user_others: int = 2
    samples: int = 16
    heard: int = 10
    words: int = 90
    aloud: int = 1600


SMALL = Amounts(
    answers=6,
    moody_answers=2,
    strange_answers=2,
    questions=1,
    good_questions=4,
    held_answers=1,
    others=2,
    user_others=1,
    samples=3,
    heard=4,
    words=4,
    aloud=8,
)


@dataclass(frozen=True)
class Unit:
    """values: (slot, value) of what the text names."""

    speaker: Speaker
    act: str
    text: str
    role: str = ""
    values: tuple[tuple[str, str], ...] = ()
    side: Side = "train"

    def value(self, slot: str) -> str:
        """
        Raises:
            KeyError: the unit does not name it.
        """
        return dict(self.values)[slot]


def inventory(grammar: Grammar, amounts: Amounts, seed: int) -> list[Unit]:
    """All units, in a fixed order; no two of a speaker have the same act and text."""
    units: list[Unit] = []
    for speaker in agent_speakers(grammar):
        rng = random.Random(f"{seed}/{speaker.id}")
        units += _distinct(_agent_units(grammar, speaker, amounts, rng))
    for speaker in user_speakers():
        rng = random.Random(f"{seed}/{speaker.id}")
        units += _distinct(_user_units(grammar, speaker, amounts, rng))
    vocabulary = words_of(unit for unit in units if unit.side == "train")
    for speaker in user_speakers():
        rng = random.Random(f"{seed}/words/{speaker.id}")
        units += _distinct(_word_units(vocabulary, speaker, amounts.words, rng))
    return units


def words_of(units: Iterable[Unit]) -> list[str]:
    """All words that dialogues are made of, in lower case and order."""
    texts = (unit.text for unit in units if unit.act not in (HEAR_ACT, SAMPLE_ACT, ALOUD_ACT))
    return sorted(
        {word.lower() for text in texts for word in re.findall(r"[A-Za-z][A-Za-z']*", text)}
    )


def _word_units(
    vocabulary: Sequence[str], speaker: Speaker, count: int, rng: random.Random
) -> Iterator[Unit]:
    """Words in an order that says nothing: who writes them down has heard them."""
    for _ in range(count):
        text = " ".join(rng.sample(vocabulary, rng.choice(WORDS_A_UNIT)))
        yield Unit(speaker, WORDS_ACT, f"{text}.")


def acts_of(units: Iterable[Unit]) -> list[str]:
    """What users do by what they say, in order; what fits anywhere is left out."""
    anywhere = (HEAR_ACT, WORDS_ACT, LISTENING_ACT)
    return sorted({u.act for u in units if u.speaker.side == "user" and u.act not in anywhere})


def agent_speakers(grammar: Grammar) -> list[Speaker]:
    return [agent_speaker(voice, mood) for voice in AGENT_VOICES for mood in grammar.talk.moods]


def user_speakers() -> list[Speaker]:
    return [*users("train"), *users("held")]


def company_of(grammar: Grammar, role: str, surname: str) -> str:
    return f"{surname} {grammar.roles.businesses[role].suffix}"


def _distinct(units: Iterable[Unit]) -> list[Unit]:
    found = {(u.act, u.role, u.values, u.text, u.side): u for u in units}
    return list(found.values())


# -- the agent's


def _agent_units(
    grammar: Grammar, speaker: Speaker, amounts: Amounts, rng: random.Random
) -> Iterator[Unit]:
    talk, mood = grammar.talk, grammar.talk.moods[speaker.state]
    neutral = speaker.state == NEUTRAL
    count = amounts.answers if neutral else amounts.moody_answers
    words = of_values, _ = _any_words(grammar)
    for name, topic in talk.topics.items():
        yield from _answers(grammar, speaker, name, topic, "train", count, rng)
        if neutral:
            held = amounts.held_answers
            yield from _answers(grammar, speaker, name, topic, "held", held, rng)
            strange = amounts.strange_answers
            plain = _answers(grammar, speaker, name, topic, "train", strange, rng)
            yield from _strange(plain, grammar, words, rng)
    fixed = {
        "opener": mood.opener,
        "feeling": mood.feeling,
        "refusal": talk.refusal,
        "reply": talk.greet.reply,
        "after_cut": talk.after_cut,
        "listening": talk.listening,
        "bye": talk.bye.agent,
        **{f"small/{name}": pair.agent for name, pair in talk.small.items()},
        **{f"reaction/{name}": story.reaction for name, story in talk.story.items()},
        **{f"greeting/{scope}": lines for scope, lines in talk.greeting.items()},
        **{f"extra/{scope}": lines for scope, lines in talk.extra.items()},
    }
    for act, lines in fixed.items():
        few = amounts.others if neutral else amounts.others - 1
        for line in _some(lines, few, rng):
            yield Unit(speaker, act, line)
    if neutral:
        yield from _samples(grammar, speaker, amounts.samples, rng)
    vocabulary = load_vocabulary(held_out=False)
    for _ in range(amounts.aloud if neutral else amounts.aloud // MOODY_ALOUD):
        if rng.random() < ALOUD_VALUES:
            chosen = rng.choices(of_values, k=rng.randint(*WORDS_ALOUD))
            yield Unit(speaker, ALOUD_ACT, f"{' '.join(chosen).capitalize()}.")
        else:
            yield Unit(speaker, ALOUD_ACT, sentence(vocabulary, rng, own=False))


def _answers(
    grammar: Grammar,
    speaker: Speaker,
    name: str,
    topic: Topic,
    side: Side,
    count: int,
    rng: random.Random,
) -> Iterator[Unit]:
    templates = wordings(topic.answer, "train")
    roles = list(grammar.roles.businesses)
    for number in range(count):
        role, values = "", {}
        if topic.slot in ("company", "good"):
            role = roles[(number + rng.randrange(2) * count) % len(roles)]
        if topic.slot == "company":
            surname = rng.choice(grammar.values("surname", side))
            values["company"] = company_of(grammar, role, surname)
        elif topic.slot == "good":
            values["good"] = rng.choice(grammar.roles.businesses[role].goods)
        else:
            slot = gender_of(speaker.voice) if topic.slot == "name" else topic.slot
            values[topic.slot] = rng.choice(grammar.values(slot, side))
        text = filled(rng.choice(templates), values)
        yield Unit(speaker, f"answer/{name}", text, role, tuple(values.items()), side)


def is_held_out(slot: str, value: str, grammar: Grammar) -> bool:
    """Whether a slot's value, or the name in a company's, is one that training must not hold."""
    own = "surname" if slot == "company" else slot
    if own not in grammar.slots:
        return False  # goods, of which none is held out
    known = grammar.values(own, "train")
    held = {held.lower() for held in grammar.values(own, "held") if held not in known}
    words = value.lower().split()
    return value.lower() in held or (slot == "company" and any(word in held for word in words))


def _any_words(grammar: Grammar) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words of all values of training, and those of a dictionary."""
    values = (value for slot in grammar.slots for value in grammar.values(slot, "train"))
    own = {word.lower() for value in values for word in value.split()}
    return tuple(sorted(own)), load_vocabulary(held_out=False).words


def _strange(
    answers: Iterable[Unit],
    grammar: Grammar,
    words: tuple[tuple[str, ...], tuple[str, ...]],
    rng: random.Random,
) -> Iterator[Unit]:
    """The answers with other values: a word of each, or all of it, is any word. Who gives them has
    read them in the prompt; there is next to nothing to guess them by.

    An answer stays as it is where its new value would be held out, or a name of the other sex,
    and is left out where it begins with its value.
    """

    def any_word() -> str:
        return rng.choice(words[rng.random() < FROM_DICTIONARY])

    for unit in answers:
        ((slot, value), *others) = unit.values
        told = value.split()
        if len(told) == 1 or rng.random() < WHOLLY_STRANGE:
            told = [any_word() for _ in range(rng.randint(1, min(2, len(told))))]
        elif slot == "company":
            told[0] = any_word()
        else:
            told[rng.randrange(len(told))] = any_word()
        if slot in ("name", "company"):
            told[0] = told[0].capitalize()
        new = " ".join(told)
        if is_held_out(slot, new, grammar) or (slot == "name" and new in grammar.slots["name"]):
            yield unit
        elif value in unit.text:
            values = ((slot, new), *others)
            text = unit.text.replace(value, new)
            yield replace(unit, text=text[:1].upper() + text[1:], values=values)


def _samples(grammar: Grammar, speaker: Speaker, count: int, rng: random.Random) -> Iterator[Unit]:
    """What a voice is sampled from: two sentences of small talk, two to four seconds."""
    pairs = grammar.talk.small.values()
    short = [line for pair in pairs for line in pair.agent]
    long = [line for lines in grammar.talk.extra.values() for line in lines]
    for _ in range(count):
        text = " ".join((rng.choice(short), rng.choice(long)))
        yield Unit(speaker, SAMPLE_ACT, text)


# -- the user's


def _user_units(
    grammar: Grammar, speaker: Speaker, amounts: Amounts, rng: random.Random
) -> Iterator[Unit]:
    talk = grammar.talk
    sides: tuple[Side, ...] = ("train", "held") if speaker.is_held_out else ("train",)
    for name, topic in talk.topics.items():
        for side in sides:
            lines = wordings(topic.ask, side)
            if topic.good:
                yield from _good_questions(grammar, speaker, name, lines, side, amounts, rng)
                continue
            for line in _some(lines, amounts.questions, rng):
                yield Unit(speaker, f"ask/{name}", line, side=side)
    fixed = {
        "greet": talk.greet.user,
        "feeling": wordings(talk.feeling, "train"),
        "cut": talk.cut,
        "listening": talk.listening,
        "bye": talk.bye.user,
        **{f"small/{name}": pair.user for name, pair in talk.small.items()},
        **{f"story/{name}": story.lines for name, story in talk.story.items()},
    }
    for act, lines in fixed.items():
        for line in _some(lines, amounts.user_others, rng):
            yield Unit(speaker, act, line)
    vocabulary = load_vocabulary(held_out=speaker.is_held_out)
    for _ in range(amounts.heard):
        yield Unit(speaker, HEAR_ACT, sentence(vocabulary, rng))


def _good_questions(
    grammar: Grammar,
    speaker: Speaker,
    name: str,
    lines: Sequence[str],
    side: Side,
    amounts: Amounts,
    rng: random.Random,
) -> Iterator[Unit]:
    roles = list(grammar.roles.businesses)
    start = rng.randrange(len(roles))  # no speaker has all of them
    for number in range(amounts.good_questions):
        role = roles[(start + number) % len(roles)]
        good = rng.choice(grammar.roles.businesses[role].goods)
        line = rng.choice(lines)
        assert "good" in slots_in(line)
        text = filled(line, {"good": good})
        yield Unit(speaker, f"ask/{name}", text, role, (("good", good),), side)


def _some(lines: Sequence[str], count: int, rng: random.Random) -> list[str]:
    return rng.sample(lines, min(count, len(lines)))


class UnitIndex:
    """Places of units by speaker and act, and by role where they name something of a role's."""

    def __init__(self, units: Sequence[Unit]):
        self.units = units
        self._places: dict[tuple[str, str, Side], list[int]] = {}
        for place, unit in enumerate(units):
            self._places.setdefault((unit.speaker.id, unit.act, unit.side), []).append(place)

    def find(self, speaker: Speaker, act: str, role: str = "", side: Side = "train") -> list[int]:
        """Units that the speaker has for an act in a role; empty where there is none."""
        places = self._places.get((speaker.id, act, side), [])
        return [place for place in places if self.units[place].role in ("", role)]
