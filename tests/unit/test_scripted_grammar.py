"""What the scripted writer refuses, and what its revision stands for."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from duplex.errors import DataFileError
from pipeline.engines.scripted import GRAMMAR_DIR, ScriptedWriter
from pipeline.engines.scripted_grammar import load_grammar, parse
from pipeline.engines.scripted_plan import plan_beats
from tests.unit.test_scripted_writer import PERSONAS, SCENARIOS, WRITER, changed


def copy_grammar(folder: Path) -> Path:
    for path in GRAMMAR_DIR.glob("*.yaml"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_the_revision_follows_the_grammar(tmp_path: Path) -> None:
    folder = copy_grammar(tmp_path)
    assert ScriptedWriter(folder).revision == WRITER.revision
    with (folder / "angry.yaml").open("a") as file:
        file.write("# a change\n")
    assert ScriptedWriter(folder).revision != WRITER.revision


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Hi {ordr}.", "did you mean {order}"),
        ("Hi (there.", "never closed"),
        ("Hi there).", "must pair"),
        ("Hi | there.", "must stand within"),
        ("Hi {order.", "brace"),
    ],
)
def test_a_faulty_template_is_refused(template: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(template)
    folder = copy_grammar(tmp_path)
    with (folder / "angry.yaml").open("a") as file:
        file.write(f'new-intent: ["{template}"]\n')
    with pytest.raises(DataFileError, match=r"angry\.yaml: new-intent"):
        load_grammar(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("order", "a large wine", "must name a drink"),
        ("order", "a black coffee", "must have one of small, medium, large"),
        ("order", "a large almond milk latte", "avoids peanuts"),
        ("budget", "three dollars", "over the budget"),
        ("budget", "5 dollars", "in words"),
        ("allergy", "moonlight", "must name one of"),
    ],
)
def test_a_persona_that_makes_no_sense_is_refused(key: str, value: str, message: str) -> None:
    persona = changed(PERSONAS["angry-marcus"], key, value=value, says=(value,))
    with pytest.raises(DataFileError, match=message):
        WRITER.write(persona, SCENARIOS["rush-hour"], seed=0, min_turns=8, max_turns=10)


def test_a_fact_whose_value_is_none_of_its_wordings_is_refused() -> None:
    persona = changed(PERSONAS["angry-marcus"], "hurry", says=("a train",))
    with pytest.raises(DataFileError, match="hurry"):
        WRITER.write(persona, SCENARIOS["rush-hour"], seed=0, min_turns=8, max_turns=10)


def test_an_arc_with_an_unknown_intent_or_the_wrong_role_is_refused() -> None:
    scenario = SCENARIOS["rush-hour"]
    for beat, message in (
        ({"role": "user", "intent": "sing"}, "not in exchanges.yaml"),
        ({"role": "user", "intent": "give-name"}, "spoken by agent"),
    ):
        arc = (*scenario.arc, type(scenario.arc[0]).model_validate(beat))
        with pytest.raises(DataFileError, match=message):
            WRITER.write(
                PERSONAS["angry-marcus"],
                scenario.model_copy(update={"arc": arc}),
                seed=0,
                min_turns=8,
                max_turns=10,
            )


def test_the_shortest_dialogues_have_room_for_facts_before_questions_without_an_answer() -> None:
    for seed in range(60):
        for turns in ((4, 5), (5, 5)):
            rng = random.Random(seed)
            beats = plan_beats(
                SCENARIOS["remake"], WRITER.grammar, rng, min_turns=turns[0], max_turns=turns[1]
            )
            assert "ask-unknown" not in {beat.intent for beat in beats}
