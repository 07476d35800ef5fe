"""Where each delta of an adapter goes in a base's file, and every reason why it cannot.

Moshi's files name an attention projection in one of two ways, and both are read:

    split   self_attn.in_projs.0.weight    one tensor for each Linear
    fused   self_attn.in_proj_weight       the Linears of all depth steps, one below the other;
                                           moshi's load hook splits it

A plan is made without reading a weight. Checking it reads the adapter, not the base.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import nn

from duplex.errors import MergeError
from pipeline.engines.checkpoint import Checkpoint
from training.adapter import Adapter
from training.tensorfile import DTYPE_OF_NAME, TensorSpec

_FUSED = {"in_projs": ("in_proj_weight", "in_proj.weight"), "out_projs": ("out_proj.weight",)}


@dataclass(frozen=True)
class Target:
    """Where an adapter's delta goes: rows [row, row + rows) of the base's tensor `key`."""

    module: str
    key: str
    row: int
    rows: int


@dataclass(frozen=True)
class Plan:
    """linears: (out, in) of each Linear of the base, (ids, dim) of each embedding; targets by
    tensor name; specs: each tensor of the output, in the base's own naming."""

    linears: dict[str, tuple[int, int]]
    targets: dict[str, list[Target]]
    specs: dict[str, TensorSpec]

    @property
    def num_modules(self) -> int:
        return sum(len(targets) for targets in self.targets.values())


def make_plan(source: Checkpoint, lora: Adapter, dtype: torch.dtype | None) -> Plan:
    """Where each delta goes. Modules that cannot be placed are left to `check_plan`."""
    linears = base_linears(source)
    with safe_open(source.files()["moshi"], "pt") as file:
        found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        shapes = {key: tuple(part.get_shape()) for key, part in found.items()}
        kinds = {key: DTYPE_OF_NAME.get(part.get_dtype()) for key, part in found.items()}
    unknown = sorted(key for key, kind in kinds.items() if kind is None)
    if unknown:
        raise MergeError(
            f"{source.files()['moshi']}: tensors must be of a type that torch has, "
            f"found others in {', '.join(unknown[:5])}. Merge into an unquantised base."
        )
    targets: dict[str, list[Target]] = {}
    for module in lora.shapes:
        if module in linears:
            target = _place(module, linears[module][0], shapes)
            if target is not None:
                targets.setdefault(target.key, []).append(target)
    specs = {}
    for key, kind in kinds.items():
        assert kind is not None
        cast = dtype if dtype is not None and kind.is_floating_point else kind
        specs[key] = TensorSpec(key, cast, shapes[key])
    return Plan(linears, targets, specs)


def base_linears(source: Checkpoint) -> dict[str, tuple[int, int]]:
    """Shape of the weight of each layer that an adapter can stand on, from the meta device:
    (out, in) of a Linear, (ids, dim) of an embedding."""
    lm = source.info().get_moshi(device="meta", load_weight=False)
    return {
        name: (module.weight.shape[0], module.weight.shape[1])
        for name, module in lm.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }


def _place(module: str, rows: int, shapes: dict[str, tuple[int, ...]]) -> Target | None:
    """The tensor that holds a module's weight, split or fused; None: there is none."""
    if f"{module}.weight" in shapes:
        return Target(module, f"{module}.weight", 0, rows)
    match = re.fullmatch(r"(.+)\.(in_projs|out_projs)\.(\d+)", module)
    for fused in _FUSED[match[2]] if match else ():
        assert match is not None
        key, row = f"{match[1]}.{fused}", int(match[3]) * rows
        if key in shapes and shapes[key][0] >= row + rows:
            return Target(module, key, row, rows)
    return None


def check_plan(source: Checkpoint, lora: Adapter, plan: Plan, base_sha256: str) -> None:
    """
    Raises:
        MergeError: with every reason why this adapter cannot go into this base.
    """
    if lora.base_sha256 not in (None, base_sha256):
        raise MergeError(
            f"{lora.path}: an adapter must go into the base that it was trained on, "
            f"{lora.base_sha256[:12]}…; {source.files()['moshi']} is {base_sha256[:12]}…. "
            "Give that base, or train again on this one."
        )
    placed = {target.module for targets in plan.targets.values() for target in targets}
    faults, zeros = [], []
    for module, (shape_a, shape_b) in lora.shapes.items():
        if module not in plan.linears:
            near = difflib.get_close_matches(module, plan.linears, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            faults.append(f"{module}: the base has no such Linear layer{hint}")
            continue
        rows, columns = plan.linears[module]
        if shape_a != (lora.rank, columns) or shape_b != (rows, lora.rank):
            faults.append(
                f"{module}: A must be [{lora.rank}, {columns}] and B [{rows}, {lora.rank}], "
                f"found {list(shape_a)} and {list(shape_b)}"
            )
        elif module not in placed:
            faults.append(f"{module}: the base's file holds no weight of it")
        else:
            a, b = lora.sides(module)
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                faults.append(f"{module}: A and B must be finite")
            elif not (a.any() and b.any()):
                zeros.append(module)
    if zeros and len(zeros) == len(lora.shapes):
        faults.append("every adapter is zero, so the merge would change nothing: it never trained")
    else:
        faults += [f"{module}: its adapter is zero: it never trained" for module in zeros]
    for module in plan.linears:
        if lora.expects(module) and module not in lora.shapes:
            faults.append(f"{module}: its config targets it, but the adapter has no A and B for it")
    faults += [f"{name}: its config targets it, but the base has no such Linear layer"
               for name in lora.targets_outside(plan.linears)]  # fmt: skip
    if faults:
        listing = "\n".join(f"  - {fault}" for fault in faults[:20])
        more = f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise MergeError(
            f"{lora.path} must fit {source.files()['moshi']}; {len(faults)} fault(s), nothing was "
            f"written.\n{listing}{more}"
        )
