"""Second tasks of the lower layers while the base is trained: to name what is heard, read and said.

What a user says shows in the loss through few words of the text row, and a small model learns
utterances by heart before it learns to hear; it learns sentences' sounds by heart, too, before it
follows its own text. Three linear heads are thrown away at the end:

    phones   on the second layer: the phone in each half of the frame before last, which the layer
             has read with all codebooks
    acts     on the fourth: what the user has asked or done, in the frames behind a user's words
             (`ask/price`, `greet` …), and with the same weights, at each fact of the prompt, the
             question that it answers: so question and fact are written alike where the layers
             behind look one up by the other

    spoken   on the fifth: the phones that the agent is to say in this frame, whose codes no layer
             has read

A fourth task has no such head: `looked`, by which heads of attention are where the pieces of text
stand that are being said (`base_pointer`).

What each changed in the base was not measured apart.

Shapes: B clips, T frames, C width, P classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from training.distributed import Ranks
from training.fast import FastForward
from training.pocket.base_pointer import Pointer, readable
from training.pocket.codec_labels import HALVES, IGNORED

BEHIND = 2  # frames: place t has read frame t - 1 in its first codebook, t - 2 in all


@dataclass(frozen=True)
class Task:
    """Labels and the head that names them: on which layer, from 0; how many frames later they are
    due; their share of the loss; how many a frame has."""

    head: str
    layer: int
    behind: int
    share: float
    labels: int


TASKS = {
    "phones": Task("phones", 1, BEHIND, 1.0, HALVES),
    "asked": Task("acts", 3, 0, 1.0, 1),
    "told": Task("acts", 3, 0, 0.5, 1),
    "spoken": Task("spoken", 4, 0, 1.0, HALVES),
}
LOOKED, LOOKED_SHARE = "looked", 1.0
SHARES = {**{name: task.share for name, task in TASKS.items()}, LOOKED: LOOKED_SHARE}


def label_counts(labels: dict[str, torch.Tensor]) -> dict[str, int]:
    """How many labels there are of each task."""
    counts = {name: int((labels[name] != IGNORED).sum()) for name in TASKS}
    return counts | {LOOKED: int(readable(labels[LOOKED]).sum())}


class Ear:
    """The heads, which are trained with the model they are put into and taken out of it at the end.

    Args:
        lm: gets a module `ear`, until `remove`.
        forward: of `lm`; what its layers give is looked at.
    """

    def __init__(self, lm: Any, forward: FastForward):
        self._lm = lm
        self._heard: dict[str, torch.Tensor] = {}
        self._hooks = []
        for name, task in TASKS.items():
            layer = forward.layers[min(task.layer, len(forward.layers) - 1)]
            self._hooks.append(layer.register_forward_hook(self._listener(name)))
        self._pointer = Pointer(forward.layers)
        self.restart()

    @staticmethod
    def add(lm: Any, num_classes: dict[str, int], seed: int) -> None:
        """Give `lm` fresh heads of float32. num_classes: of each head."""
        width = lm.text_emb.weight.shape[1]
        heads = nn.ModuleDict()
        generator = torch.Generator().manual_seed(seed)
        for task in {task.head: task for task in TASKS.values()}.values():
            head = nn.Linear(width, task.labels * num_classes[task.head], bias=False)
            with torch.no_grad():
                head.weight.normal_(std=width**-0.5, generator=generator)
            heads[task.head] = head
        lm.add_module("ear", heads.to(lm.text_emb.weight.device))

    def _listener(self, name: str) -> Any:
        def listen(_module: nn.Module, _args: Any, out: torch.Tensor) -> None:
            self._heard[name] = out

        return listen

    def nll(self, labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Summed nats of each task's labels, of what the last forward was given.

        A label that is due behind the clip's end is left out.

        Args:
            labels: int16 [B, T, labels] by task, `IGNORED` where there is none.
        """
        found = {}
        found[LOOKED], there = self._pointer.nll(labels[LOOKED])
        self._named[LOOKED] += there
        self._labels[LOOKED] += readable(labels[LOOKED]).sum()
        for name, task in TASKS.items():
            due = functional.pad(labels[name], (0, 0, task.behind, 0), value=IGNORED)
            due = due[:, : labels[name].shape[1]].long()
            known = due != IGNORED
            heard = self._heard[name]
            at = known.any(-1)  # logits of the other frames are not computed
            logits = self._lm.ear[task.head](heard[at]).float().unflatten(-1, (task.labels, -1))
            wanted, is_known = due[at], known[at]
            self._named[name] += (logits.argmax(-1) == wanted)[is_known].sum()
            self._labels[name] += is_known.sum()
            found[name] = functional.cross_entropy(
                logits[is_known], wanted[is_known], reduction="sum"
            )
        return found

    def restart(self) -> None:
        """Count anew."""
        self._named: dict[str, Any] = dict.fromkeys(SHARES, 0)
        self._labels: dict[str, Any] = dict.fromkeys(SHARES, 0)

    def shares(self, ranks: Ranks) -> dict[str, float]:
        """Of each task's labels since `restart`, of all ranks, those that were named right; of
        `looked` the attention that was where it belongs."""
        counts = [float(n) for name in SHARES for n in (self._named[name], self._labels[name])]
        sums = ranks.sum(torch.tensor(counts)).view(-1, 2).tolist()
        return {
            name: round(named / max(1.0, labels), 4)
            for name, (named, labels) in zip(SHARES, sums, strict=True)
        }

    def remove(self) -> None:
        """Leave the model as it was without the heads."""
        for hook in self._hooks:
            hook.remove()
        self._pointer.remove()
        delattr(self._lm, "ear")
