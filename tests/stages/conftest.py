"""Fixtures of the stage tests: a Moshi checkpoint small enough to build in every session.

The tiny checkpoint is made by the same code as the pocket model (`pocket.build_lm`,
`build_mimi`, `train_tokenizer`) at dim 64, so its layout on disk is the real one. Its weights
are random: it says nothing, but every path through it is the path of the 7B model.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.engines import pocket

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


def _give_voice(mimi: Any, seed: int) -> None:
    """Draw the decoder anew so that other codes are other sounds.

    As the library initialises it, a random decoder's biases drown its input: replacing every
    semantic code moves the waveform by 3e-6, a tenth of an int16 step. Here it is 1e-2.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    convs = [
        module
        for part in (mimi.upsample, mimi.decoder)
        for module in part.modules()
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d)
    ]
    with torch.no_grad():
        for conv in convs:
            reach = conv.kernel_size[0] / conv.stride[0]
            if isinstance(conv, torch.nn.Conv1d):
                fan_in = conv.weight[0].numel()
            else:
                fan_in = reach * (conv.weight.shape[0] if conv.groups == 1 else 1)
            conv.weight.normal_(std=math.sqrt(2 / fan_in), generator=generator)
            if conv.bias is not None:
                conv.bias.zero_()
        codes = torch.randint(0, mimi.cardinality, (1, 8, 50), generator=generator)
        convs[-1].weight.mul_(0.1 / mimi.decode(codes).square().mean().sqrt())


def write_tiny_checkpoint(folder: Path, *, lm_seed: int = 7, **lm_changes: object) -> Path:
    """Write a tiny checkpoint into `folder`; `lm_changes` overrides keys of the LM's config."""
    from safetensors.torch import save_file

    lm_config = {**TINY_LM_CONFIG, **lm_changes}
    mimi_config = _tiny_mimi_config()
    folder.mkdir(parents=True, exist_ok=True)
    lm = pocket.build_lm(lm_config, lm_seed)
    mimi = pocket.build_mimi(mimi_config, pocket.SEED)
    _give_voice(mimi, pocket.SEED)
    for model, name in ((lm, "model.safetensors"), (mimi, "mimi.safetensors")):
        state = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
        save_file(state, folder / name)
    (folder / "mimi_config.json").write_text(json.dumps(mimi_config))
    tokenizer = pocket.train_tokenizer(TINY_CORPUS, TINY_TEXT_CARD)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    config = {
        **lm_config,
        "model_type": "moshi",
        "moshi_name": "model.safetensors",
        "mimi_name": "mimi.safetensors",
        "mimi_config_name": "mimi_config.json",
        "tokenizer_name": "tokenizer.model",
        "model_id": {"sig": "00000000", "epoch": 0},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder that loads through `pipeline.engines.checkpoint` in a second."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_speaker(tiny_checkpoint: Path) -> Any:
    """The tiny checkpoint, loaded for conversations; `begin` resets whatever was before."""
    from pipeline.serving.conversation import Speaker

    return Speaker.load(tiny_checkpoint, "cpu")
