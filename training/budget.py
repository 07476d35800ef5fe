"""The loss budget: who gets how much of the loss, and of the gradient.

A loss of several terms is trained by the largest, and its value does not show which that is.
With the predecessor's weights text was 1.3 % of the loss at the start, and its answers went
wrong. So the four groups of `training/loss.py` are told apart:

    words      text tokens that are no padding        padding    PAD and EPAD
    semantic   the first codebook                     acoustic   the seven others

    loss share       c·S of the group's parts / the whole loss
    gradient share   ||g_group|| / sum of the four norms, g_group the gradient of the group's
                     share of the loss over all trainable parameters

Norms of gradients don't add up as losses do: where groups agree or quarrel the whole is shorter
than their sum. The share says how loud a group is, not how well it is heard. The user's streams,
where they carry loss, count with their kind.

**Normalised** means that c·n, summed over all parts, is the number of means that the loss
is made of: 2 with `terms` (text, audio), 1 with `all`. That is checked too.

Cost: four forward and backward passes over the batches. No parameter, `.grad`, or generator of
random numbers is changed. Legend: B clips, K = 17 rows, T frames, P parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from duplex.config_train import LossSection
from duplex.errors import WorkError
from training.batches import Batch
from training.loss import (
    GROUPS,
    StreamSums,
    coefficients,
    group_of_part,
    part_counts,
)

# A judgement between what was measured at the start, over random weights: text words have 2.4 to
# 27 % of the gradient in the normalised profiles, .3 % and less in the predecessor's loss. Words
# and semantic codes are watched, since they are what the tuning is for.
DROWNED_GRADIENT = 0.01
WATCHED = ("words", "semantic")
# Over 90 % of the loss: its curve is that group's curve, and says nothing of the others.
DROWNING_LOSS = 0.90
SUM_TOLERANCE = 1e-3
NUM_MEANS = {"terms": 2.0, "all": 1.0}

_REMEDY = {
    "words": "lower train.loss.text_padding_weight where padding is the loud one; lower "
    "train.loss.semantic_weight and acoustic_weight where audio is",
    "semantic": "raise train.loss.semantic_weight, or lower acoustic_weight",
}
_LOUD_REMEDY = {
    "words": "raise train.loss.semantic_weight",
    "padding": "lower train.loss.text_padding_weight",
    "semantic": "lower train.loss.semantic_weight",
    "acoustic": "lower train.loss.acoustic_weight",
}
_NORMALIZE = "set train.loss.normalize to terms, where text and audio are a mean each"


@dataclass(frozen=True)
class Budget:
    """By the names of `GROUPS`; a group without a prediction has 0 and is not judged.

    loss: the whole; weight_sum: c·n over all parts; num_means: what that must be, None where
    the loss is not normalised (`none`).
    """

    loss: float
    loss_shares: dict[str, float]
    gradient_norms: dict[str, float]
    gradient_shares: dict[str, float]
    counts: dict[str, float]
    weight_sum: float
    num_means: float | None

    def as_line(self) -> dict[str, Any]:
        """What a log holds of it."""
        return {
            "loss": self.loss,
            "loss_shares": self.loss_shares,
            "gradient_norms": self.gradient_norms,
            "gradient_shares": self.gradient_shares,
            "warnings": self.warnings(),
        }

    def warnings(self) -> list[str]:
        """One message for each group that is drowned or drowns the others, and one for a loss
        that is not normalised where it should be. Each names the weight to change."""
        found = []
        if self.num_means is not None and abs(self.weight_sum - self.num_means) > SUM_TOLERANCE:
            found.append(
                f"the weights of all predictions must add up to {self.num_means:g} (the means "
                f"that this loss is made of), found {self.weight_sum:.4g}: the loss is not "
                "normalised as train.loss.normalize says. This is a fault of the program: report it"
            )
        unnormalised = f"; or {_NORMALIZE}" if self.num_means is None else ""
        for group in WATCHED:
            if not self.counts[group]:
                continue
            share = self.gradient_shares[group]
            if share < DROWNED_GRADIENT:
                loudest = max(self.gradient_shares, key=lambda name: self.gradient_shares[name])
                found.append(
                    f"{group} must have at least {DROWNED_GRADIENT:.0%} of the gradient, found "
                    f"{share:.1%} ({loudest} has {self.gradient_shares[loudest]:.1%}): they are "
                    f"drowned. {_capital(_REMEDY[group])}{unnormalised}"
                )
        for group, share in self.loss_shares.items():
            if share > DROWNING_LOSS:
                found.append(
                    f"no group should have more than {DROWNING_LOSS:.0%} of the loss, found "
                    f"{group} with {share:.1%}: the loss says nothing of the others. "
                    f"{_capital(_LOUD_REMEDY[group])}{unnormalised}"
                )
        return found

    def __str__(self) -> str:
        shares = (
            f"{group} {self.loss_shares[group]:.1%} / {self.gradient_shares[group]:.1%}"
            for group in GROUPS
        )
        return f"loss / gradient: {', '.join(shares)}"


def loss_budget(
    forward: Callable[..., tuple[torch.Tensor, StreamSums]],
    batches: Sequence[Batch],
    section: LossSection,
    parameters: Iterable[nn.Parameter],
    seed: int = 0,
) -> Budget:
    """The budget of one training batch, in whatever parts it comes.

    Args:
        forward: contract of `training/forward.py`, in the mode in which it trains.
        batches: the parts of a batch; coefficients are made from their counts together.
        parameters: the trainable ones.
        seed: of dropout, which is the same for all groups.

    Raises:
        WorkError: a loss or gradient that is not finite.
    """
    parameters = list(parameters)
    count = torch.stack([part_counts(b.codes, b.loss_mask) for b in batches]).sum(dim=0)  # [P]
    weights = coefficients(count, section)
    part_groups = [group_of_part(place) for place in range(len(weights))]
    nll = torch.zeros(len(weights), dtype=torch.float64)
    norms = {}
    kept = [parameter.grad for parameter in parameters]
    device = weights.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for group in GROUPS:
                is_here = torch.tensor([name == group for name in part_groups], device=device)
                alone = torch.where(is_here, weights, torch.zeros_like(weights))
                sums, norms[group] = _gradient_norm(forward, batches, alone, parameters, seed)
                nll = torch.where(is_here.cpu(), sums, nll)
    finally:
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad
    losses = _by_group(weights.double().cpu() * nll, part_groups)
    loss, norm = sum(losses.values()), sum(norms.values())
    if not torch.isfinite(torch.tensor([loss, norm])).all():
        raise WorkError(
            f"loss and gradient must be finite, found a loss of {loss} and norms {norms}. "
            "Lower train.learning_rate, or look at the clips with `duplex inspect`."
        )
    return Budget(
        loss=loss,
        loss_shares={group: value / loss if loss else 0.0 for group, value in losses.items()},
        gradient_norms=norms,
        gradient_shares={group: value / norm if norm else 0.0 for group, value in norms.items()},
        counts=_by_group(count.double().cpu(), part_groups),
        weight_sum=float((weights * count).sum()),
        num_means=_num_means(count, section),
    )


def _gradient_norm(
    forward: Callable[..., tuple[torch.Tensor, StreamSums]],
    batches: Sequence[Batch],
    weights: torch.Tensor,
    parameters: list[nn.Parameter],
    seed: int,
) -> tuple[torch.Tensor, float]:
    """Sums S [P] of all batches, and the norm of the gradient of `weights · S`."""
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(seed)
    total = torch.zeros(len(weights), dtype=torch.float64)
    for batch in batches:
        loss, sums = forward(batch.codes, batch.loss_mask, weights)
        total += sums.detached().nll
        # `backward`, not `autograd.grad`: recomputed layers and sharded parameters gather
        # their gradients in `.grad` alone.
        loss.backward()
    squares = [
        _whole(parameter.grad).float().square().sum()
        for parameter in parameters
        if parameter.grad is not None
    ]
    norm = torch.stack(squares).sum().sqrt().item() if squares else 0.0
    return total, norm


def _whole(gradient: torch.Tensor) -> torch.Tensor:
    """A sharded gradient in one piece."""
    gather = getattr(gradient, "full_tensor", None)
    return gather() if gather else gradient


def _by_group(values: torch.Tensor, part_groups: list[str]) -> dict[str, float]:
    totals: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
    for group, value in zip(part_groups, values.tolist(), strict=True):
        totals[group] += value
    return totals


def _num_means(count: torch.Tensor, section: LossSection) -> float | None:
    """How many means the loss of these counts is made of; None: it is not normalised."""
    expected = NUM_MEANS.get(section.normalize)
    if expected != 2.0:
        return expected
    present = {group_of_part(place) for place, number in enumerate(count.tolist()) if number}
    weight = {
        "words": 1.0,
        "padding": section.text_padding_weight,
        "semantic": section.semantic_weight,
        "acoustic": section.acoustic_weight,
    }
    heard = {group for group in present if weight[group] > 0}
    return float(bool(heard & {"words", "padding"})) + float(bool(heard & {"semantic", "acoustic"}))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
