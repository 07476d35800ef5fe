"""What the nodes of one training run must have in common, and how the first one gathers them."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from duplex.config import Config
from duplex.datafiles import CHECKOUT
from duplex.store import StageFolder
from pipeline.engines.checkpoint import model_identity
from pipeline.training_data import base_folders, keyed_section, start_files
from training.links import KEY
from training.nodes import FirstNode

PACKAGES = ("accelerate", "moshi", "numpy", "peft", "safetensors", "torch")
CODE = ("duplex", "pipeline", "training")
# Of train.runtime, what may differ: where a node is, and what the first one alone does.
OWN = frozenset(
    {"node_rank", "main_address", "join_timeout_s", "wandb", "workers", "max_reject_rate"}
)


def claims_of(config: Config, folder: StageFolder, tensors: StageFolder) -> dict[str, str]:
    """All that must be equal on each node, by the name that a message gives it. No secret, no path.

    Args:
        folder: of the train stage; its key covers settings, model and data.
    """
    section = keyed_section(config)
    section["base_data"]["folders"] = [one.digest[:12] for one in base_folders(config)]
    runtime = config.train.runtime.model_dump(mode="json", exclude=set(OWN))
    settings = _flat("train", section) | _flat("train.runtime", runtime)
    return {
        **settings,
        "seed": str(config.seed),
        "model": model_identity(config.model),
        "the adapter to go on from": ", ".join(sorted(start_files(config.train).values())),
        "the tensors' digest": tensors.digest,
        KEY: folder.key,
        "the code (the checkout's .py files)": code_digest(CHECKOUT),
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def code_digest(checkout: Path) -> str:
    """sha256 over the Python files of the packages that train, and their names."""
    state = hashlib.sha256()
    for top in CODE:
        for path in sorted((checkout / top).rglob("*.py")):
            state.update(path.relative_to(checkout).as_posix().encode() + b"\0")
            state.update(path.read_bytes() + b"\0")
    return state.hexdigest()


def first_node(
    config: Config, folder: StageFolder, tensors: StageFolder, report: Callable[[str], None]
) -> FirstNode:
    runtime = config.train.runtime
    assert runtime.main_address is not None, "the schema asks for it"
    return FirstNode(
        runtime.main_address,
        processes=config.train.processes,
        nodes=runtime.nodes,
        join_timeout_s=runtime.join_timeout_s,
        folder=folder.path.parent,  # the stage folder of other settings is another
        claims=claims_of(config, folder, tensors),
        report=report,
    )


def _flat(prefix: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix: str(value)}
    return {
        name: shown
        for key, inner in value.items()
        for name, shown in _flat(f"{prefix}.{key}", inner).items()
    }
