"""Bad requests exit 2 before anything is written; failed work exits 1 and keeps the rest."""

import pytest
import yaml

from tests.e2e.conftest import make_workplace


@pytest.fixture
def fresh(tmp_path):
    return make_workplace(tmp_path / "fresh")


def change_persona(workplace, change):
    path = workplace.persona_file("nervous-mei")
    persona = yaml.safe_load(path.read_text())
    change(persona)
    path.write_text(yaml.safe_dump(persona))


BAD_SETTINGS = {
    "train.lerning_rate=1": "did you mean train.learning_rate?",
    "train.steps=many": "train.steps",
    "personas.folder=nowhere": "found nothing at nowhere",
    "personas.only=[angry-marcu]": "holds no such id",
    "evaluate.items=missing.yaml": "missing.yaml",
    "model.base=./nowhere": "model.base must be",
    "train.runtime.device=gpu9": "train.runtime.device",
}


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_a_bad_setting(fresh, setting):
    result = fresh.run("--set", setting)
    assert result.returncode == 2, result.stderr
    assert BAD_SETTINGS[setting] in result.stderr
    assert not fresh.runs.exists()


BAD_PERSONAS = {
    "a persona without a name": (lambda p: p.pop("name"), "name: Field required"),
    "another persona's id": (
        lambda p: p.update(id="angry-marcus"),
        "id must be the file's name, nervous-mei; found angry-marcus",
    ),
    "an unknown key": (lambda p: p.update(favourite="tea"), "favourite"),
    "a prompt that lacks a fact": (
        lambda p: p.update(prompts=[*p["prompts"], "You are Mei, a customer."]),
        "each prompt must hold each fact",
    ),
    "a gap that ends before it begins": (
        lambda p: p.update(gap_other={"low": 9, "high": 3}),
        "low must not exceed high",
    ),
}


@pytest.mark.parametrize("fault", BAD_PERSONAS)
def test_a_bad_persona(fresh, fault):
    change, said = BAD_PERSONAS[fault]
    change_persona(fresh, change)
    result = fresh.run()
    assert result.returncode == 2, result.stderr
    assert said in result.stderr and "nervous-mei.yaml" in result.stderr
    assert not fresh.runs.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "poket.yaml"], "the file must exist"),
        (["run", "small.yaml", "--from", "tensor"], "a stage must be one of"),
        (["run", "small.yaml", "--only", "train", "--to", "merge"], "--only names one stage"),
        (["run", "small.yaml", "--runner", "spark"], "--runner must be one of local, ray; found"),
        (["run", "small.yaml", "--frm", "x"], "No such option"),
        (["status", "nothing.yaml"], "the file must exist"),
        (["serve", "small.yaml"], "there must be a merged model"),
        (["import", "small.yaml", "--stage", "merge", "small.yaml"], "--stage must be one of"),
        (["import", "small.yaml", "--stage", "dialogues", "gone.json"], "must exist"),
        (["merge", "nowhere/at/all", "adapter", "out"], "must be"),
    ],
)
def test_a_bad_command(fresh, arguments, said):
    result = fresh.duplex(*arguments)
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not fresh.runs.exists()


def test_a_second_run_at_the_same_time_is_refused(fresh):
    from duplex.lock import RunLock

    with RunLock(fresh.run_folder):
        result = fresh.run()
    assert result.returncode == 1
    assert "one run at a time" in result.stderr


def test_a_missing_key_is_named_before_anything_is_paid(fresh):
    result = fresh.run("--set", "dialogues.writer=openai", "--set", "dialogues.llm=some-model")
    assert result.returncode == 2
    assert "dialogues.runtime.api_key must be given" in result.stderr
    assert not fresh.runs.exists()


def test_personas_that_the_scripted_writer_cannot_speak_for_are_named_at_once(fresh):
    for persona_id in ("nervous-mei", "angry-marcus"):
        path = fresh.persona_file(persona_id)
        persona = yaml.safe_load(path.read_text())
        for fact in persona["facts"]:
            fact["key"] = "wish" if fact["key"] == "order" else fact["key"]
        path.write_text(yaml.safe_dump(persona))
    result = fresh.run()
    assert result.returncode == 2
    assert "nervous-mei" in result.stderr and "angry-marcus" in result.stderr
    assert "menu.yaml" in result.stderr and not fresh.runs.exists()
