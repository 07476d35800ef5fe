"""A checkpoint of random weights: what tests open where a trained one would be slow to load.

The codec's codebooks are set by the package's own k-means on seeded noise, so that codes differ as
sounds do; nobody taught it to speak.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duplex.streams import CODEBOOKS
from pipeline.engines.pocket import build_lm, train_tokenizer

if TYPE_CHECKING:
    import torch

MIMI_SEED = 1234
TARGET_RMS = 0.1  # loudness of random codes, of a full scale of 1


def write_random_checkpoint(
    folder: Path,
    *,
    lm_config: dict[str, Any],
    mimi_config: dict[str, Any],
    corpus: str,
    lm_seed: int,
) -> None:
    """Write all files of a checkpoint of random weights into an empty folder."""
    from training.checkpoint import save_tensors

    lm = build_lm(lm_config, lm_seed)
    mimi = build_mimi(mimi_config, MIMI_SEED)
    save_tensors(plain(lm.state_dict()), folder / "model.safetensors")
    save_tensors(plain(mimi.state_dict()), folder / "mimi.safetensors")
    (folder / "mimi_config.json").write_text(json.dumps(mimi_config, indent=2))
    (folder / "tokenizer.model").write_bytes(train_tokenizer(corpus, lm_config["text_card"]))
    config = {
        **lm_config,
        "model_type": "moshi",
        "moshi_name": "model.safetensors",
        "mimi_name": "mimi.safetensors",
        "mimi_config_name": "mimi_config.json",
        "tokenizer_name": "tokenizer.model",
        "model_id": {"sig": "pocket", "epoch": 0},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def build_mimi(config: dict[str, Any], seed: int) -> Any:
    """A `MimiModel` whose codebooks fit its own latents: the package's k-means on noise."""
    import torch
    from moshi.models.loaders import get_mimi
    from moshi.utils.compile import no_compile

    with torch.random.fork_rng(devices=[]), torch.no_grad(), no_compile():
        torch.manual_seed(seed)
        mimi = get_mimi(None, config, num_codebooks=config["quantizer"]["n_q"])
        latents = mimi.encode_to_latent(_seeded_sounds(seed), quantize=False)
        mimi.quantizer.train()
        # Each training forward starts one more codebook, on the residual of those before it.
        for _ in range(config["quantizer"]["n_q"]):
            mimi.quantizer(latents, mimi.frame_rate)
        mimi.eval()
        _give_voice(mimi, seed)
    return mimi


def _give_voice(mimi: Any, seed: int) -> None:
    """Draw the decoder anew so that other codes are other sounds.

    As the library initialises it, a random decoder's biases drown its input: replacing every
    semantic code moves the waveform by 3e-6, a tenth of an int16 step. Here it is 0.2 of 1.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    convolutions = [
        module
        for part in (mimi.upsample, mimi.decoder)
        for module in part.modules()
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d)
    ]
    for convolution in convolutions:
        reach = convolution.kernel_size[0] / convolution.stride[0]
        if isinstance(convolution, torch.nn.Conv1d):
            fan_in = convolution.weight[0].numel()
        else:
            fan_in = reach * (convolution.weight.shape[0] if convolution.groups == 1 else 1)
        convolution.weight.normal_(std=math.sqrt(2 / fan_in), generator=generator)
        if convolution.bias is not None:
            convolution.bias.zero_()
    codes = torch.randint(0, mimi.cardinality, (1, CODEBOOKS, 50), generator=generator)
    loudness = mimi.decode(codes).square().mean().sqrt()
    convolutions[-1].weight.mul_(TARGET_RMS / loudness)


def _seeded_sounds(seed: int) -> torch.Tensor:
    """float32 [32, 1, 96000]: tones and noise from loud to near silent, four seconds each."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    time_s = torch.arange(96_000) / 24_000
    level = torch.logspace(-3, 0, 32)[:, None]
    pitch_hz = 80 * 2 ** (torch.rand(32, 4, generator=generator) * 5)
    wobble = 1 + 0.5 * torch.sin(2 * math.pi * 3 * time_s + torch.arange(32)[:, None])
    tones = torch.sin(2 * math.pi * pitch_hz[..., None] * time_s).mean(1) * wobble
    noise = torch.randn(32, 96_000, generator=generator) * 0.3
    return ((tones + noise) * level * 0.5)[:, None]


def plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
