"""Merging: W + scale · B A in float32, tensor by tensor, and proof that it did just that.

Plan, check, apply, verify. Before anything is written: each module of the adapter is a Linear of
the base, with fitting shapes; each module that its config targets is there; each delta is finite
and not zero; the disk has room. All faults are reported at once. The base is digested while it
is read, so that 15 GB are read once: a base that the adapter was not trained on is refused then.
After writing, in the unfinished folder: rounding has left the update (`training/apply.py` has
the measure); each targeted tensor differs from the base's and all others are equal; the folder
loads strictly through moshi; and on a seeded batch its logits equal those of base + unmerged
adapter:

    error  = rms(merged - unmerged) / rms(unmerged)     at most 1e-4 float32, 3e-2 bfloat16
    effect = rms(base - unmerged) / rms(unmerged)       error must be under half of it

The second line is what a merge that did nothing fails. Merges that changed nothing, with a
warning only, by the predecessor are why all this is here; in bfloat16 small updates round away.

Memory: some blocks while writing, one layer in float32 for the logits; time and memory of a 7B
merge are in docs/results/merge.md. The output folder is renamed into place when all of it is
proven, so it is whole or absent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from duplex.errors import MergeError, RequestError
from duplex.files import new_folder, require_free, write_json
from pipeline.engines.checkpoint import Checkpoint
from training.adapter import Adapter
from training.apply import Change, Tell, Written, apply_plan, silent
from training.mergeplan import Plan, check_base, check_plan, make_plan
from training.outfolder import CERTIFICATE, NAMES, require_room, write_companions
from training.tensorfile import TensorFile
from training.verify import ROUNDING, cut_error, logit_errors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEAST_SURVIVED = 0.5  # of the update, over all modules
CUT_TOLERANCE = 1e-4  # leaving steps out changes the order of summation, and nothing else
_FIRST_ELEMENTS, _CHECK_ELEMENTS = 1 << 14, 1 << 20  # compared at once: where most differ, then


def merge_checkpoint(
    base: Path,
    adapter: Path,
    out: Path,
    dtype: str | None = None,
    *,
    cut: bool = False,
    tell: Tell = silent,
) -> dict[str, Any]:
    """Write base + adapter as a complete checkpoint folder `out`, and return its certificate.

    Args:
        base: a checkpoint folder; its weights may be fused (`in_proj_weight`) or split.
        adapter: a folder with adapter_model.safetensors and adapter_config.json.
        out: a folder that is not there, or empty.
        dtype: float32 or bfloat16; None keeps the base's.
        cut: leave depth steps 8 to 15 of the base out (PersonaPlex), so that it can be served.
        tell: is told what is being done, and how far it is.

    Raises:
        RequestError: `out` is taken, or the dtype unknown.
        MissingInputError: a file of the base or of the adapter is not there.
        CorruptFileError: the base's weights cannot be read.
        MergeError: adapter and base do not fit, or the result is not what it must be.
    """
    require_free(out)
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype must be one of {', '.join(DTYPES)}, found {dtype}")
    source, lora = Checkpoint.open(base), Adapter.open(adapter)
    with TensorFile(source.files()["moshi"]) as weights:
        plan = make_plan(
            source, weights, list(lora.shapes), DTYPES[dtype] if dtype else None, cut=cut
        )
        check_plan(source, lora, plan)
        require_room(out, plan.num_bytes)
        with new_folder(out) as folder:
            written = apply_plan(weights, lora, plan, folder / NAMES["moshi"], tell)
            check_base(source, lora, written.base_sha256)
            check_changes(written.changes, plan)
            check_weights(weights, plan, folder / NAMES["moshi"], tell)
            write_companions(source, folder, plan.config, written.sha256)
            tell("comparing logits", 0, 1)
            error, effect = logit_errors(source, adapter, Checkpoint.open(folder))
            check_logits(error, effect, _written_dtype(plan))
            certificate = _certificate(source, lora, plan, written, error, effect)
            write_json(folder / CERTIFICATE, certificate)
            tell("comparing logits", 1, 1)
    return certificate


def cut_checkpoint(base: Path, out: Path, *, tell: Tell = silent) -> dict[str, Any]:
    """Write a checkpoint with sixteen depth steps again with eight, and return its certificate.

    Raises:
        RequestError: `out` is taken.
        MissingInputError, CorruptFileError: the base is not there, or cannot be read.
        MergeError: it has not sixteen depth steps, or the agent's logits would change.
    """
    require_free(out)
    source = Checkpoint.open(base)
    with TensorFile(source.files()["moshi"]) as weights:
        plan = make_plan(source, weights, [], None, cut=True)
        require_room(out, plan.num_bytes)
        with new_folder(out) as folder:
            written = apply_plan(weights, None, plan, folder / NAMES["moshi"], tell)
            check_weights(weights, plan, folder / NAMES["moshi"], tell)
            write_companions(source, folder, plan.config, written.sha256)
            tell("comparing logits", 0, 1)
            error = cut_error(source, Checkpoint.open(folder))
            if not error <= CUT_TOLERANCE:
                raise MergeError(
                    f"text and agent logits must be the same without depth steps 8 to 15, within "
                    f"{CUT_TOLERANCE:g} (relative rms), found {error:.3g}; nothing was kept. The "
                    "first eight codebooks of this model are not the agent's by themselves."
                )
            certificate = {
                "base_sha256": written.base_sha256,
                "weights_sha256": written.sha256,
                "dep_q": {"base": source.config["dep_q"], "output": plan.config["dep_q"]},
                "tensors": {"base": len(weights.specs), "output": len(plan.specs)},
                "logits": {"error": error, "tolerance": CUT_TOLERANCE},
            }
            write_json(folder / CERTIFICATE, certificate)
            tell("comparing logits", 1, 1)
    return certificate


def summary(certificate: dict[str, Any]) -> list[str]:
    """A merge's certificate in a few lines, for a person."""
    survived, logits = certificate["survived"], certificate["logits"]
    dep_q = certificate.get("dep_q")
    lines = [
        f"modules   {certificate['modules_changed']} of {certificate['modules_targeted']} changed, "
        f"rank {certificate['rank']}, scale {certificate['scale']:g}, {certificate['dtype']}",
        f"rounding  {survived['total']:.1%} of the update survived it, least "
        f"{survived['least']:.1%} ({survived['least_module']}); weights changed: at least "
        f"{certificate['weights_changed_least']:.1%} of each module",
        f"logits    merged against unmerged {logits['error']:.1e} (allowed "
        f"{logits['tolerance']:.0e}), base against unmerged {logits['effect']:.1e}",
        "sha256    "
        + ", ".join(f"{name} {certificate[f'{name}_sha256'][:12]}…"
                    for name in ("base", "adapter", "weights"))
        + ("" if certificate["base_verified"] else "; the adapter names no base"),
    ]  # fmt: skip
    if dep_q:
        lines.insert(1, f"steps     dep_q {dep_q['base']} cut to {dep_q['output']}")
    return lines


def _certificate(
    source: Checkpoint, lora: Adapter, plan: Plan, written: Written, error: float, effect: float
) -> dict[str, Any]:
    changes, dtype = written.changes, _written_dtype(plan)
    least = min(changes, key=lambda change: change.survived)
    certificate: dict[str, Any] = {
        "base_sha256": written.base_sha256,
        "base_verified": lora.base_sha256 is not None,
        "adapter_sha256": lora.sha256,
        "weights_sha256": written.sha256,
        "dtype": dtype,
        "formula": "W + scale * B A",
        "rank": lora.rank,
        "scale": lora.scale,
        "modules_targeted": plan.num_modules,
        "modules_changed": sum(change.changed > 0 for change in changes),
        "logits": {"error": error, "tolerance": ROUNDING[dtype], "effect": effect},
        "survived": {
            "total": _survived(changes),
            "least": least.survived,
            "least_module": least.module,
        },
        "weights_changed_least": min(change.changed for change in changes),
        "modules": {
            change.module: {
                "delta_norm": change.delta_norm,
                "weight_norm": change.weight_norm,
                "changed": change.changed,
                "survived": change.survived,
            }
            for change in changes
        },
    }
    if plan.config.get("dep_q") != source.config.get("dep_q"):
        certificate["dep_q"] = {"base": source.config["dep_q"], "output": plan.config["dep_q"]}
    return certificate


# -- checks


def check_changes(changes: list[Change], plan: Plan) -> None:
    """
    Raises:
        MergeError: a module came out as it was, or rounding took most of the update.
    """
    advice = (
        "In bfloat16 a small update rounds away: merge with dtype float32, or train for longer; "
        "nothing was kept."
    )
    same = [change.module for change in changes if not change.changed]
    if same:
        raise MergeError(
            f"each of {plan.num_modules} targeted modules must differ from the base after the "
            f"merge, found {len(same)} unchanged (first {same[0]}). {advice}"
        )
    survived = _survived(changes)
    if not survived >= LEAST_SURVIVED:
        raise MergeError(
            f"at least {LEAST_SURVIVED:.0%} of the update must survive rounding, found "
            f"{survived:.1%} over {len(changes)} modules. {advice}"
        )


def _survived(changes: list[Change]) -> float:
    """Over all modules: <W' - W, Δ> / |Δ|²."""
    squares = [change.delta_norm**2 for change in changes]
    along = sum(c.survived * square for c, square in zip(changes, squares, strict=True))
    return along / sum(squares) if sum(squares) else 0.0


def check_weights(base: TensorFile, plan: Plan, path: Path, tell: Tell = silent) -> None:
    """Read the written file back: targeted rows differ from the base's, all else is equal.

    A targeted module is read as far as its first difference; how much of it changed was counted
    when it was written.

    Raises:
        MergeError: it is otherwise.
    """
    faults = []
    with TensorFile(path) as new:
        if new.specs != plan.specs:
            strange = sorted({*new.specs.items()} ^ {*plan.specs.items()}, key=str)
            faults.append(f"tensors are others than planned: {strange[:3]}")
        for number, (key, spec) in enumerate(plan.specs.items() if not faults else ()):
            tell("reading back", number, len(plan.specs))
            columns = spec.num_elements // max(1, spec.shape[0]) if spec.shape else 1
            done, touched = 0, False
            for target in plan.targets.get(key, []):
                first, end = target.row * columns, (target.row + target.rows) * columns
                touched |= _differs(base, new, key, done, first)
                if not _differs(base, new, key, first, end):
                    faults.append(f"{target.module}: is the same as in the base")
                done = end
            if touched or _differs(base, new, key, done, spec.num_elements):
                faults.append(f"{key}: no adapter targets it, and it differs from the base")
    if faults:
        listing = "\n".join(f"  - {fault}" for fault in faults[:20])
        raise MergeError(f"the merged weights must be base + adapter and are not.\n{listing}")


def _differs(base: TensorFile, new: TensorFile, name: str, first: int, end: int) -> bool:
    """Whether elements [first, end) differ anywhere, in the type of `new`."""
    start, step = first, _FIRST_ELEMENTS
    while start < end:
        count = min(step, end - start)
        after = new.read_elements(name, start, count)
        before = base.read_elements(name, start, count).to(after.dtype)
        # Bits, not values: a NaN equals itself here, and -0 is not +0.
        if not torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
            return True
        start, step = start + count, _CHECK_ELEMENTS
    return False


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


def _written_dtype(plan: Plan) -> str:
    """The coarsest dtype among the targeted tensors."""
    names = {str(plan.specs[key].dtype).removeprefix("torch.") for key in plan.targets}
    return max(names, key=lambda name: ROUNDING[name])
