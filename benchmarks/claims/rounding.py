"""What rounding to a type leaves of an adapter's update, also where a merge to it is refused."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from pipeline.engines.checkpoint import Checkpoint
from training.adapter import Adapter
from training.apply import apply_plan
from training.merge import DTYPES, survived_share
from training.mergeplan import check_plan, make_plan
from training.tensorfile import TensorFile


def rounding_of(base: Path, adapter: Path) -> dict[str, dict[str, float]]:
    """dtype -> `survived`, the share of the update along its own direction that is left
    (`training/apply.py`), and `changed`, the share of the targeted weights that differ from the
    base's in that type.

    Args:
        base, adapter: folders, as `training.merge.merge_checkpoint` takes them.

    Raises:
        MissingInputError, CorruptFileError, MergeError: as there, but for what rounding takes.
    """
    source, lora = Checkpoint.open(base), Adapter.open(adapter)
    sizes = {module: a[1] * b[0] for module, (a, b) in lora.shapes.items()}
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, TensorFile(source.files()["moshi"]) as weights:
        for name, dtype in DTYPES.items():
            plan = make_plan(source, weights, list(lora.shapes), dtype)
            check_plan(source, lora, plan)
            changes = apply_plan(weights, lora, plan, Path(folder) / name).changes
            changed = math.fsum(one.changed * sizes[one.module] for one in changes)
            found[name] = {
                "survived": survived_share(changes),
                "changed": changed / sum(sizes[one.module] for one in changes),
            }
    return found
