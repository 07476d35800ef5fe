"""`duplex status`: where each stage of a run stands, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duplex.config import Config
from duplex.lock import is_locked
from duplex.store import MANIFEST, StageFolder, folders_of
from pipeline.run import Step, plan, run_folder_of


def stage_rows(config: Config, runs_root: Path) -> list[dict[str, Any]]:
    """A row for each stage: name, state, counts, rejects, seconds, folder.

    States: `done`; `stale` (complete for other inputs or settings); `running` (the lock is
    held and this is the first stage with work begun); `failed` (its last attempt said why);
    `missing`.
    """
    running = is_locked(run_folder_of(config, runs_root))
    rows = []
    for step in plan(config, runs_root):
        row = _row(step, config, runs_root)
        if running and row["state"] in ("missing", "failed", "stale") and step.folder:
            row["state"], running = "running", False
        rows.append(row)
    return rows


def _row(step: Step, config: Config, runs_root: Path) -> dict[str, Any]:
    row: dict[str, Any] = {
        "number": step.stage.number,
        "name": step.stage.name,
        "state": "missing",
        "counts": {},
        "rejects": 0,
        "seconds": None,
        "folder": None,
        "message": None,
    }
    folder = step.folder
    if folder is not None and folder.path.is_dir():
        row["folder"] = str(folder.path)
    if step.done and folder is not None:
        manifest = folder.manifest()
        assert manifest is not None
        row["state"] = "done"
        row["counts"] = manifest["counts"]
        row["rejects"] = manifest["counts"].get("rejected", 0)
        row["seconds"] = manifest["provenance"].get("seconds")
        row["imported"] = step.imported
        return row
    if folder is not None and folder.path.is_dir():
        row["counts"] = {"finished": folder.num_finished()}
        row["rejects"] = len(folder.rejected())
        row["message"] = folder.failure()
        row["state"] = "failed" if row["message"] else "missing"
        if row["message"]:
            return row
    if complete_folders(config, runs_root, step):
        row["state"] = "stale"
    return row


def complete_folders(config: Config, runs_root: Path, step: Step) -> list[StageFolder]:
    """This stage's complete folders in the run, of whatever key."""
    found = folders_of(run_folder_of(config, runs_root), step.stage.number, step.stage.name)
    return [folder for folder in found if (folder.path / MANIFEST).exists()]
