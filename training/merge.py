"""Merging: W + scale · B A in float32, tensor by tensor, and proof that it did just that.

Plan, check, apply, verify. Before anything is written: the adapter names its base's digest;
each of its modules is a Linear of the base, with fitting shapes; each module that its config
targets is there; each delta is finite and not zero. All faults are reported at once.
After writing, in the unfinished folder: each targeted tensor differs from the base's and all
others are equal; the folder loads strictly through moshi; and on a seeded batch its logits
equal those of base + unmerged PEFT adapter:

    error  = rms(merged - unmerged) / rms(unmerged)     at most 1e-4 float32, 3e-2 bfloat16
    effect = rms(base - unmerged) / rms(unmerged)       error must be under half of it

The second line is what a merge that did nothing fails. It also refuses a bfloat16 merge whose
rounding hides the adapter: of small updates about a third of the weights survived that
(FACTS, section 4). Merges that changed nothing, with a warning only, are why all this is here.

Memory: one tensor while writing; for the check the model once in float32 (7B: 31 GB).
The output folder is renamed into place when all of it is proven, so it is whole or absent.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from duplex.errors import MergeError, RequestError
from duplex.files import new_folder, require_free, sha256_file, write_json
from pipeline.engines.checkpoint import Checkpoint
from training.adapter import Adapter
from training.mergeplan import Plan, check_plan, make_plan
from training.tensorfile import TensorSpec, write_tensors
from training.verify import ROUNDING, logit_errors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CERTIFICATE = "certificate.json"
# Role in `Checkpoint.files` -> name in the merged folder.
NAMES = {
    "moshi": "model.safetensors",
    "mimi": "mimi.safetensors",
    "mimi_config": "mimi_config.json",
    "tokenizer": "tokenizer.model",
}


@dataclass(frozen=True)
class Change:
    """What the merge did to one module. Norms are Frobenius norms in float32.

    changed: share of its weights that differ from the base's after rounding.
    """

    module: str
    delta_norm: float
    weight_norm: float
    changed: float


def merge_checkpoint(
    base: Path, adapter: Path, out: Path, dtype: str | None = None
) -> dict[str, Any]:
    """Write base + adapter as a complete checkpoint folder `out`, and return its certificate.

    Args:
        base: a checkpoint folder; its weights may be fused (`in_proj_weight`) or split.
        adapter: a folder with adapter_model.safetensors and adapter_config.json.
        out: a folder that is not there, or empty.
        dtype: float32 or bfloat16; None keeps the base's.

    Raises:
        RequestError: `out` is taken, or the dtype unknown.
        MissingInputError: a file of the base or of the adapter is not there.
        MergeError: adapter and base do not fit, or the result is not what it must be.
    """
    require_free(out)
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype must be one of {', '.join(DTYPES)}, found {dtype}")
    source, lora = Checkpoint.open(base), Adapter.open(adapter)
    base_sha256 = source.digest("moshi")
    plan = make_plan(source, lora, DTYPES[dtype] if dtype else None)
    check_plan(source, lora, plan, base_sha256)
    with new_folder(out) as folder:
        changes = apply_plan(source, lora, plan, folder / NAMES["moshi"])
        check_weights(source, plan, folder / NAMES["moshi"])
        weights_sha256 = sha256_file(folder / NAMES["moshi"])
        _write_companions(source, folder, weights_sha256)
        written = _written_dtype(plan)
        error, effect = logit_errors(source, adapter, Checkpoint.open(folder))
        check_logits(error, effect, written)
        certificate = {
            "base_sha256": base_sha256,
            "base_verified": lora.base_sha256 is not None,
            "adapter_sha256": lora.sha256,
            "weights_sha256": weights_sha256,
            "dtype": written,
            "formula": "W + scale * B A",
            "rank": lora.rank,
            "scale": lora.scale,
            "modules_targeted": plan.num_modules,
            "modules_changed": len(changes),
            "logits": {"error": error, "tolerance": ROUNDING[written], "effect": effect},
            "weights_changed_least": min(change.changed for change in changes),
            "modules": {
                change.module: {
                    "delta_norm": change.delta_norm,
                    "weight_norm": change.weight_norm,
                    "changed": change.changed,
                }
                for change in changes
            },
        }
        write_json(folder / CERTIFICATE, certificate)
    return certificate


# -- apply and verify


def apply_plan(source: Checkpoint, lora: Adapter, plan: Plan, path: Path) -> list[Change]:
    """Write the merged weights to `path`; returns what became of each targeted module.

    Raises:
        MergeError: a module that comes out of the merge as it was.
    """
    changes: list[Change] = []
    with safe_open(source.files()["moshi"], "pt") as file:

        def make(spec: TensorSpec) -> torch.Tensor:
            base = file.get_tensor(spec.name)
            targets = plan.targets.get(spec.name, [])
            if not targets:
                return base.to(spec.dtype)
            merged = base.to(torch.float32, copy=True)
            for target in targets:
                rows = slice(target.row, target.row + target.rows)
                delta = lora.delta(target.module)  # [rows, in]
                merged[rows] += delta
                differs = merged[rows].to(spec.dtype) != base[rows].to(spec.dtype)
                changes.append(
                    Change(
                        target.module,
                        delta.norm().item(),
                        base[rows].float().norm().item(),
                        differs.double().mean().item(),
                    )
                )
            return merged.to(spec.dtype)

        write_tensors(path, plan.specs.values(), make)
    same = [change.module for change in changes if not change.changed]
    if same:
        raise MergeError(
            f"each of {plan.num_modules} targeted modules must differ from the base after the "
            f"merge, found {len(same)} unchanged (first {same[0]}). In bfloat16 a small update "
            "rounds away: merge with dtype float32, or train for longer."
        )
    return sorted(changes, key=lambda change: change.module)


def check_weights(source: Checkpoint, plan: Plan, path: Path) -> None:
    """Read the written file back: targeted rows differ from the base's, all else is equal.

    Raises:
        MergeError: it is otherwise.
    """
    faults = []
    with safe_open(source.files()["moshi"], "pt") as old, safe_open(path, "pt") as new:
        for key, spec in plan.specs.items():
            before, after = old.get_tensor(key).to(spec.dtype), new.get_tensor(key)
            if after.dtype != spec.dtype or after.shape != before.shape:
                faults.append(f"{key}: is {after.dtype} {list(after.shape)}")
                continue
            untouched = torch.ones(before.shape[:1] or (1,), dtype=torch.bool)
            for target in plan.targets.get(key, []):
                rows = slice(target.row, target.row + target.rows)
                untouched[rows] = False
                if torch.equal(before[rows], after[rows]):
                    faults.append(f"{target.module}: is the same as in the base")
            if before.dim() == 0:
                before, after = before[None], after[None]
            if not torch.equal(before[untouched], after[untouched]):
                faults.append(f"{key}: no adapter targets it, and it differs from the base")
    if faults:
        listing = "\n".join(f"  - {fault}" for fault in faults[:20])
        raise MergeError(f"the merged weights must be base + adapter and are not.\n{listing}")


def check_logits(error: float, effect: float, dtype: str) -> None:
    """
    Raises:
        MergeError: the merged model does not do what base + adapter does.
    """
    if not error <= ROUNDING[dtype]:
        raise MergeError(
            f"merged and unmerged logits must agree within {ROUNDING[dtype]:g} (relative rms, "
            f"{dtype}), found {error:.3g}. The merged weights are not base + adapter; nothing "
            "was kept."
        )
    if not error < effect / 2:
        raise MergeError(
            f"the merge must come nearer to the adapter than to the base: its rounding error is "
            f"{error:.3g} of the logits, the adapter's whole effect {effect:.3g} ({dtype}). "
            "Merge with dtype float32, or train for longer; nothing was kept."
        )


# -- the folder


def _write_companions(source: Checkpoint, folder: Path, weights_sha256: str) -> None:
    """Everything but the weights: codec and tokenizer as they are, config.json by plain names."""
    files = source.files()
    for role, path in files.items():
        if role != "moshi":
            _link_or_copy(path, folder / NAMES[role])
    config = dict(source.config)
    config |= {f"{role}_name": NAMES[role] for role in files}
    config["model_id"] = {"sig": weights_sha256[:8], "epoch": 0}
    write_json(folder / "config.json", config)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _written_dtype(plan: Plan) -> str:
    """The coarsest dtype among the targeted tensors."""
    names = {str(plan.specs[key].dtype).removeprefix("torch.") for key in plan.targets}
    return max(names, key=lambda name: ROUNDING[name])
