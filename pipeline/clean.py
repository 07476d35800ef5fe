"""`duplex clean`: removes stage folders that no given config needs, largest first; with them
what kills left behind, and codes and utterances that nobody has used for long.

Replies that were paid for stay: a folder's log of them moves to `<run>/exchanges/`, where later
runs look for replies and for what was spent.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from duplex.config import Config
from duplex.lock import RunLock
from duplex.store import folders_of
from pipeline.engines.llm.exchanges import FILE as EXCHANGES
from pipeline.engines.llm.exchanges import keep_log
from pipeline.engines.utterance_store import FOLDER as UTTERANCES
from pipeline.engines.utterance_store import SUFFIX
from pipeline.run import STAGES, plan, run_folder_of
from pipeline.tensors import CACHE_FOLDER

HOUR_S = 3600
CACHE_DAYS = 30


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
    return sorted([*removals, *_leftovers(config, runs_root)], key=lambda r: -r.num_bytes)


def _leftovers(config: Config, runs_root: Path) -> Iterator[Removal]:
    """What kills left half-written; codes and utterances that no run has asked for in a month."""
    now = time.time()
    run_folder, cache = run_folder_of(config, runs_root), runs_root / CACHE_FOLDER
    speech = runs_root / UTTERANCES
    for folder, pattern, age_s in (
        (run_folder, "*.tmp", HOUR_S),
        (cache, "*.tmp", HOUR_S),
        (cache, "*.codes", CACHE_DAYS * 24 * HOUR_S),
        (speech, "*.tmp", HOUR_S),
        (speech, f"*{SUFFIX}", CACHE_DAYS * 24 * HOUR_S),
    ):
        for path in folder.rglob(pattern) if folder.is_dir() else ():
            stat = path.lstat()
            if path.is_file() and now - stat.st_mtime > age_s:
                yield Removal(path, stat.st_size)


def freed_bytes(folder: Path) -> int:
    """Without the log of paid replies, which stays."""
    paths = (path for path in folder.rglob("*") if path != folder / EXCHANGES)
    stats = [path.lstat() for path in paths if path.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def remove(removals: list[Removal], config: Config, runs_root: Path) -> None:
    """Remove what was planned, under the run's lock."""
    with RunLock(run_folder_of(config, runs_root)):
        for removal in removals:
            if removal.path.is_file():
                removal.path.unlink()
                continue
            # The manifest goes first: a kill in between leaves no folder that looks complete.
            (removal.path / "manifest.json").unlink(missing_ok=True)
            keep_log(removal.path)
            shutil.rmtree(removal.path)
