"""What the stage makes of a run: best and last adapter, base data, Weights & Biases, settings."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from duplex.errors import MissingInputError, RequestError, WorkError
from duplex.store import StageFolder
from pipeline.train import TrainStage
from tests.stages.training_factories import (
    make_codes,
    make_config,
    run_stage,
    tensor_bytes,
    write_tensors_stage,
)
from training import guards
from training.log import StopTraining

LENGTHS = {"train": [50, 70, 40], "valid": [45, 30]}


@pytest.fixture(scope="module")
def tensors(tiny_checkpoint, tmp_path_factory):
    return write_tensors_stage(tmp_path_factory.mktemp("t") / "tensors", tiny_checkpoint, LENGTHS)


def stage_of_base(path, checkpoint, **changes):
    """Two clips to train on and one held out, none of which is in `tensors`."""
    contents = {
        name: tensor_bytes(make_codes(seed, 35))
        for name, seed in (("train-0", 20), ("train-1", 21), ("valid-0", 23))
    }
    lengths = {"train": [35, 35], "valid": [35]}
    return write_tensors_stage(path, checkpoint, lengths, contents, **changes)


def log_of(folder):
    return [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


def with_watch(monkeypatch, watch):
    monkeypatch.setattr(guards, "Guards", lambda *args, **options: watch)


def test_the_best_adapter_is_handed_in_and_the_last_beside_it(
    tiny_checkpoint, tensors, tmp_path, monkeypatch
):
    with_watch(monkeypatch, lambda step, streams: {"score": abs(step - 3) + 0.5})
    said = []
    config = make_config(tiny_checkpoint)
    folder = run_stage(TrainStage(), config, tmp_path / "train", said.append, tensors=tensors)
    records = {record.id: record for record in folder.records()}
    assert set(records) == {
        "adapter", "adapter-config", "adapter-last", "adapter-last-config", "metrics"
    }  # fmt: skip
    facts = records["adapter"].facts
    assert (facts["best_step"], facts["final_step"]) == (3, 6)
    assert facts["valid_best"] != facts["valid_final"]
    assert any("the adapter of step 3 is handed in" in line for line in said)
    best, last = load_file(folder.artifact("adapter")), load_file(folder.artifact("adapter-last"))
    kept = load_file(folder.work / "checkpoints" / "best-00000003.safetensors")
    for name, tensor in kept.items():
        key = "base_model.model." + name.replace(".default.", ".")
        assert torch.equal(best[key], tensor), name
    assert any(not torch.equal(best[name], last[name]) for name in best)
    assert facts["settings"]["learning_rate"] == 5e-3 and facts["settings"]["seed"] == 42


def test_where_no_check_chooses_one_the_last_is_handed_in_and_said_so(
    tiny_checkpoint, tensors, tmp_path, monkeypatch
):
    with_watch(monkeypatch, lambda step, streams: {"score": None, "collapse": "silence"})
    said = []
    config = make_config(tiny_checkpoint)
    folder = run_stage(TrainStage(), config, tmp_path / "train", said.append, tensors=tensors)
    records = {record.id: record for record in folder.records()}
    facts = records["adapter"].facts
    assert (facts["best_step"], facts["final_step"]) == (None, 6) and "valid_best" not in facts
    assert "adapter-last" not in records
    assert any("no check found one to choose: the last adapter" in line for line in said)
    assert (
        "the last adapter, of step 6: no check chose one"
        in (folder.path / "index.html").read_text()
    )


def test_a_watch_that_stops_it_ends_with_the_best_and_the_reason(
    tiny_checkpoint, tensors, tmp_path, monkeypatch
):
    def watch(step, streams):
        if step == 6:
            raise StopTraining("it says nothing any more")
        return {"score": 1.0}

    with_watch(monkeypatch, watch)
    said = []
    config = make_config(tiny_checkpoint, steps=9)
    folder = run_stage(TrainStage(), config, tmp_path / "train", said.append, tensors=tensors)
    facts = next(record for record in folder.records() if record.id == "adapter").facts
    assert facts["stopped"] == "it says nothing any more"
    assert (facts["best_step"], facts["final_step"], facts["steps"]) == (3, 6, 9)
    assert "stopped after step 6: it says nothing any more" in said
    assert "it says nothing any more" in (folder.path / "index.html").read_text()


# -- base data


def with_base(checkpoint, *paths, share=0.5, **train):
    base = {"folders": [str(path) for path in paths], "share": share}
    return make_config(checkpoint, base_data=base, **train)


def test_base_data_is_mixed_in_and_forgetting_is_seen(tiny_checkpoint, tensors, tmp_path):
    base = stage_of_base(tmp_path / "base", tiny_checkpoint)
    config = with_base(tiny_checkpoint, base.path)
    folder = run_stage(TrainStage(), config, tmp_path / "train", tensors=tensors)
    log = log_of(folder)
    steps = {
        kind: [x["step"] for x in log if x["kind"] == kind] for kind in ("valid", "valid_base")
    }
    assert steps == {"valid": [0, 3, 6], "valid_base": [0, 3, 6]}
    facts = next(record for record in folder.records() if record.id == "adapter").facts
    assert facts["valid_base_final"]["loss"] > 0
    assert facts["settings"]["base_data"] == {"folders": [base.digest[:12]], "share": 0.5}
    page = (folder.path / "index.html").read_text()
    assert "class='base'" in page and "validation, base data" in page
    plain = run_stage(TrainStage(), make_config(tiny_checkpoint), tmp_path / "p", tensors=tensors)
    first = [next(x for x in found if x["kind"] == "train") for found in (log, log_of(plain))]
    assert first[0]["loss"] != first[1]["loss"]


def test_base_data_enters_the_key_by_content_not_by_place(tiny_checkpoint, tmp_path):
    one = stage_of_base(tmp_path / "one", tiny_checkpoint)
    shutil.copytree(one.path, tmp_path / "two")
    other = stage_of_base(tmp_path / "three", tiny_checkpoint, text_tokens=5)
    stage, inputs = TrainStage(), {"tensors": "0" * 64}
    keys = [
        stage.folder_key(with_base(tiny_checkpoint, *paths), inputs)
        for paths in ([one.path], [tmp_path / "two"], [other.path], [one.path, other.path], [])
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 4
    assert keys[4] != stage.folder_key(with_base(tiny_checkpoint, share=0.2), inputs)


def test_base_data_that_does_not_fit_is_refused(tiny_checkpoint, tensors, tmp_path):
    def run(path):
        config = with_base(tiny_checkpoint, path)
        run_stage(TrainStage(), config, tmp_path / "train", tensors=tensors)

    foreign = stage_of_base(tmp_path / "foreign", tiny_checkpoint, codec_digest="f" * 64)
    with pytest.raises(RequestError, match=r"with the codec of the model.*ffffffffffff"):
        run(foreign.path)
    with pytest.raises(RequestError, match="on both sides"):
        contents = {"train-0": tensor_bytes(make_codes(0, 45))}  # what `tensors` holds out
        leak = write_tensors_stage(tmp_path / "x", tiny_checkpoint, {"train": [45]}, contents)
        run(leak.path)
    (foreign.path / "manifest.json").unlink()
    with pytest.raises(MissingInputError, match="must be finished tensors stages"):
        TrainStage().files(with_base(tiny_checkpoint, foreign.path))
    assert StageFolder(foreign.path, "tensors", "").manifest() is None


# -- Weights & Biases


def test_wandb_works_offline_and_learns_no_secret(tiny_checkpoint, tensors, tmp_path, monkeypatch):
    secret = "5ec3e7" * 7
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", secret[:40])
    monkeypatch.setattr(sys, "argv", ["pipeline.train", "--set", f"serve.runtime.token={secret}"])
    runtime = {"device": "cpu", "wandb": True}
    config = make_config(tiny_checkpoint, steps=1, runtime=runtime)
    folder = run_stage(TrainStage(), config, tmp_path / "train", tensors=tensors)
    (run,) = folder.work.glob("wandb/offline-run-*/run-*.wandb")
    content = run.read_bytes()
    for word in (
        b"train/semantic",
        b"valid/text_nonpad",
        b"valid/perplexity/text",
        b"learning_rate",
    ):
        assert word in content, word
    written = [path for path in (folder.work / "wandb").rglob("*") if path.is_file()]
    assert [p for p in written if secret[:40].encode() in p.read_bytes()] == []
    kinds = [line["kind"] for line in log_of(folder)]
    assert kinds == ["valid", "guards", "train", "valid", "guards"], "plain JSONL all the same"


@pytest.mark.parametrize("place", ["training.lora.add_adapters", "training.loop.make_adam"])
def test_a_base_that_does_not_fit_says_what_to_change(
    tiny_checkpoint, tensors, tmp_path, monkeypatch, place
):
    def fail(*arguments):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(place, fail)
    with pytest.raises(WorkError, match="the base and its adapters must fit") as caught:
        run_stage(TrainStage(), make_config(tiny_checkpoint), tmp_path / "t", tensors=tensors)
    for setting in ("train.dtype=bfloat16", "train.quantize=nf4", "train.processes"):
        assert setting in str(caught.value)


def test_base_data_must_hold_something_to_train_on(tiny_checkpoint, tensors, tmp_path):
    contents = {"valid-0": tensor_bytes(make_codes(23, 40))}
    held_out = write_tensors_stage(tmp_path / "b", tiny_checkpoint, {"valid": [40]}, contents)
    config = make_config(tiny_checkpoint, base_data={"folders": [str(held_out.path)]})
    with pytest.raises(RequestError, match="must hold clips of the train split"):
        run_stage(TrainStage(), config, tmp_path / "t", tensors=tensors)
