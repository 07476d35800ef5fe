"""A second task of the lower layers while the base is trained: name the phones that are heard.

What a user says shows in the loss through few words of the text row, and a small model learns
utterances by heart before it learns to hear. A linear head on the second layer names the phone in
each half of the frame before last, which the layer has read with all codebooks; its loss is added
and the head thrown away. What it changed in the base was not measured apart.

Shapes: B clips, T frames, C width, P phone classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from training.distributed import Ranks
from training.fast import FastForward
from training.pocket.codec_labels import HALVES, IGNORED

LAYER = 1  # of those from 0
BEHIND = 2  # frames: place t has read frame t - 1 in its first codebook, t - 2 in all
SHARE = 1.0  # of the loss
NAME = "ear"


class Ear:
    """The head, which is trained with the model it is put into and taken out of it at the end.

    Args:
        lm: gets a module `ear`, until `remove`.
        forward: of `lm`; what its second layer gives is looked at.
    """

    def __init__(self, lm: Any, forward: FastForward):
        self._lm = lm
        self._heard: torch.Tensor | None = None
        self._named: torch.Tensor | int = 0
        self._labels: torch.Tensor | int = 0
        layer = forward.layers[min(LAYER, len(forward.layers) - 1)]
        self._hook = layer.register_forward_hook(self._listen)

    @staticmethod
    def add(lm: Any, num_classes: int, seed: int) -> None:
        """Give `lm` a fresh head of float32."""
        width = lm.text_emb.weight.shape[1]
        head = nn.Linear(width, HALVES * num_classes, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            head.weight.normal_(std=width**-0.5, generator=generator)
        lm.add_module(NAME, head.to(lm.text_emb.weight.device))

    def _listen(self, _module: nn.Module, _args: Any, out: torch.Tensor) -> None:
        self._heard = out

    def nll(self, phones: torch.Tensor) -> torch.Tensor:
        """Summed nats of the labels, of what the last forward was given.

        A label whose frame the model reads behind the clip's end is left out.

        Args:
            phones: int16 [B, T, 2], `IGNORED` where there is no label.
        """
        assert self._heard is not None
        due = functional.pad(phones, (0, 0, BEHIND, 0), value=IGNORED)[:, : phones.shape[1]].long()
        logits = getattr(self._lm, NAME)(self._heard).float().view(*due.shape, -1)
        known = due != IGNORED
        self._named = self._named + (logits[known].argmax(-1) == due[known]).sum()
        self._labels = self._labels + known.sum()
        return functional.cross_entropy(logits[known], due[known], reduction="sum")

    def restart(self) -> None:
        """Count anew."""
        self._named = self._labels = 0

    def share(self, ranks: Ranks) -> float:
        """Of the labels since `restart`, of all ranks, those that were named right."""
        named, labels = ranks.sum(torch.tensor([float(self._named), float(self._labels)])).tolist()
        return round(named / max(1.0, labels), 4)

    def remove(self) -> None:
        """Leave the model as it was without the head."""
        self._hook.remove()
        delattr(self._lm, NAME)
