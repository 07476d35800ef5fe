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
from typing import Any

import torch
from torch import nn

from duplex.errors import MergeError
from pipeline.engines.checkpoint import Checkpoint
from training.adapter import Adapter
from training.depthcut import cut_config, cut_shapes
from training.tensorfile import TensorFile, TensorSpec, aligned_order

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
    """What is to be written: each tensor of the output, in the base's own naming, and which rows
    of it get a delta. A tensor may be a first part of the base's (a cut), never more.

    config: of the output; linears: (out, in) of each of its Linear layers, (ids, dim) of each
        embedding.
    specs: in the order of the output's file; targets: by tensor, from the first row down.
    """

    config: dict[str, Any]
    linears: dict[str, tuple[int, int]]
    targets: dict[str, list[Target]]
    specs: dict[str, TensorSpec]

    @property
    def num_modules(self) -> int:
        return sum(len(targets) for targets in self.targets.values())

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs.values())


def make_plan(
    source: Checkpoint,
    base: TensorFile,
    modules: list[str],
    dtype: torch.dtype | None,
    *,
    cut: bool = False,
) -> Plan:
    """Where the delta of each of `modules` goes. Those without a place are left to `check_plan`.

    Args:
        base: the weights of `source`.
        dtype: of the output's floating-point tensors; None keeps the base's.
        cut: leave depth steps 8 to 15 out.

    Raises:
        MergeError: `cut`, and the base has not sixteen depth steps.
    """
    config = cut_config(source.config) if cut else source.config
    shapes = {name: spec.shape for name, spec in base.specs.items()}
    shapes = cut_shapes(shapes, source.config) if cut else shapes
    linears = shapes_of(source, config)
    targets: dict[str, list[Target]] = {}
    for module in modules:
        if module in linears:
            target = _place(module, linears[module][0], shapes)
            if target is not None:
                targets.setdefault(target.key, []).append(target)
    specs = []
    for key, shape in shapes.items():
        kind = base.specs[key].dtype
        cast = dtype if dtype is not None and kind.is_floating_point else kind
        specs.append(TensorSpec(key, cast, shape))
    # The base's own order, so that it is read from front to back.
    ordered = aligned_order(specs, lambda spec: base.starts[spec.name])
    return Plan(
        config,
        linears,
        {key: sorted(found, key=lambda target: target.row) for key, found in targets.items()},
        {spec.name: spec for spec in ordered},
    )


def shapes_of(
    source: Checkpoint,
    config: dict[str, Any],
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding),
) -> dict[str, tuple[int, int]]:
    """Shape of the weight of each layer of `kinds`, from the meta device: (out, in) of a Linear,
    (ids, dim) of an embedding."""
    changes = {key: value for key, value in config.items() if source.config.get(key) != value}
    lm = source.empty_lm(changes)
    layers: list[tuple[str, Any]] = [
        (name, module) for name, module in lm.named_modules() if isinstance(module, kinds)
    ]
    return {name: (layer.weight.shape[0], layer.weight.shape[1]) for name, layer in layers}


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


def check_plan(source: Checkpoint, lora: Adapter, plan: Plan) -> None:
    """
    Raises:
        MergeError: with every reason why this adapter cannot go into this base.
    """
    placed = {target.module: target for targets in plan.targets.values() for target in targets}
    faults, zeros = [], []
    for module, (shape_a, shape_b) in lora.shapes.items():
        if module not in plan.linears:
            near = difflib.get_close_matches(module, plan.linears, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            faults.append(f"{module}: {_where(source, plan)} has no such Linear layer{hint}")
            continue
        rows, columns = plan.linears[module]
        if shape_a != (lora.rank, columns) or shape_b != (rows, lora.rank):
            faults.append(
                f"{module}: A must be [{lora.rank}, {columns}] and B [{rows}, {lora.rank}], "
                f"found {list(shape_a)} and {list(shape_b)}"
            )
        elif module not in placed:
            faults.append(f"{module}: the base's file holds no weight of it")
        elif fault := _weight_fault(placed[module], plan.specs[placed[module].key], columns):
            faults.append(f"{module}: {fault}")
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
    faults += [f"{name}: its config targets it, but {_where(source, plan)} has no such Linear layer"
               for name in lora.targets_outside(plan.linears)]  # fmt: skip
    if faults:
        listing = "\n".join(f"  - {fault}" for fault in faults[:20])
        more = f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise MergeError(
            f"{lora.path} must fit {source.files()['moshi']}; {len(faults)} fault(s), nothing was "
            f"written.\n{listing}{more}"
        )


def _weight_fault(target: Target, spec: TensorSpec, columns: int) -> str | None:
    """What is wrong with the tensor of the base that holds a module's weight."""
    rows = target.row + target.rows
    whole = target.row == 0 and spec.name == f"{target.module}.weight"
    if spec.shape[1:] != (columns,) or (spec.shape[0] != rows if whole else spec.shape[0] < rows):
        return (
            f"its weight must be [{target.rows}, {columns}], found {list(spec.shape)} in the base"
        )
    if not spec.dtype.is_floating_point:
        return f"its weight must be of a floating type, found {spec.dtype} in the base"
    return None


def check_base(source: Checkpoint, lora: Adapter, base_sha256: str) -> None:
    """
    Raises:
        MergeError: the adapter was trained on other weights than the base's.
    """
    if lora.base_sha256 not in (None, base_sha256):
        raise MergeError(
            f"{lora.path}: an adapter must go into the base that it was trained on, "
            f"{lora.base_sha256[:12]}…; {source.files()['moshi']} is {base_sha256[:12]}…. "
            "Give that base, or train again on this one; nothing was kept."
        )


def check_fit(source: Checkpoint, lora: Adapter) -> None:
    """
    Raises:
        MergeError: an adapter that could not be merged into this base.
    """
    with TensorFile(source.files()["moshi"]) as weights:
        check_plan(source, lora, make_plan(source, weights, list(lora.shapes), None))
    check_base(source, lora, source.digest("moshi"))


def _where(source: Checkpoint, plan: Plan) -> str:
    if plan.config.get("dep_q") != source.config.get("dep_q"):
        return (
            "the base cut to 8 depth steps (merge uncut, then `duplex convert checkpoint`, to "
            "drop what was trained on the others)"
        )
    return "the base"
