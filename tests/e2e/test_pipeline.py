"""The whole pipeline as a user runs it: done once, left alone, changed in one place."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.run import STAGE_NAMES
from tests.e2e.conftest import PERSONAS, ROOT


def made(workplace):
    return {
        name: manifest["provenance"].get("made") for name, manifest in workplace.manifests().items()
    }


def test_every_stage_is_done_and_says_what_it_did(finished):
    rows = {row["name"]: row for row in finished.status()}
    assert [rows[name]["state"] for name in STAGE_NAMES] == ["done"] * 9
    counts = {name: row["counts"]["records"] for name, row in rows.items()}
    assert counts["personas"] == len(PERSONAS) + 2 + 1  # scenarios, domain
    assert counts["dialogues"] == counts["speech"] == counts["tensors"] == len(PERSONAS) * 2
    assert counts["evaluate"] >= 8
    assert all(row["rejects"] == 0 for row in rows.values())


def test_the_report_is_one_file_with_players_and_prompts(finished):
    row = finished.status()[-1]
    page = (Path(row["folder"]) / "report.html").read_text()
    assert page.count("<audio") >= 8
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", page))
    assert {a for a in addresses if not a.startswith("http://www.w3.org/")} == set()
    assert "This is the pocket model" in page  # said where it is heard


def test_a_second_run_starts_nothing_and_imports_no_torch(finished, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in finished.run_folder.rglob("*")}
    code = (
        "import sys, duplex.cli;"
        "sys.argv = ['duplex', 'run', 'small.yaml'];"
        "import subprocess; subprocess.Popen = None;"
        "import contextlib\n"
        "with contextlib.suppress(SystemExit): duplex.cli.main()\n"
        "assert 'torch' not in sys.modules and 'moshi' not in sys.modules"
    )
    import subprocess

    from tests.e2e.conftest import environment

    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=finished.folder, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(": done (") == 9
    after = {path: path.stat().st_mtime_ns for path in finished.run_folder.rglob("*")}
    lock = finished.run_folder / ".lock"
    assert {p: t for p, t in before.items() if p != lock} == {
        p: t for p, t in after.items() if p != lock
    }


def test_one_changed_trait_rewrites_the_dialogues_of_its_persona_alone(workplace):
    """The scripted writer makes the same words of it: what follows from words stays untouched."""
    before = workplace.manifests()
    path = workplace.persona_file("friendly-june")
    persona = yaml.safe_load(path.read_text())
    persona["traits"][0] = "delighted by small things"
    path.write_text(yaml.safe_dump(persona))
    result = workplace.run("--to", "tensors")
    assert result.returncode == 0, result.stderr
    after = workplace.manifests()
    rewritten = {"personas": 1, "dialogues": 2, "voices": 0}  # no voice hangs on that trait
    assert {name: after[name]["provenance"]["made"] for name in rewritten} == rewritten
    assert all(before[name]["key"] != after[name]["key"] for name in rewritten)
    assert before["dialogues"]["digest"] == after["dialogues"]["digest"]
    assert all(before[name] == after[name] for name in ("speech", "tensors"))


@pytest.mark.slow  # a changed trait does the same, above
def test_changed_prompts_rewrite_their_persona_s_dialogues_and_all_that_follows(workplace):
    path = workplace.persona_file("friendly-june")
    persona = yaml.safe_load(path.read_text())
    persona["prompts"] = [prompt + " You are in a fine mood." for prompt in persona["prompts"]]
    path.write_text(yaml.safe_dump(persona))
    result = workplace.run("--to", "tensors")
    assert result.returncode == 0, result.stderr
    expected = {"personas": 1, "dialogues": 2, "voices": 0, "speech": 2, "tensors": 2}
    counts = made(workplace)
    assert {name: counts[name] for name in expected} == expected
    states = {row["name"]: row["state"] for row in workplace.status()}
    assert states["tensors"] == "done" and states["train"] == "stale"


@pytest.mark.slow  # the stage by itself: tests/stages/test_quantized.py
def test_a_run_trains_on_a_base_in_4_bits(workplace):
    """In the stage's own process, which leaves bitsandbytes out wherever it is not asked for."""
    settings = ("train.quantize=nf4", "train.steps=1", "train.runtime.device=cpu")
    result = workplace.run("--to", "train", *(part for s in settings for part in ("--set", s)))
    assert result.returncode == 0, result.stderr


def test_more_dialogues_keep_those_that_are_there(workplace):
    result = workplace.run("--to", "dialogues", "--set", "dialogues.per_persona=1")
    assert result.returncode == 0, result.stderr
    assert "3 records" in result.stdout and "3 adopted" in result.stdout


def test_a_run_that_was_moved_is_not_done_again(workplace, tmp_path):
    moved = workplace.copy_to(tmp_path / "elsewhere")
    assert [row["state"] for row in moved.status()] == ["done"] * 9
    assert moved.run().stdout.count(": done (") == 9


def test_leaving_out_what_is_needed_says_where_it_was_looked_for(workplace):
    result = workplace.run("--only", "merge", "--set", "train.steps=7")
    assert result.returncode == 2
    assert "merge reads the output of train" in result.stderr
    assert str(workplace.run_folder.name) in result.stderr
    result = workplace.run("--skip", "train", "--set", "train.steps=7")
    assert result.returncode == 2 and "reads the output of train" in result.stderr


def test_dry_run_writes_nothing_and_json_is_json(workplace):
    before = sorted(workplace.runs.rglob("*"))
    result = workplace.run("--dry-run", "--json", "--set", "train.steps=7")
    actions = {row["name"]: row["action"] for row in json.loads(result.stdout)["stages"]}
    assert actions["tensors"] == "keep" and actions["train"] == actions["evaluate"] == "run"
    assert sorted(workplace.runs.rglob("*")) == before


def test_clean_shows_then_removes_what_the_config_no_longer_needs(workplace):
    assert workplace.run("--to", "dialogues", "--set", "dialogues.per_persona=1").returncode == 0
    shown = workplace.duplex("clean", "small.yaml", "--dry-run", "--json")
    folders = [Path(row["path"]).name for row in json.loads(shown.stdout)["folders"]]
    assert len(folders) == 1 and folders[0].startswith("02-dialogues-")
    assert workplace.duplex("clean", "small.yaml").returncode == 2  # nobody to ask
    assert (workplace.run_folder / folders[0]).exists()
    assert workplace.duplex("clean", "small.yaml", "--yes").returncode == 0
    assert not (workplace.run_folder / folders[0]).exists()
    assert [row["state"] for row in workplace.status()] == ["done"] * 9


def test_no_path_of_this_machine_is_in_a_manifest(finished):
    for path in finished.run_folder.rglob("*.json*"):
        assert str(ROOT) not in path.read_text() and str(finished.folder) not in path.read_text()
