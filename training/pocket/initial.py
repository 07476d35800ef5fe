"""First weights with which a codec learns from its first steps on.

As the library draws them each convolution shrinks its input, and after twelve of them the
decoder's biases drown it: it learns an average sound and never looks at the codes (measured:
after 1 250 steps the loss with codes and with zeros in their place was the same). So biases
start at zero and every convolution is scaled, one after the other, to outputs of unit variance
on speech; the last one to the speech's own level.

Source: layer-sequential unit variance, arXiv 1511.06422.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SPEECH_LEVEL = 0.06


@torch.no_grad()
def scale_by_speech(mimi: Any, audio: torch.Tensor) -> None:
    """Set weights of a fresh `MimiModel` in place.

    Args:
        audio: float32 [B, 1, S], S a multiple of 1 920.
    """
    kinds = (nn.Conv1d, nn.ConvTranspose1d)
    convolutions = [module for module in mimi.modules() if isinstance(module, kinds)]
    for convolution in convolutions:
        if convolution.bias is not None:
            convolution.bias.zero_()
    hooks = [convolution.register_forward_hook(_to_unit_variance) for convolution in convolutions]
    try:
        loudness = _unquantized(mimi, audio).std()
    finally:
        for hook in hooks:
            hook.remove()
    last = [m for m in mimi.decoder.modules() if isinstance(m, nn.Conv1d)][-1]
    last.weight.mul_(SPEECH_LEVEL / loudness)


def _to_unit_variance(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    scale = 1 / output.std()
    module.weight.data.mul_(scale)
    return output * scale


def _unquantized(mimi: Any, audio: torch.Tensor) -> torch.Tensor:
    """[B, 1, S] decoded from latents that no codebook has touched."""
    latent = mimi.encode_to_latent(audio, quantize=False)
    parts = (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest)
    latent = torch.stack([part.output_proj(part.input_proj(latent)) for part in parts]).sum(0)
    (latent,) = mimi.decoder_transformer(mimi.upsample(latent))
    return mimi.decoder(latent)
