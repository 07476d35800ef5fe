"""Which layers get an adapter, how PEFT puts it there, and the proof that each one is alive.

`y = W x + s · B A x`, W frozen, s = alpha / rank (LoRA, arXiv 2106.09685) or alpha / sqrt(rank)
(rsLoRA, arXiv 2312.03732, `train.lora.rslora`). Targets are written out as full module names,
group by group, never as patterns:

    attention   in and out projections of the temporal transformer
    mlp         its gated feed-forward layers
    depth       the depth transformer, and the projections into it (`depformer_in`)
    heads       the codebook heads `linears`
    text        the text head `text_linear`
    embeddings  only with `train.lora.embeddings`: the input embeddings of both transformers
                (`training/embedding.py`)

On Moshi 7B at dep_q 8 that is 64 + 64 + 200 + 8 + 1 = 337 Linear layers, all there are, and 25
embeddings. A model with dep_q 16 also predicts the user's codes. Unless they carry loss
(`train.loss.user_streams`), weights of steps 8 to 15 can get no gradient, since the depth
transformer is causal over codebooks: they are no targets, rather than adapters that never move.

**Liveness.** Adapters have been trained that had no part in the model: the code took the wrapped
layer's weight and passed it by (the predecessor: 2 of 8 got a gradient). So before training,
one forward and backward pass on a real batch: each A and B must have a finite gradient that is
not zero, whether the forward calls the wrapped layer or reads W, A and B out of it. One side
starts at 0 (B; A of an embedding), where the other's gradient is exactly 0; for this pass
alone it gets seeded noise, and is put back bit for bit.
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
from duplex.errors import DeadAdapterError, RequestError
from duplex.streams import CODEBOOKS
from training.embedding import register

GROUPS = TARGET_GROUPS
EMBEDDINGS = "embeddings"  # the group of `train.lora.embeddings`
ADAPTER = "default"  # PEFT's name for the one adapter
KEY_PREFIX = "base_model.model."  # what PEFT puts before a module's name in its files
PREFLIGHT_STD = 1e-2  # noise for the preflight pass, on the side that starts at zero

_ATTENTION = re.compile(r"transformer\.layers\.\d+\.self_attn\.(in|out)_projs\.\d+")
_MLP = re.compile(r"transformer\.layers\.\d+\.(gating\.linear_(in|out)|linear[12])")
_DEPTH_STEP = re.compile(
    r"depformer\.layers\.\d+\.(?:self_attn\.(?:in|out)_projs|gating)\.(\d+)(?:\.linear_(?:in|out))?"
)
_DEPTH_IN = re.compile(r"depformer_in\.(\d+)")
_DEPTH_SHARED = re.compile(r"depformer\.layers\.\d+\.(gating\.linear_(in|out)|linear[12])")
_HEAD = re.compile(r"linears\.(\d+)")
_EMBEDDING = re.compile(r"emb\.\d+|text_emb|depformer_text_emb|depformer_emb\.(\d+)")
_SIDE = re.compile(
    rf"(.+)\.(?:(lora_[AB])\.{ADAPTER}\.weight|(lora_embedding_[AB])\.{ADAPTER})"
)  # name of an adapter's parameter in the model
_ZERO_AT_START = (f".lora_B.{ADAPTER}.", f".lora_embedding_A.{ADAPTER}")


def target_modules(
    model: nn.Module,
    groups: Iterable[str] = GROUPS,
    *,
    embeddings: bool = False,
    codebooks: int = CODEBOOKS,
) -> dict[str, list[str]]:
    """Names of the layers that `groups` stand for, in the model's order.

    Args:
        model: an `LMModel`, before adapters are put in; the meta device will do.
        embeddings: also a group `embeddings`, of the input embeddings.
        codebooks: how many depth steps carry loss: 8, or 16 with the user's.

    Raises:
        RequestError: an embedding that demuxes two text streams, which no adapter fits.
    """
    found: dict[str, list[str]] = {group: [] for group in GROUPS if group in set(groups)}
    if embeddings:
        found[EMBEDDINGS] = []
    for name, module in model.named_modules():
        group = None
        if isinstance(module, nn.Linear):
            group = _group_of(name, model, codebooks)
        elif isinstance(module, nn.Embedding):
            group = _embedding_group(name, module, codebooks) if embeddings else None
        if group in found:
            found[group].append(name)
    return found


def _embedding_group(name: str, module: Any, codebooks: int) -> str | None:
    match = _EMBEDDING.fullmatch(name)
    # Embedding k of the depth transformer is the input of step k + 1.
    if match is None or (match[1] and int(match[1]) + 1 >= codebooks):
        return None
    if module.demux_second_stream:
        raise RequestError(
            f"train.lora.embeddings: an embedding must hold one stream, found two in {name} "
            "(demux_second_text_stream). Leave train.lora.embeddings out for this model."
        )
    return EMBEDDINGS


def _group_of(name: str, model: Any, codebooks: int) -> str | None:
    if _ATTENTION.fullmatch(name):
        return "attention"
    if _MLP.fullmatch(name):
        return "mlp"
    if name == "text_linear":
        return "text"
    head = _HEAD.fullmatch(name)
    if head:
        return "heads" if int(head[1]) < codebooks else None
    step = _DEPTH_STEP.fullmatch(name) or _DEPTH_IN.fullmatch(name)
    if step:
        shared = name.startswith("depformer_in") and not model.depformer_multi_linear
        return (
            "depth"
            if shared or int(step[1]) in _depth_weights_with_loss(model, codebooks)
            else None
        )
    return "depth" if _DEPTH_SHARED.fullmatch(name) else None


def _depth_weights_with_loss(model: Any, codebooks: int) -> set[int]:
    """Indices of the per-step weights that the codebooks with loss use."""
    schedule = model.depformer_weights_per_step_schedule
    return set(schedule[:codebooks] if schedule else range(codebooks))


def lora_config(section: LoraSection, targets: dict[str, list[str]]) -> Any:
    """PEFT's `LoraConfig`. It holds no path, so that adapters can be moved."""
    from peft import LoraConfig

    names = sorted(name for group in targets.values() for name in group)
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=section.dropout,
        use_rslora=section.rslora,
        target_modules=names,
        bias="none",
        inference_mode=False,
    )
    return register(config) if targets.get(EMBEDDINGS) else config


def add_adapters(
    model: nn.Module, section: LoraSection, targets: dict[str, list[str]], seed: int
) -> None:
    """Put adapters on `targets`, in place: A drawn from `seed`, B zero, both float32; of an
    embedding A is zero and B drawn.

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
    wrapped = {match[1] for name in adapter_parameters(model) if (match := _SIDE.fullmatch(name))}
    assert wrapped == wanted, f"PEFT wrapped other layers than asked: {sorted(wrapped ^ wanted)}"


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of each adapter by the model's own parameter names, in its order."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if _SIDE.fullmatch(name) is not None
    }


def file_key(name: str) -> str:
    """What PEFT's files call an adapter's parameter: `base_model.model.<module>.lora_A.weight`,
    and `base_model.model.<module>.lora_embedding_A`."""
    return KEY_PREFIX + name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter by the names of PEFT's files."""
    return {
        file_key(name): parameter.detach().cpu().contiguous()
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
        DeadAdapterError: names each target of which A or B got no gradient.
    """
    parameters = adapter_parameters(model)
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    model.zero_grad(set_to_none=True)
    try:
        _shake(parameters, seed)
        compute_loss().backward()
        sides = _sides(parameters)
        modules = [name for group in targets.values() for name in group]
        dead = {name: fault for name in modules if (fault := _fault(sides.get(name, {})))}
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
        model.zero_grad(set_to_none=True)
    if dead:
        raise DeadAdapterError(_dead_message(dead, len(modules)))
    return {group: len(names) for group, names in targets.items()}


def _shake(parameters: dict[str, nn.Parameter], seed: int) -> None:
    """Add seeded noise to each side that starts at zero, so that gradient reaches the other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if any(part in name for part in _ZERO_AT_START):
                noise = torch.randn(parameter.shape, generator=generator) * PREFLIGHT_STD
                parameter.add_(noise.to(parameter))


def _sides(parameters: dict[str, nn.Parameter]) -> dict[str, dict[str, nn.Parameter]]:
    """Module -> side (A or B, of a Linear or an embedding) -> parameter."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        match = _SIDE.fullmatch(name)
        assert match is not None
        found.setdefault(match[1], {})[match[2] or match[3]] = parameter
    return found


def _fault(sides: dict[str, nn.Parameter]) -> str | None:
    """What is wrong with one adapter after the pass; None when it is alive."""
    if len(sides) != 2:
        return f"it must have a side A and a side B, found {sorted(sides) or 'neither'}"
    for side, parameter in sorted(sides.items()):
        if parameter.grad is None:
            return f"its {side} got no gradient: the forward pass does not use it"
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
        f"each of the {total} adapters must get a gradient, found {len(dead)} that do "
        f"not; nothing was trained.\n{listing}\n"
        "A layer whose weight the model reads directly cannot be adapted this way, and one whose "
        "loss weights are all 0 gets no gradient: leave its group out of train.lora.targets."
    )
