"""The evaluate stage as a whole, and the comparison of servers that are up already."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import pipeline.evaluate
import pipeline.evaluation.checkpoints
import pipeline.serving.launch
from duplex.config import Config
from duplex.errors import CorruptFileError, RequestError, ServerError
from duplex.files import sha256_bytes
from duplex.records import Artifact, Score
from duplex.sinks import FileWriter
from duplex.stage import StageContext
from duplex.store import StageFolder
from pipeline.evaluate import EvaluateStage
from pipeline.evaluate_targets import EvaluateOptions, evaluate_to_folder, name_targets
from pipeline.evaluation.found import report_data
from pipeline.evaluation.likelihood import teacher_force
from pipeline.evaluation.play import PlaySettings, evaluate_urls
from pipeline.runners.local import execute
from tests.stages.planted_server import Plan, ToneEngine, item, planted, spoken, tiny_tokenizer
from tests.stages.training_factories import write_tensors_stage

ROOT = Path(__file__).resolve().parents[2]
METRICS = [
    {"kind": kind, "step": step, "loss": 9.0 - step, "streams": {"text": 3.0, "semantic": 2.0}}
    for step in range(3)
    for kind in ("train", "valid")
]

# -- the stage


@pytest.fixture
def stage_run(tmp_path, monkeypatch):
    """Runs the stage into a folder, with planted servers in place of the two models."""
    items = tmp_path / "items.yaml"
    listed = [item().model_dump(mode="json"), item("angry-bob").model_dump(mode="json")]
    items.write_text(json.dumps({"items": listed}))
    evaluate = {"items": str(items), "seconds": 6.4, "answer_s": 1.6, "sockets": True}
    config = Config.model_validate({"name": "tiny", "evaluate": evaluate})
    names = ("personas", "tensors", "train", "merge")
    inputs = {name: StageFolder(tmp_path / name, name, name * 2) for name in names}
    for name in ("personas", "tensors"):
        inputs[name].complete([], files=[], counts={}, provenance={})
    writer = FileWriter(inputs["train"])
    (writer.work / "m").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    record = writer.add("metrics", writer.work / "m", "metrics.jsonl")
    line = json.dumps({"record": "Artifact", **record.model_dump(mode="json")})
    inputs["train"].complete([line], files=writer.files, counts={}, provenance={})
    merging = FileWriter(inputs["merge"])
    (merging.work / "w").write_bytes(b"the weights")
    record = merging.add("weights", merging.work / "w", "checkpoint/model.safetensors")
    line = json.dumps({"record": "Artifact", **record.model_dump(mode="json")})
    inputs["merge"].complete([line], files=merging.files, counts={}, provenance={})
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.model").write_bytes(tiny_tokenizer())
    plans = {
        base: Plan(says={20: " Hello"}),
        tmp_path / "merge" / "checkpoint": Plan(echo=14, says={20: " Ann"}, model_digest="b" * 64),
    }

    up, together, threads = [], [], []

    @contextmanager
    def running(checkpoint, *, device, timeout_s, port=0, voices=None, bare=False, slots=1):
        assert not voices and not bare and slots == 16
        threads.append(os.environ.get("OMP_NUM_THREADS"))
        up.append(checkpoint)
        together.append(len(up))
        with planted(plans[checkpoint]) as url:
            yield url
        up.remove(checkpoint)

    checkpoint = SimpleNamespace(folder=base, files=lambda: {"tokenizer": base / "tokenizer.model"})
    monkeypatch.setattr(pipeline.evaluation.checkpoints, "running_server", running)
    monkeypatch.setattr("training.servable.servable_checkpoint", lambda *_: checkpoint)
    monkeypatch.setattr(pipeline.evaluate.espeak, "EspeakEngine", lambda: _closing(ToneEngine()))

    def run(name="out", report=lambda line: None, **sections):
        folder = StageFolder(tmp_path / name, "evaluate", "k" * 64)
        used = Config.model_validate(config.model_dump(mode="json") | sections)
        context = StageContext(used, tmp_path, inputs, report=report)
        execute(EvaluateStage(), context, folder)
        return folder

    return SimpleNamespace(
        run=run, plans=list(plans.values()), config=config, items=items, together=together,
        threads=threads, inputs=inputs,
    )  # fmt: skip


@contextmanager
def _closing(engine):
    yield engine


def test_the_stage_scores_each_item_on_both_models(stage_run):
    folder = stage_run.run()
    assert json.loads((folder.path / "report.json").read_text())["likelihood"] is None
    assert "Teacher-forced" not in (folder.path / "report.html").read_text()
    scores = {record.id: record for record in folder.records() if isinstance(record, Score)}
    names = [f"angry-{who}.s0.{m}" for who in ("ann", "bob") for m in ("base", "merged")]
    assert set(scores) == set(names)
    base, merged = scores["angry-ann.s0.base"], scores["angry-ann.s0.merged"]
    assert base.prompt_proven and merged.prompt_proven
    assert (base.transcript, merged.transcript) == ("Hello", "Ann")
    assert (base.metrics["responses"], merged.metrics["responses"]) == (0, 2)
    assert (base.metrics["facts_said"], merged.metrics["facts_said"]) == (0, 1)
    for record in folder.records():
        if isinstance(record, Artifact):
            content = (folder.path / record.path).read_bytes()
            assert sha256_bytes(content) == record.sha256
    audio = (folder.path / "conversations/angry-ann.s0.merged.wav").read_bytes()
    assert sha256_bytes(audio) == merged.audio
    for name in ("report.html", "index.html", "report.json", "timings.json"):
        assert (folder.path / name).stat().st_size > 0
    # Both models heard the same: the same items, audio and seed, the first item twice.
    asked = [[query["seed"] + query["text_prompt"] for query in p.seen] for p in stage_run.plans]
    assert asked[0] == asked[1] and len(asked[0]) == 3


def test_a_prompt_that_was_not_fed_fails_the_stage(stage_run):
    stage_run.plans[1].digest = "0" * 64
    with pytest.raises(ServerError, match="merged must be fed the prompt of angry-ann"):
        stage_run.run()


def test_merged_weights_that_were_changed_are_not_scored(stage_run, tmp_path):
    (tmp_path / "merge" / "checkpoint" / "model.safetensors").write_bytes(b"the heights")
    with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
        stage_run.run()


@pytest.mark.parametrize(("device", "together"), [("cpu", [1, 2]), ("cuda", [1, 1])])
def test_two_models_share_a_cpu_and_take_turns_on_a_gpu(stage_run, device, together, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for plan in stage_run.plans:
        plan.device = device
    folder = stage_run.run()
    assert stage_run.together == together
    assert "OMP_NUM_THREADS" not in os.environ
    assert all(int(threads) >= 1 for threads in stage_run.threads)
    models = [
        model["label"] for model in json.loads((folder.path / "report.json").read_text())["models"]
    ]
    assert models == ["base", "merged"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    stage_run.run("again")
    assert stage_run.threads[-2:] == ["7", "7"]


def test_two_runs_have_one_digest_though_their_pages_differ(stage_run):
    one, other = stage_run.run("one"), stage_run.run("other")
    assert one.digest == other.digest
    assert (one.path / "report.json").read_bytes() == (other.path / "report.json").read_bytes()
    assert (one.path / "timings.json").read_bytes() != (other.path / "timings.json").read_bytes()
    stage_run.plans[1].echo = 15
    assert stage_run.run("third").digest != one.digest


@pytest.mark.slow  # scores by themselves: test_likelihood.py
def test_clips_are_scored_the_same_on_every_run_and_on_the_page(
    stage_run, tiny_checkpoint, tmp_path, monkeypatch
):
    """Planted servers talk; what is scored without talking is a real model, twice."""
    seen = []

    def really(checkpoints, *rest):
        seen.append(dict(checkpoints))
        return teacher_force(dict.fromkeys(checkpoints, tiny_checkpoint), *rest)

    monkeypatch.setattr(pipeline.evaluate, "teacher_force", really)
    stage_run.inputs["tensors"] = write_tensors_stage(
        tmp_path / "clips", tiny_checkpoint, {"train": [30], "valid": [30, 33, 36]}
    )
    one, other = stage_run.run("one"), stage_run.run("other")
    assert one.digest == other.digest
    assert [list(checkpoints) for checkpoints in seen] == [["base", "merged"]] * 2
    assert seen[0]["merged"] == tmp_path / "merge" / "checkpoint"
    data = json.loads((one.path / "report.json").read_text())
    clips = data["likelihood"]["clips"]
    assert [(e["clip"], e["model"]) for e in clips] == [
        (f"valid-{n}", model) for n in range(3) for model in ("base", "merged")
    ]
    (row,) = [row for row in data["verdicts"][0]["rows"] if row["key"] == "nll_words"]
    assert (row["n"], row["difference"], row["word"]) == (3, 0, "inconclusive")
    assert data["protocol"]["teacher_forced"] == {"clips": 16, "swaps": 2, "base_clips": None}
    page = (one.path / "report.html").read_text()
    assert "<h2>Teacher-forced</h2>" in page and "Held-out clips of this run: 3" in page
    assert "So few clips never give a verdict" in page


def test_weights_and_biases_get_the_report_and_their_failure_is_none_of_the_stages(
    stage_run, monkeypatch
):
    asked = {"train": {"runtime": {"wandb": True}}}
    logged, said = [], []
    monkeypatch.setattr(
        "pipeline.evaluation.wandb_tables._log",
        lambda data, folder, work, config: logged.append((data, folder, work)),
    )
    folder = stage_run.run("one", **asked)
    ((data, where, work),) = logged
    assert data == json.loads((folder.path / "report.json").read_text())
    assert work == folder.work and all((where / c["audio"]).exists() for c in data["conversations"])
    monkeypatch.setattr("pipeline.evaluation.wandb_tables._log", lambda *_: 1 / 0)
    other = stage_run.run("other", said.append, **asked)
    assert other.digest == folder.digest == stage_run.run("plain").digest
    assert len(logged) == 1 and "ZeroDivisionError" in " ".join(said)


def test_the_key_follows_what_the_items_say_not_how_they_are_written(stage_run):
    stage, config = EvaluateStage(), stage_run.config
    before = stage.files(config)
    content = stage_run.items.read_text()
    stage_run.items.write_text("# a comment\n" + content)
    assert stage.files(config) == before
    stage_run.items.write_text(content.replace("Your name", "Your order"))
    assert stage.files(config) != before


def test_neither_planning_nor_evaluating_imports_torch():
    code = (
        "import sys, pipeline.evaluate;"
        "light = 'numpy' not in sys.modules or 'aiohttp' not in sys.modules;"
        "import pipeline.evaluation.report, pipeline.evaluation.play, pipeline.serving.launch;"
        "print(light, 'torch' in sys.modules, 'moshi' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.split() == ["True", "False", "False"]


# -- servers that are up


def test_running_servers_are_compared_into_a_folder(stage_run, tmp_path, capsys):
    one, other = stage_run.plans
    with planted(one) as first, planted(other) as second:
        options = EvaluateOptions(
            against=first, items=(str(stage_run.items),), out=tmp_path / "deep" / "out"
        )
        found = evaluate_to_folder([f"{second}/?text_prompt=ignored"], options)
    page = Path(found["report"])
    assert capsys.readouterr().out == ""  # `--json` prints there
    data = json.loads((page.parent / "report.json").read_text())
    assert len(data["models"]) == 2
    assert data["models"][0]["digest"] == "a" * 64
    assert data["changed"]["differ"] == 2
    assert all((page.parent / found["audio"]).exists() for found in data["conversations"])
    assert page.name == "report.html"


def test_a_folder_of_an_earlier_report_keeps_nothing_of_it_but_paid_replies(stage_run, tmp_path):
    out = tmp_path / "out"
    options = EvaluateOptions(items=(str(stage_run.items),), out=out)
    with planted(stage_run.plans[0]) as url:
        evaluate_to_folder([url], options)
        for name in ("judge.json", "judge.html", "conversations/old.wav", "mine.txt"):
            (out / name).write_text("old")
        (out / "judge").mkdir()
        (out / "judge" / "exchanges.jsonl").write_text("paid for")
        evaluate_to_folder([url], options)
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"mine.txt", "judge/exchanges.jsonl", "report.json"} <= left
    assert not left & {"judge.json", "judge.html", "conversations/old.wav"}


def test_no_exit_code_hangs_on_a_prompt_that_is_not_proven(stage_run, tmp_path):
    one, other = stage_run.plans
    other.proves = False
    options = EvaluateOptions(
        items=(str(stage_run.items),), out=tmp_path / "out", fail_on=("regressed",)
    )
    with planted(one) as first, planted(other) as second:
        with pytest.raises(RequestError, match="needs two models"):
            evaluate_to_folder([first], options)
        with pytest.raises(ServerError, match="must be fed the prompt"):
            evaluate_to_folder([first, second], options)
    assert (tmp_path / "out" / "report.html").is_file()
    with pytest.raises(RequestError, match="--real-time is for servers, found the folder"):
        evaluate_to_folder([str(tmp_path), str(tmp_path)], EvaluateOptions(real_time=True))


def test_servers_are_named_by_where_they_are():
    assert list(
        name_targets(["http://10.0.0.1:80/?a=b", "ws://u:secret@Host/x", "http://host"])
    ) == ["10.0.0.1-80", "host", "host-again1"]
    for wrong in ("runs/nowhere", "http://"):
        with pytest.raises(RequestError, match="must be a config"):
            name_targets([wrong])


@pytest.mark.slow  # the same of scores alone: test_likelihood.py
def test_one_real_model_against_itself_shows_no_change(tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other spin
    tokenizer = (tiny_checkpoint / "tokenizer.model").read_bytes()
    settings = PlaySettings(tokenizer=tokenizer, seeds=(5,))
    items = [spoken(seconds=1), spoken(item_id="angry-bob", seconds=1, text_prompt="You are Bob.")]
    with pipeline.serving.launch.running_server(tiny_checkpoint, device="cpu") as url:
        played = evaluate_urls({"base": url, "merged": url}, items, settings, lambda line: None)
    assert all(m.proof.proven for model in played for m in model.conversations)
    assert [model.repeats for model in played] == [True, True]
    assert report_data(played, about={}, protocol={})["changed"]["differ"] == 0
    first, second = played[0].conversations
    assert not np.array_equal(first.conversation.agent, second.conversation.agent)
