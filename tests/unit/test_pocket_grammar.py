"""The pocket base's grammar: filled sentences, facts that are the prompt's, and a clean split."""

import random
import re

import pytest

from duplex.datafiles import load_personas
from duplex.errors import DataFileError
from duplex.metrics import says_any
from training.pocket.base_dialogue import draw_dialogue
from training.pocket.base_reading import _character
from training.pocket.base_units import WORDS_ACT, Amounts, UnitIndex, inventory, words_of
from training.pocket.base_voices import HELD_USER_VOICES, USER_VOICES, gender_of
from training.pocket.roles import (
    GRAMMAR_FOLDER,
    HELD_OUT_MARK,
    filled,
    load_grammar,
    slots_in,
    with_article,
    wordings,
)

DIALOGUES = 300


@pytest.fixture(scope="module")
def grammar():
    return load_grammar()


@pytest.fixture(scope="module")
def units(grammar):
    return inventory(grammar, Amounts(), 0)


@pytest.fixture(scope="module")
def dialogues(grammar, units):
    index = UnitIndex(units)
    return [
        draw_dialogue(grammar, index, random.Random(seed), side)
        for seed in range(DIALOGUES)
        for side in ("train", "held")
    ]


def said_text(units, dialogue):
    return [(s.role, " ".join(units[u].text for u in s.units)) for s in dialogue.said]


def test_every_slot_is_filled(units, dialogues):
    texts = [unit.text for unit in units] + [dialogue.prompt.text for dialogue in dialogues]
    bad = [text for text in texts if re.search(r"[{}~]|\s\s|\s[.,?]|\bNone\b", text)]
    assert not bad, bad[:3]
    words = {unit.text for unit in units if unit.act == WORDS_ACT}
    assert all(text[-1] in ".?!" and (text[0].isupper() or text in words) for text in texts)


def test_no_two_units_of_a_speaker_are_the_same(units):
    keys = [(u.speaker.id, u.act, u.role, u.values, u.text, u.side) for u in units]
    assert len(set(keys)) == len(keys)


def test_answers_hold_what_the_prompt_holds(grammar, units, dialogues):
    answers = 0
    for dialogue in dialogues:
        for said in dialogue.said:
            for unit in (units[u] for u in said.units if units[u].act.startswith("answer/")):
                slot = grammar.talk.topics[unit.act.removeprefix("answer/")].slot
                value = unit.value(slot)
                assert says_any(unit.text, [value])
                assert says_any(dialogue.prompt.text, [value]), (unit.text, dialogue.prompt.text)
                answers += 1
    assert answers > DIALOGUES


def test_a_refused_fact_is_not_in_the_prompt(grammar, units, dialogues):
    refused = 0
    for dialogue in dialogues:
        known = {(fact.topic, fact.good) for fact in dialogue.character.facts}
        for before, after in zip(dialogue.said, dialogue.said[1:], strict=False):
            if units[after.units[0]].act != "refusal":
                continue
            asked = next(units[u] for u in before.units if units[u].act.startswith("ask/"))
            topic = asked.act.removeprefix("ask/")
            assert (topic, dict(asked.values).get("good", "")) not in known
            assert units[after.units[0]].text in grammar.talk.refusal
            refused += 1
    assert refused > 20


def test_a_price_is_that_of_the_good_that_was_asked_for(units, dialogues):
    checked = 0
    for dialogue in dialogues:
        prices = {f.good: f.value for f in dialogue.character.facts if f.topic == "price"}
        for before, after in zip(dialogue.said, dialogue.said[1:], strict=False):
            answer = next((units[u] for u in after.units if units[u].act == "answer/price"), None)
            if answer:
                good = next(units[u] for u in before.units if units[u].act == "ask/price")
                assert prices[good.value("good")] == answer.value("price")
                checked += 1
    assert checked > 20


@pytest.mark.slow  # four seconds of a core
def test_the_same_seed_draws_the_same(grammar, units):
    index = UnitIndex(units)
    first, again, other = (
        draw_dialogue(grammar, index, random.Random(seed)) for seed in ("a", "a", "b")
    )
    assert first == again and first != other
    assert inventory(grammar, Amounts(), 0) == units
    assert inventory(grammar, Amounts(), 1) != units


def held_values(grammar, slot):
    own = "surname" if slot == "company" else slot
    if own not in grammar.slots:
        return set()
    held = set(grammar.values(own, "held")) - set(grammar.values(own, "train"))
    return {value.lower() for value in held}


def is_held_out(grammar, slot, value):
    held = held_values(grammar, slot)
    return value.lower() in held or (slot == "company" and bool(held & {*value.lower().split()}))


def test_no_answer_of_training_has_a_held_out_value(grammar, units):
    answers = [u for u in units if u.act.startswith("answer/") and u.side == "train"]
    assert len(answers) > 10_000
    for slot, value in {one for unit in answers for one in unit.values}:
        assert not is_held_out(grammar, slot, value), (slot, value)


def test_no_voice_of_training_says_the_words_that_only_held_out_values_have(units):
    """In lessons of words in no order, which are of all words of dialogues."""
    every = {
        side: words_of(unit for unit in units if unit.side == side) for side in ("train", "held")
    }
    only_held = {*every["held"]} - {
        word for unit in units if unit.side == "train" and unit.act != WORDS_ACT
        for word in words_of([unit])
    }  # fmt: skip
    assert len(only_held) > 50
    assert not only_held & {*every["train"]}


def test_what_is_read_is_no_held_out_value_though_its_words_could_make_one(grammar):
    slots = [slot for slot in grammar.slots if held_values(grammar, slot)]
    words = sorted({value for slot in slots for value in held_values(grammar, slot)})
    strange = 0
    for seed in range(300):
        character, facts = _character(grammar, words, random.Random(seed))
        for fact in facts:
            slot = grammar.talk.topics[fact.topic].slot
            assert not is_held_out(grammar, slot, fact.value), (slot, fact.value)
            strange += fact.value.lower() in words
        assert not is_held_out(grammar, "name", character.name)
    assert strange > 100, "values of other slots are words like any other"


def test_some_answers_of_training_have_values_that_nothing_but_the_prompt_can_tell(grammar, units):
    strange = [
        unit
        for unit in units
        if unit.act.startswith("answer/") and unit.side == "train"
        for slot, value in unit.values
        if slot in grammar.slots and value not in grammar.values(slot, "train")
    ]
    answers = [unit for unit in units if unit.act.startswith("answer/")]
    assert 0.1 < len(strange) / len(answers) < 0.4
    for unit in strange:
        assert unit.speaker.state == "neutral"
        topic = grammar.talk.topics[unit.act.removeprefix("answer/")]
        assert unit.value(topic.slot).lower() in unit.text.lower()
    assert {unit.act for unit in strange} == {unit.act for unit in answers} - {
        "answer/offer",
        "answer/company",
    }


def test_training_sees_nothing_that_is_held_out(grammar, units, dialogues):
    held_lines = {
        text.removeprefix(HELD_OUT_MARK)
        for topic in grammar.talk.topics.values()
        for text in (*topic.fact, *topic.ask)
        if text.startswith(HELD_OUT_MARK)
    }
    train = dialogues[::2]
    for dialogue in train:
        assert dialogue.user.voice in USER_VOICES
        for unit in (units[u] for said in dialogue.said for u in said.units):
            assert unit.side == "train" and unit.text not in held_lines
            for slot, value in unit.values:
                assert not is_held_out(grammar, slot, value)
        for fact in dialogue.character.facts:
            assert not is_held_out(grammar, grammar.talk.topics[fact.topic].slot, fact.value)
    assert all(d.user.voice in HELD_USER_VOICES for d in dialogues[1::2])
    assert any(units[u].side == "held" for d in dialogues[1::2] for s in d.said for u in s.units)


def test_a_name_is_held_out_in_both_lists_or_none(grammar):
    for slot in ("female", "male"):
        held = set(grammar.values(slot, "held"))
        assert held and not held & set(grammar.values(slot, "train"))


def test_a_name_goes_with_the_voice(grammar, dialogues):
    names = {*grammar.slots["female"], *grammar.slots["male"]}
    named = [d for d in dialogues if d.character.name in names]  # others have a strange one
    for dialogue in named:
        assert dialogue.character.name in grammar.slots[gender_of(dialogue.agent.voice)]
    assert len(named) > 0.9 * len(dialogues)


def test_a_mood_is_said_in_the_prompt_and_heard_in_the_voice(grammar, dialogues):
    seen = set()
    for dialogue in dialogues[::2]:
        mood = dialogue.character.mood
        seen.add(mood)
        says = [text for text in wordings(grammar.talk.moods[mood].prompt, "train") if text]
        assert dialogue.agent.state == mood
        assert not says or says_any(dialogue.prompt.text, says)
    assert seen == set(grammar.talk.moods)


def test_both_sides_speak_first(dialogues):
    first = [dialogue.said[0].role for dialogue in dialogues]
    assert 0.2 < first.count("agent") / len(first) < 0.6


def test_nobody_is_one_of_the_personas(grammar):
    names = {persona.name for persona in load_personas(GRAMMAR_FOLDER.parents[1] / "personas")}
    assert not names & {*grammar.slots["name"], *grammar.slots["surname"]}


def test_there_are_dozens_of_roles_and_a_wide_vocabulary(grammar, units):
    words = {word for unit in units for word in re.findall(r"[a-z']+", unit.text.lower())}
    assert len(grammar.role_ids) >= 48 and len(words) > 1000


def test_articles_and_capitals():
    assert [with_article(n) for n in ("lamp", "oven", "used phone", "umbrella")] == [
        "a lamp", "an oven", "a used phone", "an umbrella",
    ]  # fmt: skip
    assert filled("{price} for it. ok", {"price": "two"}) == "Two for it. Ok"
    assert slots_in("{a} or {b}") == ("a", "b")
    with pytest.raises(KeyError):
        filled("{a}", {})


def test_a_template_with_a_foreign_slot_is_named(tmp_path):
    for name in ("slots", "roles", "talk"):
        text = (GRAMMAR_FOLDER / f"{name}.yaml").read_text()
        if name == "talk":
            text = text.replace("At {open}.", "At {close}.")
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(DataFileError, match=r"topics.open.answer .* found \['close'\]"):
        load_grammar(tmp_path)
