"""The base model as a server takes it: PersonaPlex cut to the agent's eight depth steps, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from duplex.config import ModelSection
from duplex.files import sha256_bytes
from pipeline.engines.checkpoint import (
    MODELS_FOLDER,
    Checkpoint,
    model_identity,
    resolve_checkpoint,
)
from training.depthcut import is_wide


def servable_checkpoint(
    model: ModelSection, runs_root: Path, report: Callable[[str], None] = lambda line: None
) -> Checkpoint:
    """The base model's folder; of one with sixteen depth steps a cut copy, which is kept beside
    the runs and named by its content. 7B: 15 GB.

    Raises:
        MissingInputError: the base is nowhere.
        MergeError: it cannot be cut, or there is no room.
    """
    source = resolve_checkpoint(model, runs_root)
    if not is_wide(source.config):
        return source
    # By content: a hub name without a revision may mean other weights tomorrow.
    identity = model_identity(ModelSection(base=str(source.folder)))
    folder = runs_root / MODELS_FOLDER / f"cut-{sha256_bytes(identity.encode())[:12]}"
    if not folder.is_dir():
        from training.merge import cut_checkpoint

        report(f"the base has sixteen depth steps: its agent's eight are written to {folder}")
        try:
            cut_checkpoint(source.folder, folder)
        except OSError:
            if not folder.is_dir():  # else another process made the same in the meantime
                raise
    return Checkpoint.open(folder)
