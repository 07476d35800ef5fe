"""AdamW on the adapters: a group for each of the two transformers, with a rate of its own.

    depth      the depth transformer and its codebook heads: `depformer*`, `linears*`
    temporal   everything else

PersonaPlex was tuned at 2e-6 and 4e-6 (its paper); both rates rise and fall together.
Rates follow from the step alone, so a checkpoint holds AdamW's moments and counters and no more.
Source of betas .9/.95: the predecessor and moshi-finetune.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from duplex.config_train import TrainSection

BETAS = (0.9, 0.95)
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
_DEPTH = ("depformer", "linears.")


def is_depth(name: str) -> bool:
    """Whether a parameter of the LM belongs to the depth transformer or its heads."""
    return name.startswith(_DEPTH)


def make_adam(parameters: dict[str, nn.Parameter], section: TrainSection) -> torch.optim.AdamW:
    """AdamW over `parameters`, in groups `temporal` and `depth` (as far as they have any)."""
    groups = []
    for group, belongs in (("temporal", False), ("depth", True)):
        chosen = [(name, p) for name, p in parameters.items() if is_depth(name) is belongs]
        if chosen:
            groups.append(
                {"params": [p for _, p in chosen], "names": [n for n, _ in chosen], "group": group}
            )
    return torch.optim.AdamW(
        groups,
        lr=section.learning_rate,
        betas=BETAS,
        weight_decay=section.weight_decay,
        fused=True,
    )


def learning_rate(step: int, section: TrainSection, peak: float | None = None) -> float:
    """Rate of update `step` (from 0): linear warm-up to the peak, then a cosine to zero.

    Args:
        peak: `section.learning_rate` if not given.
    """
    peak = section.learning_rate if peak is None else peak
    if step < section.warmup_steps:
        return peak * (step + 1) / section.warmup_steps
    progress = (step - section.warmup_steps) / max(1, section.steps - section.warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def set_rates(adam: torch.optim.Optimizer, step: int, section: TrainSection) -> dict[str, float]:
    """Set each group's rate for update `step`; returns what the log says of them."""
    depth = section.depth_learning_rate
    rates = {
        "temporal": learning_rate(step, section),
        "depth": learning_rate(step, section, depth),
    }
    for group in adam.param_groups:
        group["lr"] = rates[group["group"]]
    return {"lr": rates["temporal"]} | ({} if depth is None else {"lr_depth": rates["depth"]})


def adam_tensors(
    adam: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Its state as `<kind>.<parameter>`, on the CPU."""
    return {
        f"{kind}.{name}": adam.state[parameter][kind].detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for kind in ADAM_STATE
    }


def load_adam(adam: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `adam_tensors` gave."""
    names = [name for group in adam.param_groups for name in group["names"]]
    state = {
        index: {kind: tensors[f"{kind}.{name}"] for kind in ADAM_STATE}
        for index, name in enumerate(names)
    }
    adam.load_state_dict({"state": state, "param_groups": adam.state_dict()["param_groups"]})
