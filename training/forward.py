"""The forward pass of a training step: codes in, one scalar loss and the raw sums out.

Two implementations of one contract, `forward(codes, loss_mask, coefficients) -> (loss, sums)`:

    FastForward     `training/fast.py`: ours, over moshi's weights
    LibraryForward  moshi's own `LMModel.forward`, for what the fast one does not cover and for
                    comparison

`shardable_modules()` names the units of FSDP2, the root last: each is gathered when it is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from duplex.config_train import TrainSection
from duplex.errors import RequestError
from training.loss import StreamSums, stream_sums


def make_forward(lm: nn.Module, section: TrainSection) -> nn.Module:
    """The forward pass that `section` asks for (`forward`, `compile`, `runtime.checkpointing`).

    Raises:
        RequestError: the fast one is asked for, and does not cover this model; it says why.
    """
    from training.fast import FastForward, unsupported

    checkpointing = section.runtime.checkpointing
    if section.forward == "library":
        return LibraryForward(lm, checkpointing=checkpointing == "full")
    reasons = unsupported(lm)
    if reasons:
        listing = "\n".join(f"  - {reason}" for reason in reasons)
        raise RequestError(
            "train.forward: fast needs a model of Moshi's kind, found one that it does not cover."
            f"\n{listing}\nSet train.forward: library."
        )
    return FastForward(lm, checkpointing=checkpointing, compiled=section.compile)


class LibraryForward(nn.Module):
    """`LMModel.forward` and the loss over all of its logits.

    Args:
        checkpointing: make the activations of all layers again in the backward pass.
    """

    def __init__(self, lm: nn.Module, *, checkpointing: bool = False):
        super().__init__()
        self.lm: Any = lm
        for name in ("transformer", "depformer"):
            getattr(lm, name).checkpointing = checkpointing

    def shardable_modules(self) -> list[nn.Module]:
        """Each transformer layer, of both transformers, then the LM."""
        from moshi.modules.transformer import StreamingTransformerLayer

        layers = [m for m in self.lm.modules() if isinstance(m, StreamingTransformerLayer)]
        return [*layers, self.lm]

    def forward(
        self, codes: torch.Tensor, loss_mask: torch.Tensor, coefficients: torch.Tensor
    ) -> tuple[torch.Tensor, StreamSums]:
        """
        Args:
            codes: int64 [B, 17, T], undelayed.
            loss_mask: bool [B, 9 or 17, T].
            coefficients: [P] of `training.loss.coefficients`, of the whole batch.

        Returns:
            The scalar loss with its graph, and the sums without one.
        """
        sums = stream_sums(self.lm(codes), codes, loss_mask)
        loss = (coefficients * sums.nll).sum()
        return loss, StreamSums(sums.nll.detach(), sums.count.detach())
