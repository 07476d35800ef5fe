"""The folder of a checkpoint that is written here: what stands beside its weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from duplex.errors import MergeError
from duplex.files import write_json
from pipeline.engines.checkpoint import Checkpoint

CERTIFICATE = "certificate.json"
# Role in `Checkpoint.files` -> name in the folder.
NAMES = {
    "moshi": "model.safetensors",
    "mimi": "mimi.safetensors",
    "mimi_config": "mimi_config.json",
    "tokenizer": "tokenizer.model",
}
# Keys of PersonaPlex's config.json that moshi's loader would hand on to the model.
_UNKNOWN_TO_MOSHI = ("version",)


def write_companions(
    source: Checkpoint, folder: Path, config: dict[str, Any], weights_sha256: str
) -> None:
    """Everything but the weights: codec and tokenizer as they are, config.json by plain names."""
    files = source.files()
    for role, path in files.items():
        if role != "moshi":
            _link_or_copy(path, folder / NAMES[role])
    config = {key: value for key, value in config.items() if key not in _UNKNOWN_TO_MOSHI}
    config |= {f"{role}_name": NAMES[role] for role in files}
    config["model_id"] = {"sig": weights_sha256[:8], "epoch": 0}
    write_json(folder / "config.json", config)


def require_room(out: Path, num_bytes: int) -> None:
    """
    Raises:
        MergeError: the disk of `out` has less free than what is to be written there.
    """
    place = out.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise MergeError(
            f"{out}: the weights need {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. "
            "Nothing was written: free some space, or write to another disk, then merge again."
        )


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
