"""What a merge refuses before it writes, and what its own checks catch after writing."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from duplex.errors import MergeError, MissingInputError, RequestError
from tests.stages.conftest import write_tiny_checkpoint
from tests.stages.training_factories import (
    PREFIX,
    assert_nothing_left,
    changed_adapter,
    make_adapter,
)
from training import apply
from training.adapter import Adapter
from training.merge import merge_checkpoint


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint, tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("a") / "adapter", tiny_checkpoint)


# -- what it refuses


def zero_all(state):
    for key in state:
        if "lora_B" in key:
            state[key].zero_()


def zero_one(state):
    state[f"{PREFIX}text_linear.lora_B.weight"].zero_()


def rename(state):
    for side in "AB":
        state[f"{PREFIX}linears.9.lora_{side}.weight"] = state.pop(
            f"{PREFIX}linears.7.lora_{side}.weight"
        )


def drop_module(state):
    for side in "AB":
        del state[f"{PREFIX}linears.7.lora_{side}.weight"]


def drop_side(state):
    del state[f"{PREFIX}linears.7.lora_A.weight"]


def reshape(state):
    key = f"{PREFIX}linears.7.lora_B.weight"
    state[key] = state[key][:-1].contiguous()


def poison(state):
    state[f"{PREFIX}linears.7.lora_A.weight"][0, 0] = float("nan")


def flatten(state):
    state[f"{PREFIX}linears.7.lora_A.weight"] = torch.tensor(1.0)


def add_bias(state):
    state[f"{PREFIX}linears.7.lora_B.bias"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (zero_all, "every adapter is zero, so the merge would change nothing"),
        (zero_one, "text_linear: its adapter is zero"),
        (rename, r"linears.9: the base has no such Linear layer(.|\n)*linears.7: its config"),
        (drop_module, "linears.7: its config targets it, but the adapter has no A and B"),
        (drop_side, "linears.7 must have lora_A and lora_B, has no lora_A"),
        (reshape, r"linears.7: A must be \[4, 32\] and B \[64, 4\], found \[4, 32\] and \[63, 4\]"),
        (poison, "linears.7: A and B must be finite"),
        (add_bias, "keys must read"),
        (flatten, r"linears\.7\.lora_A\.weight: must be a matrix, found the shape \[\]"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tiny_checkpoint, adapter, tmp_path, change, fault):
    bad = changed_adapter(adapter, tmp_path / "bad", change)
    with pytest.raises(MergeError, match=fault):
        merge_checkpoint(tiny_checkpoint, bad, tmp_path / "out", "float32")
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"rank_pattern": {"linears.0": 2}},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"peft_type": "LOHA"},
        {"something_new": {"x": 1}},
    ],
)
def test_what_is_no_plain_lora_is_refused(tiny_checkpoint, adapter, tmp_path, config):
    bad = changed_adapter(adapter, tmp_path / "bad", lambda state: None, config)
    with pytest.raises(MergeError, match="plain LoRA") as caught:
        merge_checkpoint(tiny_checkpoint, bad, tmp_path / "out", "float32")
    assert next(iter(config)) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"target_modules": "(a+)+$"}, "target_modules must be a list of names"),
        ({"target_modules": [1]}, "target_modules must be a list of names"),
        ({"r": 8}, "each A must have r = 8 rows"),
        ({"r": 0}, "r must be at least 1"),
        ({"lora_alpha": float("inf")}, "lora_alpha not 0, found 4 and inf"),
        ({"r": "4"}, "r and lora_alpha must be numbers, found '4'"),
        ({"r": True}, "must be numbers, found True"),
        ({"r": float("inf")}, "must be numbers, found inf"),
        ({"lora_alpha": 10**400}, "OverflowError"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(adapter, tmp_path, config, fault):
    """A pattern from a stranger could run for ever; a rank of its own would scale otherwise."""
    bad = changed_adapter(adapter, tmp_path / "bad", lambda state: None, config)
    with pytest.raises(MergeError, match=fault):
        Adapter.open(bad)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda w: w[:300].clone(), r"must be \[340, 64\], found \[300, 64\] in the base"),
        (lambda w: w.to(torch.int8), "must be of a floating type, found torch.int8"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_before_writing(
    tiny_checkpoint, adapter, tmp_path, change, fault
):
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint, base)
    weights = load_file(base / "model.safetensors")
    weights["text_linear.weight"] = change(weights["text_linear.weight"])
    save_file(weights, base / "model.safetensors")
    with pytest.raises(MergeError, match=f"text_linear: its weight {fault}"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


def test_a_config_nested_without_end_is_refused(adapter, tmp_path):
    bad = changed_adapter(adapter, tmp_path / "bad", lambda state: None)
    (bad / "adapter_config.json").write_text('{"r":' + "[" * 100_000)
    with pytest.raises(MergeError, match="cannot be read as one"):
        Adapter.open(bad)


def test_another_base_is_refused(adapter, tmp_path):
    other = write_tiny_checkpoint(tmp_path / "other", lm_seed=8)
    with pytest.raises(MergeError, match="must go into the base that it was trained on"):
        merge_checkpoint(other, adapter, tmp_path / "out", "float32")
    assert_nothing_left(tmp_path / "out")


def test_a_wrong_request_is_refused_before_anything_is_read(tiny_checkpoint, adapter, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    with pytest.raises(RequestError, match="must not exist or be empty"):
        merge_checkpoint(tiny_checkpoint, adapter, taken)
    assert (taken / "mine.txt").read_text() == "mine"
    with pytest.raises(RequestError, match="dtype must be one of"):
        merge_checkpoint(tiny_checkpoint, adapter, tmp_path / "out", "int8")
    with pytest.raises(MissingInputError, match=r"adapter_model\.safetensors"):
        merge_checkpoint(tiny_checkpoint, tmp_path, tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert merge_checkpoint(tiny_checkpoint, adapter, empty)


# -- what the checks after writing catch


def scale_updates(monkeypatch, factor):
    """The merge writes `factor` times the update that it should."""

    def scaled(lora, module):
        a, b = right(lora, module)
        return a, factor * b

    right = apply.scaled_sides
    monkeypatch.setattr(apply, "scaled_sides", scaled)


def test_a_merge_that_changes_nothing_is_caught(tiny_checkpoint, adapter, tmp_path, monkeypatch):
    scale_updates(monkeypatch, 0)
    with pytest.raises(MergeError, match="must differ from the base after the merge, found 57"):
        merge_checkpoint(tiny_checkpoint, adapter, tmp_path / "out", "float32")
    assert_nothing_left(tmp_path / "out")


def test_a_wrong_scale_is_caught_by_the_logits(tiny_checkpoint, adapter, tmp_path, monkeypatch):
    scale_updates(monkeypatch, 0.99)
    with pytest.raises(MergeError, match=r"logits must agree within 0\.0001"):
        merge_checkpoint(tiny_checkpoint, adapter, tmp_path / "out", "float32")
    assert_nothing_left(tmp_path / "out")


def test_a_touched_bystander_is_caught(tiny_checkpoint, adapter, tmp_path, monkeypatch):
    def careless(lora, plan, norms):
        for block in right(lora, plan, norms):
            if block.spec.name == "emb.3.weight":  # its first element comes last
                yield replace(block, first=1, count=block.count - 1)
                block = replace(block, first=0, count=1)
            yield block

    right = apply._blocks
    monkeypatch.setattr(apply, "_blocks", careless)
    with pytest.raises(MergeError, match=r"emb\.3\.weight: no adapter targets it, and it differs"):
        merge_checkpoint(tiny_checkpoint, adapter, tmp_path / "out", "float32")
    assert_nothing_left(tmp_path / "out")
