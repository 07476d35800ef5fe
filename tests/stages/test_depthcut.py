"""Sixteen depth steps cut to eight: the agent says what it said, and servers take it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from moshi.utils.compile import no_compile
from safetensors.torch import load_file
from typer.testing import CliRunner

from duplex.cli import app
from duplex.config import ModelSection
from duplex.errors import MergeError, RequestError
from pipeline.engines.checkpoint import Checkpoint
from pipeline.merge import MergeStage
from pipeline.serving.model import ServedModel
from pipeline.train import TrainStage
from tests.factories import slow
from tests.stages.conftest import write_tiny_checkpoint
from tests.stages.training_factories import (
    PREFIX,
    assert_nothing_left,
    changed_adapter,
    fused,
    make_adapter,
    make_config,
    run_stage,
    write_tensors_stage,
)
from training import apply
from training.depthcut import cut_config, cut_shapes
from training.merge import cut_checkpoint, merge_checkpoint
from training.outfolder import write_companions
from training.servable import servable_checkpoint

# Steps share weights; a later step does not use more of them than an earlier one.
SCHEDULE = [0, 1, 2, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("wide") / "base", dep_q=16)


@pytest.fixture(scope="module")
def adapter(wide, tmp_path_factory):
    """Trained on sixteen steps: targets in the agent's eight only, as training chooses them."""
    return make_adapter(tmp_path_factory.mktemp("a") / "adapter", wide)


def logits(folder):
    """Text and agent logits, by moshi's loader and forward pass: [1, 1, T, …], [1, 8, T, …]."""
    lm = Checkpoint.open(folder).load_lm()
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 64, (1, 17, 40), generator=generator)
    with torch.no_grad(), no_compile():
        output = lm(codes)
    return output.text_logits, output.logits[:, :8]


def assert_same_agent(first, second):
    for one, other in zip(logits(first), logits(second), strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-5, equal_nan=True)


# -- converting


@pytest.mark.parametrize("form", ["split", slow("fused"), slow("schedule"), slow("norms")])
def test_the_agent_says_what_it_said(wide, tmp_path, form):
    base = wide
    if form == "fused":
        base = fused(wide, tmp_path / "fused", steps=16)
    if form == "schedule":
        base = write_tiny_checkpoint(
            tmp_path / "s", dep_q=16, depformer_weights_per_step_schedule=SCHEDULE
        )
    if form == "norms":
        base = write_tiny_checkpoint(tmp_path / "n", dep_q=16, depformer_norm="layer_norm")
    certificate = cut_checkpoint(base, tmp_path / "out")
    assert certificate["dep_q"] == {"base": 16, "output": 8}
    assert_same_agent(base, tmp_path / "out")
    assert certificate["logits"]["error"] < 1e-5
    lm = Checkpoint.open(tmp_path / "out").load_lm()
    assert (lm.dep_q, len(lm.depformer_emb), len(lm.linears)) == (8, 7, 8)
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert names < set(load_file(base / "model.safetensors")), "nothing is renamed"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((base / "config.json").read_text())
    changed = {key for key in before if config[key] != before[key]} - {"model_id"}
    assert changed == {"dep_q"} | (
        {"depformer_weights_per_step_schedule"} if form == "schedule" else set()
    )


def test_what_is_cut_can_be_served(wide, tmp_path):
    cut_checkpoint(wide, tmp_path / "out")
    speaker = ServedModel.load(tmp_path / "out", "cpu")
    assert speaker.lm.dep_q == 8
    with pytest.raises(Exception, match="duplex convert checkpoint"):
        ServedModel.load(wide, "cpu")


def test_only_sixteen_steps_are_cut(tiny_checkpoint, wide, tmp_path):
    with pytest.raises(MergeError, match=r"must have dep_q 16 .* found dep_q 8 .* as it is"):
        cut_checkpoint(tiny_checkpoint, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(RequestError, match="must not exist or be empty"):
        cut_checkpoint(wide, tmp_path / "out")


def test_a_wrong_half_is_caught_by_the_logits(wide, tmp_path, monkeypatch):
    base = fused(wide, tmp_path / "fused", steps=16)

    def second_half(lora, plan, norms):
        for block in right(lora, plan, norms):
            fused_depth = block.spec.name == "depformer.layers.0.self_attn.in_proj_weight"
            taken = block.count if fused_depth else 0
            yield replace(block, first=block.first + taken)

    right = apply._blocks
    monkeypatch.setattr(apply, "_blocks", second_half)
    monkeypatch.setattr("training.merge.check_weights", lambda *_: None)
    with pytest.raises(MergeError, match="text and agent logits must be the same"):
        cut_checkpoint(base, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


def test_shared_depth_weights_stay_whole():
    """One set of weights for all steps: only what is one a step goes."""
    config = {"dep_q": 16, "n_q": 16, "depformer_dim_feedforward": [8] * 16}
    shapes = {
        "depformer.layers.0.self_attn.in_proj_weight": (96, 32),
        "depformer.layers.0.gating.linear_in.weight": (86, 32),
        "depformer_in.0.weight": (32, 64),
        **{f"linears.{i}.weight": (64, 32) for i in range(16)},
        **{f"depformer_emb.{i}.weight": (65, 32) for i in range(15)},
    }
    kept = cut_shapes(shapes, config)
    assert kept == {k: v for k, v in shapes.items() if not k.startswith(("linears", "depformer_e"))
                    or int(k.split(".")[1]) < (8 if k.startswith("linears") else 7)}  # fmt: skip
    per_step = config | {"depformer_weights_per_step": True}
    assert cut_config(per_step)["depformer_dim_feedforward"] == [8] * 8
    assert cut_shapes(shapes, per_step)["depformer.layers.0.self_attn.in_proj_weight"] == (48, 32)
    with pytest.raises(MergeError, match="no multiple"):
        cut_shapes({"depformer.layers.0.self_attn.out_proj.weight": (100, 32)}, per_step)


def test_config_json_holds_nothing_that_moshi_does_not_know(wide, tmp_path):
    """PersonaPlex's says `version`; the loader would hand it on to the model."""
    source = Checkpoint.open(wide)
    (tmp_path / "model.safetensors").write_bytes((wide / "model.safetensors").read_bytes())
    write_companions(source, tmp_path, source.config | {"version": "1.0"}, "0" * 64)
    assert Checkpoint.open(tmp_path).load_lm().dep_q == 16


# -- merging and cutting


@pytest.mark.parametrize("form", ["split", slow("fused")])
def test_merging_and_cutting_commute(wide, adapter, tmp_path, form):
    base, lora = wide, adapter
    if form == "fused":
        base = fused(wide, tmp_path / "fused", steps=16)
        lora = changed_adapter(adapter, tmp_path / "a", lambda state: None, names_base=False)
    merge_checkpoint(base, lora, tmp_path / "merged", "float32")
    cut_checkpoint(tmp_path / "merged", tmp_path / "then-cut")
    certificate = merge_checkpoint(base, lora, tmp_path / "at-once", "float32", cut=True)
    assert certificate["dep_q"] == {"base": 16, "output": 8}
    assert certificate["modules_changed"] == 57
    files = [tmp_path / name / "model.safetensors" for name in ("then-cut", "at-once")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert_same_agent(tmp_path / "merged", tmp_path / "at-once")
    text, audio = logits(tmp_path / "at-once")
    before = logits(base)
    assert not torch.allclose(text, before[0], atol=0.1)
    assert not torch.allclose(audio.nan_to_num(), before[1].nan_to_num(), atol=0.1)


def test_updates_of_steps_that_go_are_not_dropped_unsaid(wide, adapter, tmp_path):
    def rename(state):
        for side in "AB":
            state[f"{PREFIX}linears.9.lora_{side}.weight"] = state.pop(
                f"{PREFIX}linears.7.lora_{side}.weight"
            )

    config = json.loads((adapter / "adapter_config.json").read_text())
    targets = [n for n in config["target_modules"] if n != "linears.7"] + ["linears.9"]
    other = changed_adapter(adapter, tmp_path / "a", rename, {"target_modules": targets})
    with pytest.raises(MergeError, match=r"linears\.9: the base cut to 8 depth steps .*no such"):
        merge_checkpoint(wide, other, tmp_path / "out", "float32", cut=True)
    assert_nothing_left(tmp_path / "out")
    merge_checkpoint(wide, other, tmp_path / "merged", "float32")
    cut_checkpoint(tmp_path / "merged", tmp_path / "out")


# -- the stages and commands


def test_the_stage_cuts_what_it_merges(wide, tmp_path):
    tensors = write_tensors_stage(tmp_path / "tensors", wide, {"train": [40], "valid": [30]})
    config = make_config(wide, steps=2)
    trained = run_stage(TrainStage(), config, tmp_path / "train", tensors=tensors)
    lines = []
    folder = run_stage(MergeStage(), config, tmp_path / "merge", lines.append, train=trained)
    facts = next(r for r in folder.records() if r.id == "weights").facts
    assert facts["dep_q"] == {"base": 16, "output": 8} and "modules" not in facts
    assert Checkpoint.open(folder.path / "checkpoint").load_lm().dep_q == 8
    assert any("dep_q 16 cut to 8" in line for line in lines)
    assert any("of the update survived" in line for line in lines)


def test_the_base_to_compare_with_is_cut_once(wide, tiny_checkpoint, tmp_path):
    lines = []
    model = ModelSection(base=str(wide))
    first = servable_checkpoint(model, tmp_path, lines.append)
    assert first.load_lm().dep_q == 8 and len(lines) == 1
    assert first.digest("codec") == Checkpoint.open(wide).digest("codec")
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert servable_checkpoint(model, tmp_path, lines.append).folder == first.folder
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == stamp and len(lines) == 1
    other = shutil.copytree(tiny_checkpoint, tmp_path / "narrow")
    narrow = servable_checkpoint(ModelSection(base=str(other)), tmp_path)
    assert narrow.folder == other.resolve()


def test_the_commands_say_what_came_of_it(wide, adapter, tmp_path):
    arguments = ["merge", str(wide), str(adapter), str(tmp_path / "m"), "--dep-q", "8"]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0, said.output
    for part in ("57 of 57 changed", "dep_q 16 cut to 8", "survived it", "merged against unmerged",
                 "sha256"):  # fmt: skip
        assert part in said.output
    said = CliRunner().invoke(app, ["convert", "checkpoint", str(wide), str(tmp_path / "c")])
    assert said.exit_code == 0 and "dep_q 16 cut to 8" in said.output, said.output
    said = CliRunner().invoke(
        app, ["convert", "checkpoint", str(wide), str(tmp_path / "j"), "--json"]
    )
    assert json.loads(said.stdout)["dep_q"]["output"] == 8
    said = CliRunner().invoke(
        app, ["convert", "checkpoint", str(wide), str(tmp_path / "x"), "--dep-q", "4"]
    )
    assert isinstance(said.exception, RequestError) and "must be 8" in str(said.exception)
