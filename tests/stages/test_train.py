"""The train stage: it learns, repeats, resumes after a kill, and stops on what is wrong."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from duplex.config_train import TrainSection
from duplex.errors import CorruptFileError, DeadAdapterError, RequestError, WorkError
from pipeline.engines.checkpoint import Checkpoint
from pipeline.train import TrainStage
from tests.stages.conftest import write_tiny_checkpoint
from tests.stages.training_factories import (
    PROMPT_FRAMES,
    make_clip,
    make_codes,
    make_config,
    run_stage,
    tensor_bytes,
    write_tensors_stage,
)
from training.batches import make_batch
from training.checkpoint import TrainState, latest_checkpoint, save_checkpoint
from training.optimizer import learning_rate
from training.sampler import Sampler

LENGTHS = {"train": [50, 70, 40], "valid": [45, 30]}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tensors(tiny_checkpoint, tmp_path_factory):
    return write_tensors_stage(tmp_path_factory.mktemp("t") / "tensors", tiny_checkpoint, LENGTHS)


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, tensors, tmp_path_factory):
    """One finished run, read only."""
    folder = tmp_path_factory.mktemp("trained") / "train"
    return run_stage(TrainStage(), make_config(tiny_checkpoint), folder, tensors=tensors)


def log_of(folder):
    return [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


# -- what a run makes


def test_the_stage_hands_in_adapter_metrics_and_page(trained):
    records = {record.id: record for record in trained.records()}
    assert set(records) == {"adapter", "adapter-config", "metrics"}
    facts = records["adapter"].facts
    assert facts["adapted_modules"] == facts["alive_modules"]
    assert sum(facts["adapted_modules"].values()) == 57
    assert facts["rank"] == 4 and facts["alpha"] == 8
    state = load_file(trained.artifact("adapter"))
    assert sum(tensor.numel() for tensor in state.values()) == facts["trainable_parameters"]
    assert facts["valid_final"]["loss"] < facts["valid_initial"]["loss"]
    config = (trained.path / "adapter" / "adapter_config.json").read_text()
    assert "/" not in config, "no machine path"
    page = (trained.path / "index.html").read_text()
    assert page.count("<svg") == 17 and "http" not in page and "src=" not in page
    timing = [json.loads(line) for line in (trained.path / "timing.jsonl").open()]
    assert all(line["frames_per_s"] > 0 for line in timing if line["kind"] != "guards")


def test_the_log_has_each_step_and_each_validation(trained):
    log = log_of(trained)
    assert [line["step"] for line in log if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in log if line["kind"] == "valid"] == [0, 3, 6]
    assert [line["step"] for line in log if line["kind"] == "guards"] == [0, 3, 6]
    for line in log:
        if line["kind"] == "guards":
            continue
        assert len(line["streams"]) == 10 and all(v > 0 for v in line["streams"].values())


def test_the_adapter_loads_into_peft(trained, tiny_checkpoint):
    from peft import PeftModel

    lm = Checkpoint.open(tiny_checkpoint).load_lm()
    model = PeftModel.from_pretrained(lm, str(trained.path / "adapter"))
    loaded = {
        name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name
    }
    state = load_file(trained.artifact("adapter"))
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_the_loss_falls_on_what_can_be_learnt(tiny_checkpoint, tensors, tmp_path):
    config = make_config(
        tiny_checkpoint, steps=40, learning_rate=2e-2, validate_every=40,
        lora={"rank": 8, "alpha": 16},
    )  # fmt: skip
    log = log_of(run_stage(TrainStage(), config, tmp_path / "train", tensors=tensors))
    first, last = (line for line in log if line["kind"] == "valid")
    for stream in ("text", "semantic", "acoustic_1", "acoustic_7"):
        assert last["streams"][stream] < 0.7 * first["streams"][stream], stream


@pytest.mark.slow  # a killed one has it, too: below
def test_two_runs_have_the_same_digest(trained, tiny_checkpoint, tensors, tmp_path):
    config = make_config(tiny_checkpoint)
    again = run_stage(TrainStage(), config, tmp_path / "again", tensors=tensors)
    assert again.digest == trained.digest
    other = config.model_copy(update={"seed": 1})
    assert run_stage(TrainStage(), other, tmp_path / "o", tensors=tensors).digest != trained.digest


def test_without_validation_clips_it_trains_and_says_so(tiny_checkpoint, tmp_path):
    tensors = write_tensors_stage(tmp_path / "tensors", tiny_checkpoint, {"train": [40]})
    said = []
    config = make_config(tiny_checkpoint)
    folder = run_stage(TrainStage(), config, tmp_path / "train", said.append, tensors=tensors)
    assert "  no clip is held out: there will be no validation" in said
    assert {line["kind"] for line in log_of(folder)} == {"train", "guards"}
    assert "valid_final" not in next(r for r in folder.records() if r.id == "adapter").facts


# -- a kill

KILLED = """
import os, signal, sys
from pathlib import Path
from duplex import sinks
from duplex.store import StageFolder
from pipeline.train import TrainStage
from tests.stages.training_factories import make_config, run_stage
from training import checkpoint, loop

step, moment = int(sys.argv[4]), sys.argv[5]
def kill(): os.kill(os.getpid(), signal.SIGKILL)
if moment == "in-step":
    original = loop.Trainer._train_step
    def train_step(self, number):
        report = original(self, number)
        if report.step == step: kill()
        return report
    loop.Trainer._train_step = train_step
elif moment == "in-save":
    original_write = checkpoint.write_json
    def write_json(path, value):
        if value["step"] == step: kill()
        original_write(path, value)
    checkpoint.write_json = write_json
elif moment == "in-hand-in":
    original_add = sinks.FileWriter.add
    def add(self, artifact_id, *arguments, **options):
        if artifact_id == "metrics": kill()
        return original_add(self, artifact_id, *arguments, **options)
    sinks.FileWriter.add = add
tensors = StageFolder(Path(sys.argv[2]), "tensors", "0" * 64)
run_stage(TrainStage(), make_config(Path(sys.argv[1])), Path(sys.argv[3]), tensors=tensors)
"""


def run_killed(tiny_checkpoint, tensors, target, step, moment):
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny_checkpoint), str(tensors.path), str(target),
         str(step), moment],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.mark.parametrize(
    ("step", "moment", "kept"),
    [
        pytest.param(1, "in-step", 0, marks=pytest.mark.slow),
        (5, "in-step", 4),
        pytest.param(4, "in-save", 2, marks=pytest.mark.slow),
        pytest.param(6, "in-hand-in", 6, marks=pytest.mark.slow),
    ],
)
def test_after_a_kill_the_run_ends_with_the_same_bytes(
    trained, tiny_checkpoint, tensors, tmp_path, step, moment, kept
):
    target = tmp_path / "train"
    run_killed(tiny_checkpoint, tensors, target, step, moment)
    assert not (target / "manifest.json").exists()
    lines = (target / "work" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == step, "the log is ahead of the checkpoint"
    checkpoints = sorted((target / "work").glob("checkpoints/*.json"))
    assert [int(path.stem[5:]) for path in checkpoints][-1:] == ([kept] if kept else [])

    folder = run_stage(TrainStage(), make_config(tiny_checkpoint), target, tensors=tensors)
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert (folder.path / name).read_bytes() == (trained.path / name).read_bytes(), name
    assert folder.digest == trained.digest
    if kept:
        timing = [json.loads(line) for line in (folder.path / "timing.jsonl").open()]
        steps = [line["step"] for line in timing if line["kind"] == "train"]
        assert steps == [*range(1, step + 1), *range(kept + 1, 7)], "it did not start over"


def test_a_damaged_checkpoint_is_passed_over_and_a_foreign_one_too(tmp_path):
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, TrainState(step, {"a": torch.full((2,), step)}, ["{}"]), "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000004.json",
        "step-00000004.safetensors",
        "step-00000006.json",
        "step-00000006.safetensors",
    ]
    assert latest_checkpoint(tmp_path, "mine").step == 6
    damaged = tmp_path / "step-00000006.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    state = latest_checkpoint(tmp_path, "mine")
    assert state.step == 4 and state.log == ["{}"] and state.tensors["a"].tolist() == [4, 4]
    assert not damaged.exists()
    assert latest_checkpoint(tmp_path, "yours") is None
    assert list(tmp_path.iterdir()) == []


# -- what must stop it


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"not a tensor", "cannot be read"),
        (pickle.dumps(os.system, protocol=2), "cannot be read"),
        (tensor_bytes({"codes": torch.zeros(17, 40)}), "one bare tensor, found dict"),
        (tensor_bytes(make_codes(0, 40).astype(np.float32)), "dtype must be int64 or int16"),
        (tensor_bytes(make_codes(0, 40)[:16]), r"shape must be \[17, T\]"),
        (tensor_bytes(make_codes(0, 39)), "says 40 frames, found 39"),
        (tensor_bytes(make_codes(0, 40) + 60), r"audio codes must be in \[0, 64\)"),
        (tensor_bytes(torch.eye(17).long().to_sparse()), "a dense tensor with data.*sparse_coo"),
        (tensor_bytes(torch.zeros(17, 40).long().to("meta")), "on the meta device"),
        (tensor_bytes(torch.zeros(1, 1).long().expand(17, 1 << 32)), "found 4294967296"),
    ],
    ids=["rubbish", "code", "dict", "float", "rows", "length", "range", "sparse", "meta", "huge"],
)
def test_a_bad_tensor_file_stops_the_run_by_name(tiny_checkpoint, tmp_path, content, fault):
    tensors = write_tensors_stage(
        tmp_path / "tensors", tiny_checkpoint, {"train": [40, 40]}, {"train-1": content}
    )
    with pytest.raises(CorruptFileError, match=fault) as caught:
        run_stage(TrainStage(), make_config(tiny_checkpoint), tmp_path / "x", tensors=tensors)
    record = next(record for record in tensors.records() if record.id == "train-1")
    assert f"{record.tensor}.pt (clip train-1)" in str(caught.value)


def test_a_tensor_file_changed_on_disk_stops_the_run_by_name(tiny_checkpoint, tmp_path):
    tensors = write_tensors_stage(tmp_path / "tensors", tiny_checkpoint, {"train": [40]})
    record = next(tensors.records())
    path = tensors.path / "blobs" / f"{record.tensor}.pt"
    path.write_bytes(tensor_bytes(make_codes(1, 40)))  # sound by itself, but not that file
    with pytest.raises(CorruptFileError, match=record.tensor):
        run_stage(TrainStage(), make_config(tiny_checkpoint), tmp_path / "x", tensors=tensors)


@pytest.mark.parametrize("role", ["codec", "tokenizer"])
def test_clips_of_another_codec_or_tokenizer_are_refused(tiny_checkpoint, tmp_path, role):
    tensors = write_tensors_stage(
        tmp_path / "tensors", tiny_checkpoint, {"train": [40]}, **{f"{role}_digest": "f" * 64}
    )
    with pytest.raises(RequestError, match=f"with the {role} of the model.*ffffffffffff"):
        run_stage(TrainStage(), make_config(tiny_checkpoint), tmp_path / "x", tensors=tensors)


def test_a_crop_that_leaves_only_prompt_is_refused(tiny_checkpoint, tmp_path):
    from duplex.records import FrameSpan

    tensors = write_tensors_stage(
        tmp_path / "tensors", tiny_checkpoint, {"train": [40]},
        prompt=(FrameSpan(label="text", start=0, end=20),),
    )  # fmt: skip
    config = make_config(tiny_checkpoint, crop_frames=20)
    with pytest.raises(RequestError, match=r"none in 1 of 1 .*train-0.*Raise train\.crop_fra"):
        run_stage(TrainStage(), config, tmp_path / "x", tensors=tensors)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    tiny_checkpoint, tensors, tmp_path
):
    config = make_config(
        tiny_checkpoint, learning_rate=1e30, warmup_steps=0, validate_every=50,
        runtime={"checkpoint_every": 1, "device": "cpu"},
    )  # fmt: skip
    with pytest.raises(WorkError, match=r"must be finite, found (nan|inf) at step \d, on .*train-"):
        run_stage(TrainStage(), config, tmp_path / "train", tensors=tensors)
    assert list((tmp_path / "train" / "work" / "checkpoints").glob("*.json"))
    assert not (tmp_path / "train" / "manifest.json").exists()


def test_a_dead_adapter_stops_it_before_anything_is_trained(tmp_path, tensors, tiny_checkpoint):
    config = make_config(tiny_checkpoint, loss={"acoustic_weight": 0})
    with pytest.raises(DeadAdapterError, match=r"depformer_in\.1"):
        run_stage(TrainStage(), config, tmp_path / "train", tensors=tensors)
    assert not (tmp_path / "train" / "work" / "metrics.jsonl").exists()


def test_no_gpu_is_a_wrong_request(tiny_checkpoint, tensors, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    config = make_config(tiny_checkpoint, runtime={"device": "cuda"})
    with pytest.raises(RequestError, match="finds no GPU"):
        run_stage(TrainStage(), config, tmp_path / "cuda", tensors=tensors)


# -- batches and rates


def test_a_padded_batch_has_the_loss_of_its_clips(tiny_checkpoint):
    from moshi.utils.compile import no_compile

    from training.loss import stream_sums

    model = Checkpoint.open(tiny_checkpoint).load_lm()

    def sums(clips):
        batch = make_batch(clips)
        with torch.no_grad(), no_compile():
            return stream_sums(model(batch.codes), batch.codes, batch.loss_mask).detached()

    clips = [make_clip("a", 40, 1), make_clip("b", 23, 2), make_clip("c", 31, 3)]
    together, single = sums(clips), [sums([clip]) for clip in clips]
    apart = single[0] + single[1] + single[2]
    assert torch.equal(together.count, apart.count)
    assert torch.allclose(together.nll, apart.nll, rtol=1e-5)
    assert together.count[2] == sum(clip.num_frames - PROMPT_FRAMES for clip in clips)
    assert together.count[3] == together.count[2] - len(clips), "delayed rows lose one frame"


def test_the_order_is_a_function_of_seed_and_step():
    clips = [make_clip(f"c{i}", 20) for i in range(5)]
    sampler, other = Sampler(clips, 3, 2), Sampler(clips, 4, 2)
    row = [clip.id for step in range(10) for clip in sampler.batch(step)]
    for epoch in range(4):
        assert sorted(row[5 * epoch : 5 * epoch + 5]) == [f"c{i}" for i in range(5)]
    assert row[:5] != row[5:10] or row[5:10] != row[10:15], "epochs differ"
    assert [clip.id for clip in Sampler(clips, 3, 2).batch(7)] == row[14:16]
    assert [clip.id for step in range(10) for clip in other.batch(step)] != row


def test_the_rate_rises_and_falls():
    section = TrainSection(steps=10, warmup_steps=4, learning_rate=1.0)
    rates = [learning_rate(step, section) for step in range(10)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.1


@pytest.mark.slow  # trains at eight codebooks: above
def test_a_wider_checkpoint_trains_too(tmp_path):
    """dep_q 16, as PersonaPlex has it."""
    wide = write_tiny_checkpoint(tmp_path / "wide", dep_q=16)
    tensors = write_tensors_stage(tmp_path / "tensors", wide, {"train": [40], "valid": [30]})
    config = make_config(wide, steps=2)
    folder = run_stage(TrainStage(), config, tmp_path / "train", tensors=tensors)
    facts = next(r for r in folder.records() if r.id == "adapter").facts
    assert sum(facts["alive_modules"].values()) == 57
