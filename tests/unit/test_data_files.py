"""The files that people write under data/: what the workbench ships is complete and sound."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from duplex.characters import Fact, GapRange, Persona, Scenario
from duplex.datafiles import load_domain, load_personas, read_yaml
from pipeline.engines.scripted_grammar import Grammar, load_grammar
from pipeline.engines.scripted_plan import split_arc

DATA = Path(__file__).resolve().parents[2] / "data"
PERSONAS = [
    Persona.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    for path in sorted((DATA / "personas").glob("*.yaml"))
]
SCENARIOS = [
    Scenario.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    for path in sorted((DATA / "scenarios").glob("*.yaml"))
]
DOMAIN = load_domain(DATA / "domains/coffee-shop.yaml")
SEEDS: dict[str, Any] = yaml.safe_load((DATA / "prompts/seeds.yaml").read_text(encoding="utf-8"))
CORPUS = DATA / "pocket/corpus.txt"

# The predecessor's: frames of 80 ms, (after the user, other).
GAPS = {
    "angry": ((1, 3), (1, 4)),
    "nervous": ((6, 15), (8, 20)),
    "indecisive": ((5, 12), (6, 16)),
    "friendly": ((2, 8), (4, 12)),
    "enthusiast": ((2, 8), (4, 12)),
}
ACCENTS = {"en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029"}


def by_id(record: Persona | Scenario) -> str:
    return record.id


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return load_grammar(DATA / "grammar")


def holds(text: str, fact: Fact) -> bool:
    return any(
        re.search(rf"(?<!\w){re.escape(says)}(?!\w)", text, re.IGNORECASE) for says in fact.says
    )


def span(gap: GapRange) -> tuple[int, int]:
    return gap.low, gap.high


def test_there_are_twenty_personas_of_five_types() -> None:
    assert Counter(persona.type for persona in PERSONAS) == {
        "angry": 5,
        "nervous": 5,
        "friendly": 5,
        "indecisive": 3,
        "enthusiast": 2,
    }


def test_ids_and_names_are_unique_and_match_the_files() -> None:
    assert len({persona.id for persona in PERSONAS}) == 20
    assert len({persona.name for persona in PERSONAS}) == 20
    names = [path.stem for path in sorted((DATA / "personas").glob("*.yaml"))]
    assert [persona.id for persona in PERSONAS] == names
    assert [p.id for p in PERSONAS] == [f"{p.type}-{p.name.lower()}" for p in PERSONAS]


def test_no_two_personas_order_the_same() -> None:
    orders = [fact.value for persona in PERSONAS for fact in persona.facts if fact.key == "order"]
    assert len(set(orders)) == 20


@pytest.mark.parametrize("persona", PERSONAS, ids=by_id)
def test_every_prompt_holds_all_facts_and_speaks_to_the_model(persona: Persona) -> None:
    assert 3 <= len(persona.prompts) <= 4
    assert len(set(persona.prompts)) == len(persona.prompts)
    for prompt in persona.prompts:
        assert [fact.key for fact in persona.facts if not holds(prompt, fact)] == []
        assert 35 <= len(prompt.split()) <= 80
        assert re.match(r"(You are|You play|Your name is) ", prompt)
        assert "coffee shop" in prompt
        assert prompt.isascii() and not re.search(r"\d", prompt)


@pytest.mark.parametrize("persona", PERSONAS, ids=by_id)
def test_facts_can_be_said_and_are_enough(persona: Persona) -> None:
    keys = [fact.key for fact in persona.facts]
    assert {"name", "order", "budget"} <= set(keys)
    assert len({"allergy", "diet"} & set(keys)) == 1
    assert 4 <= len(keys) <= 6
    assert {fact.key: fact.value for fact in persona.facts}["name"] == persona.name
    assert [fact.key for fact in persona.facts if not holds(fact.value, fact)] == []


@pytest.mark.parametrize("persona", PERSONAS, ids=by_id)
def test_gaps_and_voice_fit_the_type(persona: Persona) -> None:
    assert (span(persona.gap_after_user), span(persona.gap_other)) == GAPS[persona.type]
    assert persona.voice.accent in ACCENTS


def test_voices_and_patterns_are_varied() -> None:
    voices = [persona.voice for persona in PERSONAS]
    assert {voice.accent for voice in voices} == ACCENTS
    assert {voice.gender for voice in voices} == {"female", "male"}
    assert {voice.age for voice in voices} == {"young", "adult", "old"}
    assert len(set(map(str, voices))) == 20
    patterns = [pattern for persona in PERSONAS for pattern in persona.speech_patterns]
    assert len(patterns) == len(set(patterns))
    assert all(pattern.isascii() for pattern in patterns)


@pytest.mark.parametrize("persona", PERSONAS, ids=by_id)
def test_order_price_and_allergy_make_sense_together(persona: Persona, grammar: Grammar) -> None:
    facts = {fact.key: fact.value for fact in persona.facts}
    menu = grammar.menu
    item = menu.item(facts["order"])
    assert menu.substance(facts.get("allergy") or facts["diet"]) not in item.holds
    if "food" in facts:
        food = menu.find_food(facts["food"])
        assert food is not None
        avoided = menu.substance(facts.get("allergy") or facts["diet"])
        assert avoided not in menu.foods[food].holds


def test_there_are_ten_scenarios() -> None:
    assert [scenario.id for scenario in SCENARIOS] == sorted(
        [
            "rush-hour",
            "quiet-afternoon",
            "mobile-pickup",
            "first-visit",
            "regular-order",
            "dietary-request",
            "remake",
            "new-drink",
            "group-order",
            "closing-time",
        ]
    )
    assert [path.stem for path in sorted((DATA / "scenarios").glob("*.yaml"))] == [
        scenario.id for scenario in SCENARIOS
    ]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=by_id)
def test_arcs_use_the_known_intents_and_the_barista_opens(
    scenario: Scenario, grammar: Grammar
) -> None:
    assert 8 <= len(scenario.arc) <= 14
    assert split_arc(scenario, grammar)
    assert scenario.first_speaker == ("agent" if scenario.id == "remake" else "user")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=by_id)
def test_scenes_have_a_kind_of_the_domain_and_questions_that_nobody_can_answer(
    scenario: Scenario,
) -> None:
    assert scenario.kind in DOMAIN.kinds
    assert len(scenario.unanswerable) >= 2
    facts = {fact.key for persona in PERSONAS for fact in persona.facts}
    assert set(scenario.known) <= facts
    for question in scenario.unanswerable:
        assert question.endswith("?") and not re.search(r"[^A-Za-z',? ]", question)


def test_all_kinds_of_scenes_and_both_ends_of_the_moods_come_up() -> None:
    assert {scenario.kind for scenario in SCENARIOS} == set(DOMAIN.kinds)
    emotions = {turn.mood.emotion for scenario in SCENARIOS for turn in scenario.moods}
    assert {"angry", "happy", "excited", "neutral", "sad"} == emotions


def test_the_types_differ_in_how_they_listen() -> None:
    def shares(kind: str, field: str) -> set[float]:
        return {getattr(persona, field) for persona in PERSONAS if persona.type == kind}

    assert all(persona.type in DOMAIN.types for persona in PERSONAS)
    others = set(DOMAIN.types) - {"angry"}
    assert min(shares("angry", "interrupts")) > max(max(shares(k, "interrupts")) for k in others)
    for kind in ("nervous", "friendly"):
        assert min(shares(kind, "backchannels")) >= 0.4 > max(shares("angry", "backchannels"))
    assert all(len(set(persona.backchannel_words)) >= 3 for persona in PERSONAS)


def test_every_intent_of_the_vocabulary_comes_up_in_an_arc_or_when_one_grows(
    grammar: Grammar,
) -> None:
    in_arcs = {beat.intent for scenario in SCENARIOS for beat in scenario.arc}
    grown = {intent for exchange in grammar.exchanges for row in exchange.grow for intent in row}
    assert set(grammar.roles) - in_arcs - grown == set()


def test_the_evaluation_items_are_the_four_of_the_predecessor() -> None:
    items = SEEDS["items"]
    assert set(SEEDS) == {"items", "must_not_say", "topic", "abstains"}
    assert len(SEEDS["must_not_say"]) > 10
    assert [item["persona_type"] for item in items] == [
        "angry",
        "nervous",
        "friendly",
        "enthusiast",
    ]
    for item in items:
        facts = [Fact.model_validate(fact) for fact in item["facts"]]
        assert [fact.key for fact in facts if not holds(item["text_prompt"], fact)] == []
        assert item["first_speaker"] == "user"
        assert 3 <= len(item["user_turns"]) <= 4
        # Measured with espeak-ng at rate 175: 34 words last 9.2 s, 40 words 10.1 s.
        assert 32 <= sum(len(turn.split()) for turn in item["user_turns"]) <= 42


def test_the_evaluation_facts_occur_in_personas_of_the_type_but_never_together() -> None:
    for item in SEEDS["items"]:
        alike = [
            {fact.key: fact.value for fact in persona.facts}
            for persona in PERSONAS
            if persona.type == item["persona_type"]
        ]
        wanted = {fact["key"]: fact["value"] for fact in item["facts"]}
        shared = [sum(own.get(key) == value for key, value in wanted.items()) for own in alike]
        assert max(shared) < len(wanted) - 1
        for key, value in wanted.items():
            avoided = key in ("allergy", "diet")
            seen = {own.get(key) for own in alike}
            if avoided:
                seen |= {own.get("allergy") for own in alike} | {own.get("diet") for own in alike}
            assert value in seen, f"{item['id']}: no {item['persona_type']} persona has {value}"


def test_the_vet_items_give_their_facts_and_no_trained_owner_has_them() -> None:
    items = yaml.safe_load((DATA / "vet-reception/items.yaml").read_text(encoding="utf-8"))["items"]
    owners = load_personas(DATA / "vet-reception/personas")
    trained = {fact.value for owner in owners for fact in owner.facts}
    assert {item["persona_type"] for item in items} <= {owner.type for owner in owners}
    for item in items:
        facts = [Fact.model_validate(fact) for fact in item["facts"]]
        assert [fact.key for fact in facts if not holds(item["text_prompt"], fact)] == []
        assert {fact.value for fact in facts} & trained <= {"no car"}


def test_the_pocket_corpus_is_plain_speakable_text_that_names_every_persona() -> None:
    text = CORPUS.read_text(encoding="ascii")
    assert 80_000 <= len(text) <= 120_000
    lines = text.splitlines()
    assert all(line and line == line.strip() for line in lines)
    # Prompts stand in the tags that the model meets them in.
    assert not re.search(r"[^A-Za-z',.?! \n]", text.replace("<system>", ""))
    assert text.count("<system>") == 2 * sum(line.startswith("<system> ") for line in lines) > 100
    assert [p.name for p in PERSONAS if not re.search(rf"\b{p.name}\b", text)] == []


def test_the_readme_names_every_folder_of_data_and_only_files_that_are_there():
    text = (DATA / "README.md").read_text(encoding="utf-8")
    folders = {path.name for path in DATA.iterdir() if path.is_dir()}
    assert {name for name in folders if f"`{name}/" not in text} == set()
    named = re.findall(r"`((?:duplex|docs|configs|tests)/[\w./-]+\.\w+)`", text)
    assert named and [path for path in named if not (DATA.parent / path).is_file()] == []
    records = {"Persona", "Scenario", "Domain"}
    schema = (DATA.parent / "duplex/characters.py").read_text()
    assert all(f"class {name}(" in schema and f"`{name}` in `duplex/ch" in text for name in records)
    assert "duplex personas check" in text


def test_a_file_is_read_anew_when_it_was_changed_and_nobody_shares_what_was_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("names: [a]")
    first = read_yaml(path)
    first["names"].append("b")
    assert read_yaml(path) == {"names": ["a"]}
    path.write_text("names: [c]")
    assert read_yaml(path) == {"names": ["c"]}
