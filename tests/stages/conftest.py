"""Fixtures of the stage tests: a Moshi checkpoint small enough to build in every session.

The tiny checkpoint is made by the same code as the pocket model (`pocket.build_lm`,
`build_mimi`, `train_tokenizer`) at dim 64, so its layout on disk is the real one. Its weights
are random: it says nothing, but every path through it is the path of the 7B model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from pipeline.engines import pocket
from tests.stages.random_model import write_random_checkpoint

TINY_TEXT_CARD = 340
TINY_CONTEXT = 3000  # frames; room for a prompt of 2 000 characters
TINY_CARD = 64

TINY_LM_CONFIG = {
    **pocket.LM_CONFIG,
    "dim": 64,
    "num_heads": 2,
    "num_layers": 2,
    "card": TINY_CARD,
    "text_card": TINY_TEXT_CARD,
    "context": TINY_CONTEXT,
    "depformer_dim": 32,
    "depformer_dim_feedforward": 64,
    "depformer_num_heads": 2,
    "depformer_num_layers": 1,
}


def _tiny_mimi_config() -> dict:
    config = copy.deepcopy(pocket.MIMI_CONFIG)
    config["seanet"].update(dimension=64, n_filters=4)
    config["quantizer"].update(
        dimension=16, bins=TINY_CARD, input_dimension=64, output_dimension=64
    )
    config["transformer"].update(
        d_model=64, num_heads=2, num_layers=1, dim_feedforward=64, input_dimension=64,
        output_dimensions=[64],
    )  # fmt: skip
    return config


TINY_CORPUS = "\n".join(
    f"{opening} {middle} {ending}"
    for opening in (
        "<system> You work for Sunrise Coffee as a customer named Maria",
        "<system> You enjoy having a good conversation with the barista",
        "Hello, what can I get you today",
        "I would like a large oat milk latte",
        "No, that is not what I ordered",
        "My name is George and I am in a hurry",
    )
    for middle in (
        "and you are angry about the long queue",
        "with two shots of espresso please",
        "because the price went up to seven dollars",
        "and a warm blueberry muffin to go",
    )
    for ending in ("<system>", "thank you very much.", "is that everything?", "right now!")
)


def write_tiny_checkpoint(folder: Path, *, lm_seed: int = 7, **lm_changes: object) -> Path:
    """Write a tiny checkpoint into `folder`; `lm_changes` overrides keys of the LM's config."""
    folder.mkdir(parents=True, exist_ok=True)
    write_random_checkpoint(
        folder,
        lm_config={**TINY_LM_CONFIG, **lm_changes},
        mimi_config=_tiny_mimi_config(),
        corpus=TINY_CORPUS,
        lm_seed=lm_seed,
    )
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder that loads through `pipeline.engines.checkpoint` in a second."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_speaker(tiny_checkpoint: Path) -> Any:
    """The tiny checkpoint, loaded for conversations; `begin` resets whatever was before."""
    from pipeline.serving.model import ServedModel

    return ServedModel.load(tiny_checkpoint, "cpu")
