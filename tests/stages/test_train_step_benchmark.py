"""The benchmark of a training step: its page is what it measured, its operations are counted."""

import argparse
import json

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import train_step


def test_the_page_is_of_the_figures_beside_it():
    result = json.loads(train_step.DATA.read_text())
    assert (train_step.RESULTS / "train_step.md").read_text() == train_step.describe(result)


def test_the_operations_of_a_step_are_those_that_torch_counts(monkeypatch):
    small = {
        "dim": 128, "num_heads": 2, "num_layers": 3, "depformer_dim": 64,
        "depformer_num_heads": 2, "depformer_num_layers": 2, "depformer_dim_feedforward": 264,
    }  # fmt: skip
    monkeypatch.setitem(train_step.SIZES, "small", small)
    args = argparse.Namespace(device="cpu", batch=2, frames=40, rank=4, checkpointing="none")
    step = train_step.stepper("ours", args, "small", "float32")
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    expected = train_step.flops(args, "small") * 2 * 40
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)
