"""The conversations under data/ that models are judged by: only a right answer passes."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import yaml

from duplex.configfile import load_config
from duplex.datafiles import load_domain, load_personas, load_scenarios
from duplex.metrics import says_any
from duplex.words import words_of
from pipeline.evaluation.grounding import invented
from pipeline.evaluation.items import EvaluationItem, QuestionKind, UserTurn, load_items

DATA = Path(__file__).resolve().parents[2] / "data"
COFFEE = ("seeds", "personas", "held-out", "situations", "long")
PATHS = {name: DATA / f"prompts/{name}.yaml" for name in COFFEE}
PATHS["vet"] = DATA / "vet-reception/items.yaml"
SETS = {name: load_items(path) for name, path in PATHS.items()}
ITEMS = [item for items in SETS.values() for item in items]
ASKING = [item for name, items in SETS.items() if name != "seeds" for item in items]
TURNS = [(item, place) for item in ASKING for place in range(len(item.user_turns))]
PERSONAS = {persona.id: persona for persona in load_personas(DATA / "personas")}
OWNERS = load_personas(DATA / "vet-reception/personas")

KINDS = set(get_args(QuestionKind))
OPENS = ("held-out-clyde", "held-out-gloria")  # the customer speaks first
READ = ("fact", "proper-noun", "context")  # the answer stands in the prompt or was said


def item_id(item: EvaluationItem) -> str:
    return item.id


def turns_of(kind: str) -> list[tuple[EvaluationItem, UserTurn]]:
    return [(item, turn) for item in ASKING for turn in item.user_turns if turn.kind == kind]


def turn_of(ident: str, words: str) -> UserTurn:
    item = next(item for item in ITEMS if item.id == ident)
    return next(turn for turn in item.user_turns if words in turn.say)


def passes(turn: UserTurn, reply: str) -> bool:
    return says_any(reply, turn.must_say) and not says_any(reply, turn.must_not_say)


# -- what the sets hold


def test_there_are_as_many_conversations_as_the_sets_promise() -> None:
    assert {name: len(items) for name, items in SETS.items()} == {
        "seeds": 4, "personas": 20, "held-out": 12, "situations": 18, "long": 4, "vet": 10,
    }  # fmt: skip
    assert max(Counter(item.id for item in ITEMS).values()) == 1


def test_every_persona_has_its_conversation_with_its_own_facts() -> None:
    assert {item.persona for item in SETS["personas"]} == set(PERSONAS)
    for item in (*SETS["personas"], *SETS["situations"], *SETS["long"]):
        if item.persona is not None:
            persona = PERSONAS[item.persona]
            assert item.facts == persona.facts
            assert item.persona_type == persona.type


def test_who_was_not_trained_on_shares_neither_a_name_nor_two_facts_with_a_persona() -> None:
    unknown = [item for name in ("held-out", "long") for item in SETS[name] if not item.persona]
    assert len(unknown) == 14 and all(item.persona is None for item in SETS["held-out"])
    assert {item.persona_type for item in SETS["held-out"]} == {p.type for p in PERSONAS.values()}
    names = {persona.name for persona in (*PERSONAS.values(), *OWNERS)}
    for item in (*unknown, *SETS["vet"]):
        facts = {fact.key: fact.value for fact in item.facts}
        assert facts["name"] not in names
        for persona in PERSONAS.values():
            shared = [fact.key for fact in persona.facts if facts.get(fact.key) == fact.value]
            assert len(shared) <= 1, f"{item.id} and {persona.id}: {shared}"
    held = [fact.value for item in unknown for fact in item.facts if fact.key == "name"]
    assert len(held) == len(set(held))


def test_a_situation_is_new_and_all_else_is_of_the_demo() -> None:
    demo = load_config(DATA.parent / "configs/pocket.yaml").personas.only
    assert demo is not None
    scenarios = {scenario.id for scenario in load_scenarios(DATA / "scenarios")}
    assert Counter(item.persona for item in SETS["situations"]) == dict.fromkeys(demo, 3)
    for item in SETS["situations"]:
        assert item.persona and item.situation and item.situation not in scenarios
        assert item.id == f"{item.persona.split('-')[1]}-{item.situation}"
        assert words_of(item.text_prompt) == words_of(PERSONAS[item.persona].prompts[0])
    assert len({item.situation for item in SETS["situations"]}) >= 8
    assert not any(item.situation for item in ITEMS if item not in SETS["situations"])


@pytest.mark.parametrize("item", [i for i in ITEMS if i not in SETS["situations"]], ids=item_id)
def test_no_prompt_is_one_that_was_trained_on(item: EvaluationItem) -> None:
    trained = {" ".join(words_of(p)) for q in (*PERSONAS.values(), *OWNERS) for p in q.prompts}
    for prompt in (item.text_prompt, item.weak_prompt or ""):
        assert " ".join(words_of(prompt)) not in trained


@pytest.mark.parametrize("item", ITEMS, ids=item_id)
def test_the_prompts_hold_each_fact_in_a_wording_that_counts(item: EvaluationItem) -> None:
    for prompt in (item.text_prompt, item.weak_prompt):
        if prompt is not None:
            assert [fact.key for fact in item.facts if not says_any(prompt, fact.says)] == []
            assert re.fullmatch(r"[A-Za-z',.? -]+", prompt)
    assert re.match(r"(You are|You play) |Your name is ", item.text_prompt)
    assert 30 <= len(item.text_prompt.split()) <= 80
    place = "veterinary practice" if item in SETS["vet"] else "coffee shop"
    assert place in item.text_prompt
    assert item.first_speaker == ("agent" if item.id in OPENS else "user")


@pytest.mark.parametrize("item", [i for i in ITEMS if i not in SETS["long"]], ids=item_id)
def test_the_weak_prompt_says_the_same_in_fewer_words_and_to_nobody(item: EvaluationItem) -> None:
    assert item.weak_prompt is not None
    assert len(item.weak_prompt.split()) < 0.7 * len(item.text_prompt.split())
    assert not says_any(item.weak_prompt, ["you"])


@pytest.mark.parametrize(
    "name, domain",
    [*((name, "coffee-shop") for name in COFFEE), ("vet", "vet-reception")],
)
def test_the_emotion_is_the_mood_of_the_type(name: str, domain: str) -> None:
    types = load_domain(DATA / f"domains/{domain}.yaml").types
    assert {item.id: item.emotion for item in SETS[name]} == {
        item.id: types[item.persona_type].emotion for item in SETS[name]
    }


@pytest.mark.parametrize("item", [i for i in ASKING if i not in SETS["situations"]], ids=item_id)
def test_each_conversation_asks_every_kind_of_question(item: EvaluationItem) -> None:
    kinds = Counter(turn.kind for turn in item.user_turns)
    assert set(kinds) == KINDS
    if item not in SETS["vet"]:
        assert kinds["context"] >= 2
        assert len(item.user_turns) == 9 or item not in SETS["personas"]


def test_the_order_of_the_kinds_varies() -> None:
    for name in ("personas", "held-out", "vet"):
        orders = [tuple(turn.kind for turn in item.user_turns) for item in SETS[name]]
        assert len(set(orders)) >= 0.8 * len(orders)
    assert len({orders[0] for orders in ([t.kind for t in i.user_turns] for i in ASKING)}) >= 3


def test_long_conversations_have_fifteen_turns_and_short_questions_early_and_late() -> None:
    assert Counter(item.persona is None for item in SETS["long"]) == {True: 2, False: 2}
    for item in SETS["long"]:
        assert 15 <= len(item.user_turns) <= 18
        traps = [n for n, turn in enumerate(item.user_turns, 1) if len(words_of(turn.say)) == 1]
        assert traps[0] <= 3 and 15 in traps
        late = [turn for turn in item.user_turns[9:] if turn.kind == "context"]
        assert len(late) >= 3


# -- each turn


@pytest.mark.parametrize("item", ITEMS, ids=item_id)
def test_turns_can_be_spoken(item: EvaluationItem) -> None:
    for turn in item.user_turns:
        assert re.fullmatch(r"[A-Z][A-Za-z',.?! ]*[.?!]", turn.say)
        assert len(turn.say.split()) <= 28


@pytest.mark.parametrize("item", ASKING, ids=item_id)
def test_saying_the_question_back_neither_passes_nor_is_blamed_for_it(item: EvaluationItem) -> None:
    for turn in item.user_turns:
        listed = (*turn.must_say, *turn.must_not_say)
        assert [wording for wording in listed if says_any(turn.say, [wording])] == []


@pytest.mark.parametrize("item", ASKING, ids=item_id)
def test_a_right_answer_stands_in_the_prompt_or_was_said(item: EvaluationItem) -> None:
    wordings = [wording for fact in item.facts for wording in fact.says]
    for place, turn in enumerate(item.user_turns):
        given = [item.text_prompt, *(before.say for before in item.user_turns[:place])]
        if turn.kind in READ:
            assert turn.must_say
            unknown = [
                must
                for must in turn.must_say
                if not any(says_any(text, [must]) for text in (*given, *wordings))
            ]
            assert unknown == [], f"turn {place + 1}: neither in the prompt nor said before"
        for must in turn.must_say:
            assert invented(f"It is {must}.", [*given, turn.say]) == ()


@pytest.mark.parametrize("item", ASKING, ids=item_id)
def test_a_right_answer_breaks_no_rule_for_the_role(item: EvaluationItem) -> None:
    for turn in item.user_turns:
        forbidden = (*item.must_not_say, *turn.must_not_say)
        assert [must for must in turn.must_say if says_any(must, forbidden)] == []
        if turn.kind in READ:
            assert [must for must in turn.must_say if says_any(must, item.abstains)] == []


def test_what_is_to_be_declined_has_words_for_yes_and_no() -> None:
    for _, turn in turns_of("unfulfillable"):
        assert says_any("No, thank you.", turn.must_say) or says_any("I can't.", turn.must_say)
        assert turn.must_not_say


def test_nothing_is_held_to_where_no_answer_is_right() -> None:
    for kind in ("unspecified", "rude", "unrelated"):
        assert [turn.say for _, turn in turns_of(kind) if turn.must_say] == []
    asked = [turn.say for _, turn in turns_of("unspecified")]
    assert len(asked) == len(set(asked)) and all(say.count("?") for say in asked)


def test_a_turn_that_is_cut_off_asks_for_no_answer_and_another_follows() -> None:
    cut = [(item, n) for item, n in TURNS if item.user_turns[n].pause_s is not None]
    assert len(cut) >= 10
    for item, n in cut:
        assert item.user_turns[n].pause_s == 0.6
        assert item.user_turns[n].kind == "talk" and not item.user_turns[n].must_say
        assert n + 1 < len(item.user_turns)


def test_the_context_is_not_asked_for_at_once() -> None:
    """Else it would show nothing of memory; a "What?" asks for the answer before, and may."""
    said_last = []
    for item in ASKING:
        for before, turn in pairwise(item.user_turns):
            traps = len(words_of(turn.say)) == 1 or before.pause_s is not None
            if turn.kind == "context" and not traps and says_any(before.say, turn.must_say):
                said_last.append((item.id, turn.say))
    assert said_last == []


# -- the lists that all items of a file share


def test_the_coffee_shop_has_one_topic_and_one_way_to_abstain() -> None:
    raw = [yaml.safe_load(PATHS[name].read_text(encoding="utf-8")) for name in COFFEE]
    for key in ("topic", "abstains"):
        assert all(content[key] == raw[0][key] for content in raw)
    assert all(content["must_not_say"] == raw[1]["must_not_say"] for content in raw[1:])


@pytest.mark.parametrize("name", list(SETS))
def test_the_shared_lists_have_the_size_that_the_measures_need(name: str) -> None:
    item = SETS[name][0]
    assert 100 <= len(item.topic) <= 200 and 15 <= len(item.abstains) <= 25
    assert len(item.must_not_say) > 10
    for words in (item.topic, item.abstains, item.must_not_say):
        assert len(words) == len({" ".join(words_of(word)) for word in words})


ORDINARY = [
    "I'd rather not have any nuts, thank you.",
    "I don't want cream, and I can't have dairy.",
    "I'm not in a hurry, but I don't like to wait.",
    "I couldn't say no to a muffin.",
    "You're very kind, I don't mind at all.",
    "That will be all, and I'll have a seat by the window.",
    "Before I forget, my name is on the list.",
    "I've no time for this, just the coffee.",
    "Could I get that without cinnamon?",
]


@pytest.mark.parametrize("line", ORDINARY)
@pytest.mark.parametrize("name", [name for name in SETS if name != "seeds"])
def test_an_ordinary_answer_is_neither_an_abstention_nor_the_other_role(
    name: str, line: str
) -> None:
    item = SETS[name][0]
    assert not says_any(line, item.abstains)
    assert not says_any(line, item.must_not_say)


@pytest.mark.parametrize(
    "line",
    [
        "Oh, I'm not sure, sorry.",
        "How should I know? I've no idea.",
        "I'd rather not say, love.",
        "Um, I don't remember, I'm afraid.",
        "That's none of your business.",
    ],
)
def test_owning_that_one_cannot_tell_is_an_abstention(line: str) -> None:
    assert all(says_any(line, items[0].abstains) for items in SETS.values())


def test_the_role_of_the_other_side_is_found() -> None:
    assert says_any("Sure, coming right up!", SETS["personas"][0].must_not_say)
    assert says_any("Hello, how can I help you today?", SETS["held-out"][0].must_not_say)
    assert says_any("How can I help you?", SETS["vet"][0].must_not_say)


# -- replies by hand


@pytest.mark.parametrize(
    "ident, words, right, wrong",
    [
        ("angry-marcus", "peanut butter bar", "Are you deaf? No. Peanuts could kill me.",
         "No problem, throw it in."),
        ("angry-marcus", "peanut butter bar", "I'm allergic, for crying out loud.", "Fine. Hurry."),
        ("angry-marcus", "peanut butter bar", "Peanuts make me sick.",
         "I don't have all day, just put it in."),
        ("friendly-rosa", "soy milk", "I can't, I'm allergic to it, darling.",
         "Oh, I can't wait!"),
        ("angry-dougal", "splash of cream", "Aye, right, I can't have that.", "Yes, please."),
        ("friendly-theo", "wheat bread", "You're kind, but I don't eat gluten.",
         "Oh, lovely, I'll take one."),
        ("friendly-desmond", "did I say it came from", "The old hotel, my friend.",
         "From the church."),
        ("friendly-june", "come out of the oven?", "At ten, love.", "At eleven, love."),
        ("indecisive-nadia", "still know my name", "Joel, I guess?", "Nadia."),
        ("enthusiast-astrid", "at home", "A lever machine, naturally.", "A hand grinder."),
        ("nervous-tobias", "going to make it", "Er, your brother, if I may.", "You are, Tess."),
        ("nervous-mei", "come through", "Last night, I think.", "On Sunday."),
        ("held-out-patrick", "pancake", "I can't, it's the gluten.", "Yes please, two."),
        ("held-out-bruno", "And where did you fly in", "Lisbon!", "Rome."),
        ("long-brenda", "size of it", "Medium. As I said.", "Large."),
        ("long-rufus", "nineteen dollars", "That's too much, I only have ten.", "Here you go."),
        ("oscar-film-crew", "full of nuts", "Almonds, I mean, hold on, yes.", "I'm fine."),
        ("mei-fire-drill", "colour was the bench", "Red, I think.", "Green, I hope."),
        ("vet-worried", "bring him in", "I have no car, what do I do?", "Yes, I'm on my way."),
        ("vet-chatty-neville", "Wednesday", "Ah, only Mondays, I'm afraid.", "See you then!"),
    ],
)  # fmt: skip
def test_a_right_reply_passes_and_a_wrong_one_fails(
    ident: str, words: str, right: str, wrong: str
) -> None:
    turn = turn_of(ident, words)
    assert passes(turn, right)
    assert not passes(turn, wrong)
    assert not passes(turn, turn.say)
    assert not passes(turn, "")
