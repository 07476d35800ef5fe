"""Two processes on the CPU, by gloo: the same run as one, a dead one is named, resume works."""

import json

import pytest
import torch
from safetensors.torch import load_file

from duplex.errors import CorruptFileError, WorkError
from pipeline import train
from pipeline.train import TrainStage
from tests.stages.conftest import write_tiny_checkpoint
from tests.stages.training_factories import make_config, run_stage, write_tensors_stage
from training.distributed import Ranks
from training.launch import run_workers

LENGTHS = {"train": [50, 24, 40, 33, 21, 60], "valid": [45, 30, 28]}
OPTIONS = {
    "batch_size": 4,
    "accumulate": 2,
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
    "runtime": {"checkpoint_every": 2, "device": "cpu"},
}


def log_of(folder):
    return [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tensors(tiny_checkpoint, tmp_path_factory):
    return write_tensors_stage(tmp_path_factory.mktemp("t") / "tensors", tiny_checkpoint, LENGTHS)


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_after_one_died(
    tiny_checkpoint, tensors, tmp_path, monkeypatch
):
    one = run_stage(
        TrainStage(), make_config(tiny_checkpoint, **OPTIONS), tmp_path / "one", tensors=tensors
    )
    config = make_config(tiny_checkpoint, processes=2, **(OPTIONS | {"accumulate": 1}))
    with monkeypatch.context() as patch:
        patch.setattr(train, "WORKER", "tests.stages.dying_worker")
        with pytest.raises(WorkError, match=r"rank 1 dead by signal 9 \(SIGKILL\).*run again"):
            run_stage(TrainStage(), config, tmp_path / "two", tensors=tensors)
    assert not (tmp_path / "two" / "manifest.json").exists()
    said = []
    two = run_stage(TrainStage(), config, tmp_path / "two", said.append, tensors=tensors)
    assert "going on from the checkpoint of step 2" in said
    pairs = list(zip(log_of(one), log_of(two), strict=True))
    assert len(pairs) == 12
    for first, second in pairs:
        assert (first["kind"], first["step"]) == (second["kind"], second["step"])
        if first["kind"] == "guards":
            assert second["nll"]["semantic"] == pytest.approx(first["nll"]["semantic"], rel=1e-4)
            continue
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        # The norm too: AdamW takes gradients of any scale, so losses alone would not show it.
        if "grad_norm" in first:
            assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)
        for name, nll in first["streams"].items():
            assert second["streams"][name] == pytest.approx(nll, rel=1e-4), name
    adapters = [load_file(folder.artifact("adapter")) for folder in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    # Adam moves each weight by about its rate, also where the gradient is rounding alone.
    flat = [torch.cat([a[name].flatten() for name in sorted(a)]) for a in adapters]
    assert (flat[1] - flat[0]).norm() < 1e-2 * flat[0].norm()
    facts = next(record for record in two.records() if record.id == "adapter").facts
    assert facts["settings"]["processes"] == 2 and facts["alive_modules"]["depth"] == 40


FULL = {"runtime": {"checkpointing": "full"}}
CASES = {
    "bfloat16": {"dtype": "bfloat16"},
    "made again": FULL,
    "made again, with dropout": {
        "lora": {"dropout": 0.2}, "runtime": {"checkpointing": "selective"},
    },
    "the library's forward": {"forward": "library"},
    "the library's, made again": {"forward": "library", **FULL},
    "some targets": {"lora": {"targets": ["attention"]}},
    "embeddings": {"lora": {"embeddings": True}},
    "the user's streams": {"loss": {"user_streams": True}},
}  # fmt: skip


@pytest.mark.slow
def test_sharded_and_gathered_weights_compute_what_whole_ones_do(tmp_path):
    wide = write_tiny_checkpoint(tmp_path / "wide", dep_q=16)
    job = {"checkpoint": str(wide), "cases": list(CASES.values())}
    found = run_workers("tests.stages.sharded_worker", job, 2)
    assert {name: d for name, d in zip(CASES, found, strict=True) if not d < 1e-6} == {}


@pytest.mark.slow
def test_two_processes_killed_and_resumed_end_with_the_same_bytes(
    tiny_checkpoint, tensors, tmp_path, monkeypatch
):
    config = make_config(tiny_checkpoint, processes=2, batch_size=4)
    whole = run_stage(TrainStage(), config, tmp_path / "whole", tensors=tensors)
    monkeypatch.setattr(train, "WORKER", "tests.stages.dying_worker")
    with pytest.raises(WorkError):
        run_stage(TrainStage(), config, tmp_path / "again", tensors=tensors)
    monkeypatch.undo()
    again = run_stage(TrainStage(), config, tmp_path / "again", tensors=tensors)
    assert again.digest == whole.digest


WORKERS = """
import os, sys
sys.path.insert(0, os.getcwd())
from duplex.errors import CorruptFileError
from training.launch import work

def do(job, report):
    print("library noise")
    report("rank " + os.environ["RANK"])
    if job["fault"] == "ours" and os.environ["RANK"] == "1":
        raise CorruptFileError("that file")
    if job["fault"] == "other" and os.environ["RANK"] == "1":
        raise KeyError("that key")
    return {"world": os.environ["WORLD_SIZE"], "secret": job["secret"]}

work(do)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / "small_worker.py").write_text(WORKERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "small_worker"


def test_workers_answer_and_the_first_is_heard(worker):
    said = []
    result = run_workers(worker, {"fault": "", "secret": "s"}, 2, said.append)
    assert result == {"world": "2", "secret": "s"} and said == ["rank 0"]


def test_an_error_of_a_rank_comes_out_as_what_it_was(worker):
    with pytest.raises(CorruptFileError, match=r"^that file$"):
        run_workers(worker, {"fault": "ours", "secret": ""}, 2)
    with pytest.raises(WorkError, match="rank 1 of 2 failed: KeyError: 'that key'"):
        run_workers(worker, {"fault": "other", "secret": ""}, 2)


def test_ranks_that_differ_are_refused(monkeypatch):
    ranks = Ranks(0, 2, torch.device("cpu"))

    def gather(found, mine):
        found[:] = [mine, "f" * 64]

    monkeypatch.setattr("training.distributed.distributed.all_gather_object", gather)
    with pytest.raises(WorkError, match=r"same on all 2 processes.*rank 1: ffffffffffff"):
        ranks.check_equal({"a": torch.zeros(3)}, "adapters")
