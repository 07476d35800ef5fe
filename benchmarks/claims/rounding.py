"""What rounding to bfloat16 takes from an adapter's update.

A model that is trained and served in bfloat16 has weights that bfloat16 can hold, so the base is
rounded first, W. With Δ the update in float32 and W' = round(W + Δ), over the targeted weights:

    changed   share of them that differ from the base's after rounding
    survived  <W' - W, Δ> / |Δ|²        the share of the update along its own direction
    error     |W' - W - Δ| / |Δ|        above 1: rounding did more than training
"""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.engines.checkpoint import Checkpoint
from training.adapter import Adapter
from training.mergeplan import check_plan, make_plan
from training.tensorfile import TensorFile

ROUNDING_VERSION = 1


def rounding_of(base: Path, adapter: Path) -> dict[str, float]:
    """`changed`, `survived` and `error`.

    Args:
        base, adapter: folders, as `training.merge.merge_checkpoint` takes them.

    Raises:
        MissingInputError, CorruptFileError, MergeError: as there.
    """
    source, lora = Checkpoint.open(base), Adapter.open(adapter)
    changed = count = 0
    along = square = error = 0.0
    with TensorFile(source.files()["moshi"]) as weights:
        plan = make_plan(source, weights, list(lora.shapes), None)
        check_plan(source, lora, plan)
        for key, targets in plan.targets.items():
            columns = plan.specs[key].shape[-1]
            for target in targets:
                first, size = target.row * columns, target.rows * columns
                before = weights.read_elements(key, first, size).to(torch.bfloat16)
                update = lora.delta(target.module).reshape(-1).double()
                after = (before.double() + update).float().to(torch.bfloat16)
                left = after.double() - before.double()
                changed += int((after != before).sum())
                count += size
                along += float(left @ update)
                square += float(update @ update)
                error += float((left - update).square().sum())
    return {
        "changed": changed / count,
        "survived": along / square,
        "error": (error / square) ** 0.5,
    }
