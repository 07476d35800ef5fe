"""Models with one fault each, behind the real wire: each is found, and the perfect one is clean."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.evaluation.found import report_data
from pipeline.evaluation.items import load_items, speak_item
from pipeline.evaluation.play import PlaySettings, evaluate_urls
from pipeline.evaluation.verdicts import failures
from tests.stages.planted_server import Plan, ToneEngine, planted, tiny_tokenizer

ITEMS = Path(__file__).resolve().parents[2] / "data/prompts/held-out.yaml"
MEASURES_OF = {
    "echo": ["echo_rate", "due_said", "poor"],
    "silent": ["response_rate", "silence", "due_said", "poor"],
    "wrong role": ["out_of_role", "poor"],
    "invents prices": ["ungrounded", "hallucinated", "poor"],
    "ignores the prompt": ["facts_said", "due_said", "poor"],
    "wanders off": ["off_topic", "hallucinated", "poor"],
    "gives in": ["declined", "due_said"],
    "knows everything": ["abstained", "hallucinated"],
    "text only": ["response_rate", "unspoken_share"],
    "stuck": ["loops", "repeated_share"],
}
PLENTY = "The committee of the parliament discussed taxes and foreign policy on television"


@functools.cache
def spoken_items():
    return [
        speak_item(item, ToneEngine(), {}, seconds=200, answer_s=2.4) for item in load_items(ITEMS)
    ]


def right_answer(spoken, turn):
    if turn.must_say:
        return f"{turn.must_say[0]}, please."
    return f"{spoken.item.abstains[0]}." if turn.kind == "unspecified" else "All right."


def reply(fault, spoken, turn):
    """What the planted model says to a turn."""
    right = right_answer(spoken, turn)
    if fault == "echo":
        return turn.say
    if fault == "silent":
        return ""
    if fault == "wrong role":
        return f"{right} {spoken.item.must_not_say[0].capitalize()} you?"
    if fault == "invents prices":
        return f"{right} Ninety nine dollars."
    if fault == "ignores the prompt":
        return "All right."
    if fault == "wanders off":
        return f"{PLENTY}."
    if fault == "gives in" and turn.kind == "unfulfillable":
        return "With pleasure."
    if fault == "knows everything" and turn.kind == "unspecified":
        return "That was yesterday in the morning."
    if fault == "stuck":
        return f"{right} " + "all right " * 6
    return right


def plan_of(fault):
    scripts = {}
    for spoken in spoken_items():
        script = []
        for turn, segment in zip(spoken.kept, spoken.turns, strict=True):
            text = reply(fault, spoken, turn)
            if text:
                length = 0 if fault == "text only" else 8
                script.append((segment.end + 3, f" {text}", length))
        if fault != "ignores the prompt" and fault != "silent":
            # Somewhere every fact is told: as a greeting would, before the first turn.
            facts = " ".join(f"{fact.says[0]}." for fact in spoken.item.facts)
            script.append((0, facts, 0 if fault == "text only" else 3))
        scripts[spoken.item.text_prompt] = script
    return Plan(tokenizer=tiny_tokenizer(), scripts=scripts)


@functools.cache
def played_by(fault):
    settings = PlaySettings(tokenizer=tiny_tokenizer(), again=False)
    with planted(plan_of(fault)) as url:
        return evaluate_urls({fault: url}, spoken_items(), settings, lambda line: None)[0]


def test_the_perfect_model_is_clean():
    played = played_by("perfect")
    faults = [
        (one.name, exchange.user, exchange.reply, exchange.faults)
        for one in played.conversations
        for exchange in one.exchanges
        if exchange.faults
    ]
    assert faults == []
    assert {one.grade for one in played.conversations} == {"perfect"}
    summary = {
        row["key"]: row["by_model"]["perfect"]["value"]
        for row in report_data([played], about={}, protocol={})["summary"]
    }
    for key in ("echo_rate", "out_of_role", "ungrounded", "off_topic", "hallucinated", "silence"):
        assert summary[key] == 0, key
    for key in ("response_rate", "facts_said", "due_said", "declined", "abstained", "perfect"):
        assert summary[key] == 1, key


@pytest.mark.parametrize("fault", MEASURES_OF)
def test_each_planted_fault_is_found(fault):
    data = report_data([played_by("perfect"), played_by(fault)], about={}, protocol={})
    (found,) = data["verdicts"]
    rows = {row["key"]: row for row in found["rows"]}
    for key in MEASURES_OF[fault]:
        assert rows[key]["word"] == "regressed", (key, rows[key])
    improved = [key for key, row in rows.items() if row["word"] == "improved"]
    assert set(improved) <= {"dead_air_s", "first_word_s", "loops", "yield_s"}
    condition = f"regressed:{MEASURES_OF[fault][0]}"
    assert failures(data["verdicts"], [condition]) and failures(data["verdicts"], ["regressed"])


def test_a_model_against_itself_shows_nothing():
    played = played_by("perfect")
    conversations = tuple(replace(one, model="again") for one in played.conversations)
    again = replace(played, label="again", conversations=conversations)
    data = report_data([played, again], about={}, protocol={})
    words = {row["word"] for row in data["verdicts"][0]["rows"]}
    assert words == {"inconclusive", "not measured"}
    assert failures(data["verdicts"], ["regressed", "improved"]) == []
