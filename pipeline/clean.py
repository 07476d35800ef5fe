"""`duplex clean`: removes stage folders that no given config needs, largest first."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from duplex.config import Config
from duplex.lock import RunLock
from duplex.store import folders_of
from pipeline.run import STAGES, plan, run_folder_of


@dataclass(frozen=True)
class Removal:
    path: Path
    num_bytes: int


def plan_removals(config: Config, runs_root: Path) -> list[Removal]:
    """Folders of this run that the config's plan does not use, largest first.

    A folder stays while its stage has not been done under the current config: what it
    finished may still be adopted. Bytes are those that would be freed: a blob that another
    folder links to frees nothing.
    """
    run_folder = run_folder_of(config, runs_root)
    steps = {step.stage.name: step for step in plan(config, runs_root)}
    removals = []
    for stage in STAGES:
        step = steps[stage.name]
        if not step.done or step.folder is None:
            continue
        for folder in folders_of(run_folder, stage.number, stage.name):
            if folder.path != step.folder.path:
                removals.append(Removal(folder.path, freed_bytes(folder.path)))
    return sorted(removals, key=lambda removal: -removal.num_bytes)


def freed_bytes(folder: Path) -> int:
    stats = [path.lstat() for path in folder.rglob("*") if path.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def remove(removals: list[Removal], config: Config, runs_root: Path) -> None:
    """Remove what was planned, under the run's lock."""
    with RunLock(run_folder_of(config, runs_root)):
        for removal in removals:
            # The manifest goes first: a kill in between leaves no folder that looks complete.
            (removal.path / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(removal.path)
