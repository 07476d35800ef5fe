"""An evaluation in Weights & Biases: offline, without a secret, and never in the stage's way."""

import io
import json
import sys
import time

import pytest
import soundfile

from duplex.config import Config
from pipeline.evaluation import wandb_tables
from pipeline.evaluation.found import recordings
from pipeline.evaluation.play import PlaySettings, evaluate_urls
from pipeline.evaluation.report import page_files
from pipeline.evaluation.wandb_tables import conversation_rows, log_evaluation, summary_values
from tests.stages.planted_server import Plan, planted, spoken, tiny_tokenizer

SECRET = "5ec3e7" * 7


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """report.json of a model that echoes against one that knows its name, with the recordings."""
    folder = tmp_path_factory.mktemp("evaluated")
    item = spoken(seconds=6.4)
    echo = Plan(says={item.turns[1].start: " Your name"})
    with planted(echo) as one, planted(Plan(says={20: " Ann"})) as other:
        settings = PlaySettings(tokenizer=tiny_tokenizer())
        played = evaluate_urls({"base": one, "merged": other}, [item], settings, lambda line: None)
    fixed, _ = page_files(played, {}, about={"name": "x"}, protocol={"seconds": 6}, training=[])
    for name, content in recordings(played).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return json.loads(fixed["report.json"]), folder


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET[:40])
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["pipeline.evaluate", "--set", f"serve.token={SECRET}"])
    private = tmp_path / "private"
    evaluate = {
        "items": [str(private / "items.yaml")], "base_clips": str(private / "clips"),
        "recogniser": f"faster-whisper:{private / 'model'}",
    }  # fmt: skip
    return Config.model_validate(
        {"name": "tiny", "train": {"runtime": {"wandb": True}}, "evaluate": evaluate}
    )


def wait_for(condition, within_s=20.0):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_offline_run_holds_summary_tables_and_recordings_and_no_secret(
    evaluated, config, tmp_path
):
    data, folder = evaluated
    said = []
    assert log_evaluation(data, folder, tmp_path / "work", config, said.append) and said == []
    (run,) = (tmp_path / "work").glob("wandb/offline-run-*")
    (log,) = run.glob("run-*.wandb")
    words = (b"merged/facts_said", b"base/echo_rate", b"fingerprint", b"items.yaml")
    # A process of wandb's own writes it.
    wait_for(lambda: all(word in log.read_bytes() for word in words))
    tables = {
        path.name.split("_")[0]: json.loads(path.read_text())
        for path in run.glob("files/media/table/*.table.json")
    }
    verdicts, conversations = tables["verdicts"], tables["conversations"]
    assert verdicts["columns"] == list(wandb_tables.VERDICT_COLUMNS)
    measured = data["verdicts"][0]["rows"]
    assert len(verdicts["data"]) == len(measured)
    base, merged = [dict(zip(conversations["columns"], row, strict=True))
                    for row in conversations["data"]]  # fmt: skip
    assert (base["model"], base["grade"], base["transcript"]) == ("base", "poor", "Your name")
    assert base["faults"] == "turn 1: no words; turn 2: echo"
    assert merged["transcript"] == "Ann"
    # What a table holds of files is in its artifact, which stands in wandb's own folder.
    kept = [path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()]
    for name in ("base", "merged"):
        opus = (tmp_path / f"work/recordings/angry-ann.s0.{name}.ogg").read_bytes()
        assert opus in kept
        found = soundfile.info(io.BytesIO(opus))
        assert (found.subtype, found.channels) == ("OPUS", 2)
        assert found.duration == pytest.approx(62 * 0.08, abs=0.05)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    for secret in (SECRET[:40].encode(), str(tmp_path / "private").encode()):
        assert [path for path in written if secret in path.read_bytes()] == []


def test_without_being_asked_nothing_is_logged(evaluated, tmp_path, monkeypatch):
    data, folder = evaluated
    monkeypatch.setattr("wandb.init", lambda **_: pytest.fail("nobody asked for it"))
    assert not log_evaluation(data, folder, tmp_path / "work", Config(name="tiny"), print)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("place", ["init", "Table", "Audio"])
def test_whatever_fails_is_said_and_the_stage_goes_on(
    evaluated, config, tmp_path, monkeypatch, place
):
    data, folder = evaluated
    said = []

    def fail(*arguments, **options):
        raise RuntimeError(f"no such server, with key {SECRET[:40]}")

    monkeypatch.setattr(f"wandb.{place}", fail)
    assert not log_evaluation(data, folder, tmp_path / "work", config, said.append)
    assert said == [
        "Weights & Biases got nothing of this evaluation: "
        "RuntimeError: no such server, with key ***"
    ]
    assert sys.modules["wandb"].run is None, "no run is left open"


def test_a_package_that_is_not_there_is_no_fault_of_the_evaluation(
    evaluated, config, tmp_path, monkeypatch
):
    data, folder = evaluated
    said = []
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert not log_evaluation(data, folder, tmp_path / "work", config, said.append)
    assert "ModuleNotFoundError" in said[0]


def test_of_many_recordings_the_worst_are_logged(evaluated, monkeypatch):
    data, _ = evaluated
    monkeypatch.setattr(wandb_tables, "MOST_RECORDINGS", 1)
    (kept,) = wandb_tables.recordings_to_log(data["conversations"][::-1])
    assert kept == conversation_rows(data)[0][-1] == "conversations/angry-ann.s0.base.wav"
    assert summary_values(data)["base/echo_rate"] == 1
