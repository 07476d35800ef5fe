"""What the pocket base's first weights are worth: how soon it copies.

    python -m benchmarks.pocket_initial            # prints
    python -m benchmarks.pocket_initial --write    # and writes docs/results/pocket_initial.*

A model of the pocket base's size is trained on sequences in which 40 random pieces come, and spans
of 4 to 11 of them come again; loss is on the pieces of spans behind their first, which copying
alone can tell. Once from the library's first weights, once from ours
(training/pocket/base_initial.py), all else equal: AdamW at 1.2e-3, 32 sequences of 80 frames a
step. By chance a piece costs ln(596) = 6.39 nats.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from duplex.datafiles import CHECKOUT
from duplex.files import write_atomic, write_json
from duplex.streams import TEXT_PAD, TEXT_ROW
from pipeline.engines.pocket import LM_CONFIG, build_lm
from training.batches import Batch
from training.pocket.base_clips import unlabelled
from training.pocket.base_initial import prepare
from training.pocket.base_loop import ALONE, accumulate_gradients, means
from training.pocket.base_optimizer import Masters, mixed_forward
from training.pocket.base_source import LoopSettings

RESULTS = CHECKOUT / "docs" / "results"
PIECES, SEQUENCES, SEEDS, EVERY = 40, 32, (1, 2), 25


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--write", action="store_true", help="docs/results/pocket_initial.*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "steps": arguments.steps,
        "runs": [
            {"weights": name, "seed": seed, "nats": run(seed, name == "ours", arguments.steps)}
            for seed in SEEDS
            for name in ("library", "ours")
        ],
    }
    page = describe(result)
    print(page)
    if arguments.write:
        write_json(RESULTS / "pocket_initial.json", result)
        write_atomic(RESULTS / "pocket_initial.md", page.encode())


def run(seed: int, prepared: bool, steps: int) -> list[float]:
    """Mean loss of every `EVERY` steps."""
    lm = build_lm(LM_CONFIG, seed)
    if prepared:
        prepare(lm, seed)
    lm.train().requires_grad_(True)
    section = LoopSettings(steps, learning_rate=1.2e-3).section()
    masters = Masters(lm, section)
    forward = mixed_forward(lm, torch.bfloat16)
    losses = []
    for step in range(steps):
        drawn = batch(np.random.default_rng([seed, step]))
        sums = accumulate_gradients(forward, [unlabelled(drawn)], section, ALONE)
        losses.append(means(sums, "repeated")["repeated_words"])
        masters.update(lm, step, ALONE)
    return [float(np.mean(losses[at : at + EVERY])) for at in range(0, steps, EVERY)]


def batch(rng: np.random.Generator) -> Batch:
    """codes [B, 17, 2 L] of silent audio; loss where a span goes on in the text row."""
    codes = np.zeros((SEQUENCES, 17, 2 * PIECES), dtype=np.int64)
    codes[:, 1:] = np.random.default_rng(0).integers(0, LM_CONFIG["card"], (16, 1))
    goes_on = np.zeros((SEQUENCES, 2 * PIECES), dtype=bool)
    for row, mask in zip(codes[:, TEXT_ROW], goes_on, strict=True):
        row[:PIECES] = rng.integers(TEXT_PAD + 1, LM_CONFIG["text_card"], PIECES)
        at = PIECES
        while at < len(row):
            start, length = rng.integers(0, PIECES - 4), rng.integers(4, 12)
            span = row[start : min(start + length, PIECES)][: len(row) - at]
            row[at : at + len(span)] = span
            mask[at + 1 : at + len(span)] = True
            at += len(span)
    loss_mask = torch.zeros(SEQUENCES, 9, 2 * PIECES, dtype=torch.bool)
    loss_mask[:, TEXT_ROW] = torch.from_numpy(goes_on)
    return Batch(torch.from_numpy(codes), loss_mask, codes.shape[0] * codes.shape[2])


def describe(result: dict[str, Any]) -> str:
    places = [str(at + EVERY) for at in range(0, result["steps"], EVERY)]
    lines = [
        "# The pocket base's first weights: how soon it copies",
        "",
        f"`python -m benchmarks.pocket_initial --steps {result['steps']} --write`: nats a repeated "
        f"piece, mean of the {EVERY} steps up to the one named; by chance 6.39. What is trained "
        "and on what stands in the benchmark.",
        "",
        "| first weights | seed | " + " | ".join(places) + " |",
        "| --- | --- |" + " ---: |" * len(places),
    ]
    for one in result["runs"]:
        nats = " | ".join(f"{value:.2f}" for value in one["nats"])
        lines.append(f"| {one['weights']} | {one['seed']} | {nats} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
