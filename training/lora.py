"""Which layers get an adapter, how PEFT puts it there, and the proof that each one is alive.

`y = W x + (alpha / rank) · B A x`, W frozen (LoRA, arXiv 2106.09685). Targets are written out
as full module names, group by group, never as patterns:

    attention   in and out projections of the temporal transformer
    mlp         its gated feed-forward layers
    depth       the depth transformer, and the projections into it (`depformer_in`)
    heads       the codebook heads `linears`
    text        the text head `text_linear`

On Moshi 7B at dep_q 8 that is 64 + 64 + 200 + 8 + 1 = 337 Linear layers, all there are.
A model with dep_q 16 also predicts the user's codes. Our loss leaves those out and the depth
transformer is causal over codebooks, so weights of steps 8 to 15 can get no gradient: they
are no targets, rather than adapters that never move.

**Liveness.** Adapters have been trained that were never called: the code took the wrapped
layer's weight and passed it by (FACTS, section 4: 2 of 8 got a gradient). So before training,
one forward and backward pass on a real batch: each target must have run as a module, and
each A and B must have a finite gradient that is not zero. B starts at 0, where A's gradient
is exactly 0; for this pass alone B gets seeded noise, and is put back bit for bit.
It costs one training step. Pure: no files, no clock; imports PEFT (7 s) on first use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from duplex.config_train import TARGET_GROUPS, LoraSection
from duplex.errors import DeadAdapterError
from duplex.streams import CODEBOOKS

GROUPS = TARGET_GROUPS
ADAPTER = "default"  # PEFT's name for the one adapter
KEY_PREFIX = "base_model.model."  # what PEFT puts before a module's name in its files
PREFLIGHT_STD = 1e-2  # noise on B for the preflight pass

_ATTENTION = re.compile(r"transformer\.layers\.\d+\.self_attn\.(in|out)_projs\.\d+")
_MLP = re.compile(r"transformer\.layers\.\d+\.(gating\.linear_(in|out)|linear[12])")
_DEPTH_STEP = re.compile(
    r"depformer\.layers\.\d+\.(?:self_attn\.(?:in|out)_projs|gating)\.(\d+)(?:\.linear_(?:in|out))?"
)
_DEPTH_IN = re.compile(r"depformer_in\.(\d+)")
_DEPTH_SHARED = re.compile(r"depformer\.layers\.\d+\.(gating\.linear_(in|out)|linear[12])")
_HEAD = re.compile(r"linears\.(\d+)")


def target_modules(model: nn.Module, groups: Iterable[str] = GROUPS) -> dict[str, list[str]]:
    """Names of the Linear layers that `groups` stand for, in the model's order.

    Args:
        model: an `LMModel`, before adapters are put in; the meta device will do.
    """
    found: dict[str, list[str]] = {group: [] for group in GROUPS if group in set(groups)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            group = _group_of(name, model)
            if group in found:
                found[group].append(name)
    return found


def _group_of(name: str, model: Any) -> str | None:
    if _ATTENTION.fullmatch(name):
        return "attention"
    if _MLP.fullmatch(name):
        return "mlp"
    if name == "text_linear":
        return "text"
    head = _HEAD.fullmatch(name)
    if head:
        return "heads" if int(head[1]) < CODEBOOKS else None
    step = _DEPTH_STEP.fullmatch(name) or _DEPTH_IN.fullmatch(name)
    if step:
        shared = name.startswith("depformer_in") and not model.depformer_multi_linear
        return "depth" if shared or int(step[1]) in _depth_weights_with_loss(model) else None
    return "depth" if _DEPTH_SHARED.fullmatch(name) else None


def _depth_weights_with_loss(model: Any) -> set[int]:
    """Indices of the per-step weights that the agent's codebooks use."""
    schedule = model.depformer_weights_per_step_schedule
    return set(schedule[:CODEBOOKS] if schedule else range(CODEBOOKS))


def lora_config(section: LoraSection, targets: dict[str, list[str]]) -> Any:
    """PEFT's `LoraConfig`. It holds no path, so that adapters can be moved."""
    from peft import LoraConfig

    names = sorted(name for group in targets.values() for name in group)
    return LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=section.dropout,
        target_modules=names,
        bias="none",
        inference_mode=False,
    )


def add_adapters(
    model: nn.Module, section: LoraSection, targets: dict[str, list[str]], seed: int
) -> None:
    """Put adapters on `targets`, in place: A drawn from `seed`, B zero, both float32.

    All other parameters are frozen. Float32 adapters on a bfloat16 base are what keeps
    small updates from being rounded away.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora_config(section, targets), model, adapter_name=ADAPTER)
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()
    wanted = {name for group in targets.values() for name in group}
    wrapped = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == wanted, f"PEFT wrapped other layers than asked: {sorted(wrapped ^ wanted)}"


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of each adapter by the model's own parameter names, in its order."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name
    }


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter as PEFT's files name it: `base_model.model.<module>.lora_A.weight` …"""
    return {
        KEY_PREFIX + name.replace(f".{ADAPTER}.", "."): parameter.detach().cpu().contiguous()
        for name, parameter in adapter_parameters(model).items()
    }


@dataclass(frozen=True)
class GroupCount:
    modules: int
    parameters: int  # adapter parameters, A and B


def count_trainable(model: nn.Module, targets: dict[str, list[str]]) -> dict[str, GroupCount]:
    """Adapted modules and trainable parameters of each group."""
    counts = {}
    for group, names in targets.items():
        sizes = [
            parameter.numel()
            for name in names
            for parameter in model.get_submodule(name).parameters()
            if parameter.requires_grad
        ]
        counts[group] = GroupCount(len(names), sum(sizes))
    return counts


def liveness(
    model: nn.Module,
    targets: dict[str, list[str]],
    compute_loss: Callable[[], torch.Tensor],
    seed: int,
) -> dict[str, int]:
    """Prove that every adapter takes part: one forward, one backward, no parameter changed.

    Args:
        compute_loss: runs the model on a real batch and returns the scalar training loss.

    Returns:
        Number of live adapters of each group: all of them.

    Raises:
        DeadAdapterError: names each target that did not run, or got no gradient.
    """
    modules = {name: model.get_submodule(name) for group in targets.values() for name in group}
    runs = dict.fromkeys(modules, 0)

    def counter(name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            runs[name] += 1

        return count

    parameters = adapter_parameters(model)
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    hooks = [module.register_forward_hook(counter(name)) for name, module in modules.items()]
    model.zero_grad(set_to_none=True)
    try:
        _shake(parameters, seed)
        compute_loss().backward()
        dead = {name: fault for name in modules if (fault := _fault(name, runs[name], parameters))}
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
        model.zero_grad(set_to_none=True)
    if dead:
        raise DeadAdapterError(_dead_message(dead, len(modules)))
    return {group: len(names) for group, names in targets.items()}


def _shake(parameters: dict[str, nn.Parameter], seed: int) -> None:
    """Add seeded noise to each B, so that gradient reaches each A."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if f".lora_B.{ADAPTER}." in name:
                noise = torch.randn(parameter.shape, generator=generator) * PREFLIGHT_STD
                parameter.add_(noise.to(parameter))


def _fault(name: str, runs: int, parameters: dict[str, nn.Parameter]) -> str | None:
    """What is wrong with one target after the pass; None when it is alive."""
    if not runs:
        return "it was never called as a module"
    for side in ("lora_A", "lora_B"):
        parameter = parameters.get(f"{name}.{side}.{ADAPTER}.weight")
        if parameter is None:
            return f"it has no {side}"
        if parameter.grad is None:
            return f"its {side} got no gradient"
        if not torch.isfinite(parameter.grad).all():
            return f"the gradient of its {side} is not finite"
        if not parameter.grad.any():
            return f"the gradient of its {side} is zero throughout"
    return None


def _dead_message(dead: dict[str, str], total: int) -> str:
    shown = [f"  - {name}: {fault}" for name, fault in list(dead.items())[:20]]
    if len(dead) > len(shown):
        shown.append(f"  … and {len(dead) - len(shown)} more")
    listing = "\n".join(shown)
    return (
        f"each of the {total} adapters must run and get a gradient, found {len(dead)} that do "
        f"not; nothing was trained.\n{listing}\n"
        "A layer whose weight the model reads directly cannot be adapted this way, and one whose "
        "loss weights are all 0 gets no gradient: leave its group out of train.lora.targets."
    )
