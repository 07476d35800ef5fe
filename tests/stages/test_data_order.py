"""The data stages, personas to speech: the same bytes whatever the order of work."""

import random

import pytest

from duplex.config import Config
from duplex.errors import StageFailedError
from pipeline import run as pipeline_run
from pipeline.runners import local
from pipeline.runners.work import LocalRunner

DATA_STAGES = ("personas", "dialogues", "voices", "speech")
CONFIG = {
    "name": "order",
    "personas": {"only": ["angry-marcus", "friendly-june", "nervous-mei"]},
    "dialogues": {
        "per_persona": 6, "min_turns": 8, "max_turns": 10,
        "checks": {"near_duplicate": 0.08},  # so low that some are sent back
    },
    "speech": {"timeline": {"room_tone_dbfs": -60, "noise_dbfs": -50, "leakage_db": -40}},
}  # fmt: skip


def digests(root, **dialogues):
    """Digests of the data stages, worked off in this process."""
    section = CONFIG["dialogues"] | dialogues
    config = Config.model_validate(CONFIG | {"dialogues": section})
    found = {}
    for index, name in enumerate(DATA_STAGES):
        steps = pipeline_run.plan(config, root)
        context = pipeline_run.context_for(steps[index], steps, config, root)
        local.execute(steps[index].stage, context, steps[index].folder)
        manifest = steps[index].folder.manifest()
        found[name] = manifest["digest"]
        if name == "dialogues":
            found["made"] = manifest["provenance"]["made"]
    return found


@pytest.fixture(scope="module")
def in_order(tmp_path_factory):
    return digests(tmp_path_factory.mktemp("in-order"))


def test_some_dialogues_are_sent_back_here(in_order):
    assert in_order["made"] > 18


@pytest.mark.slow  # in another order they are, too: below
def test_two_runs_are_equal(in_order, tmp_path):
    assert digests(tmp_path) == in_order


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_another_order_changes_no_byte(in_order, tmp_path, monkeypatch, seed):
    def shuffled(runner, stage, context, folder, tasks, begin):
        tasks = list(tasks)
        random.Random(seed).shuffle(tasks)
        return outcomes(runner, stage, context, folder, tasks, begin)

    outcomes = LocalRunner.outcomes
    monkeypatch.setattr(LocalRunner, "outcomes", shuffled)
    assert digests(tmp_path) == in_order


@pytest.mark.slow  # dialogues of a whole run: e2e/test_pipeline.py
def test_a_run_with_more_dialogues_keeps_the_speech_that_it_had(in_order, tmp_path):
    digests(tmp_path, per_persona=3)
    assert digests(tmp_path) == in_order | {"made": digests_made(tmp_path)}


def digests_made(root):
    """What the second of two runs in one folder made anew."""
    config = Config.model_validate(CONFIG)
    step = pipeline_run.plan(config, root)[1]
    return step.folder.manifest()["provenance"]["made"]


def test_a_stage_with_too_many_rejects_leaves_the_page_that_says_why(tmp_path):
    section = CONFIG["dialogues"] | {"checks": {"min_patterns": 50}, "max_candidates": 1}
    config = Config.model_validate(CONFIG | {"dialogues": section})
    for index in range(2):
        steps = pipeline_run.plan(config, tmp_path)
        context = pipeline_run.context_for(steps[index], steps, config, tmp_path)
        if index == 0:
            local.execute(steps[0].stage, context, steps[0].folder)
            continue
        with pytest.raises(StageFailedError, match="18 of 18"):
            local.execute(steps[1].stage, context, steps[1].folder)
        assert "no-pattern" in (steps[1].folder.path / "index.html").read_text()
