"""Brings a stage to its manifest: what is done already, what can be adopted, the rest worked off.

A finished task is in the ledger before the next outcome is taken. A rejected task is noted and the
stage goes on; a transient failure leaves its task undone and the stage ends without its
manifest, so that the next run tries again.
"""

from __future__ import annotations

import errno
import platform
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from duplex.datafiles import CHECKOUT
from duplex.errors import StageFailedError, TransientError
from duplex.files import write_atomic
from duplex.records import record_line
from duplex.stage import MapStage, StageContext, Task, WholeStage
from duplex.store import FileWriter, LedgerEntry, StageFolder, folders_of
from pipeline.runners.work import Outcome, outcomes

TRANSIENT_LIMIT = 5  # transient failures in a row after which a stage gives up for now
RECORDED_PACKAGES = (
    "torch", "moshi", "peft", "safetensors", "numpy", "soxr", "soundfile", "espeakng-loader",
    "duplex-workbench",
)  # fmt: skip


def execute(
    stage: MapStage | WholeStage,
    context: StageContext,
    folder: StageFolder,
    *,
    retry_rejected: bool = False,
) -> dict[str, Any]:
    """Bring a stage to its manifest, and return it.

    Raises:
        StageFailedError: too many rejects, or tasks left undone by transient failures.
        WorkError: what a whole stage raised.
    """
    started = time.monotonic()
    folder.reopen()
    if isinstance(stage, WholeStage):
        lines, files, counts, extra = _run_whole(stage, context, folder)
    else:
        lines, files, counts, extra = _run_map(stage, context, folder, retry_rejected)
        page = stage.page(folder, context) if lines else None
        if page is not None:
            write_atomic(folder.path / "index.html", page.encode())
    provenance = describe_environment(context) | extra
    provenance["seconds"] = round(time.monotonic() - started, 3)
    return folder.complete(lines, files=files, counts=counts, provenance=provenance)


def _run_whole(
    stage: WholeStage, context: StageContext, folder: StageFolder
) -> tuple[list[str], list[dict[str, Any]], dict[str, int], dict[str, Any]]:
    writer = FileWriter(folder)
    records = stage.run(context, writer)
    return [record_line(r) for r in records], writer.files, {"records": len(records)}, {}


def _run_map(
    stage: MapStage, context: StageContext, folder: StageFolder, retry_rejected: bool
) -> tuple[list[str], list[dict[str, Any]], dict[str, int], dict[str, Any]]:
    tasks = sorted(stage.tasks(context), key=lambda task: task.id)
    _check_ids(stage, tasks)
    keys = {task.id: stage.record_key(context.config, task) for task in tasks}
    done = {
        entry.task_id: entry
        for entry in folder.ledger().values()
        if keys.get(entry.task_id) == entry.key and folder.holds_blobs(entry)
    }
    adopted = _adopt(stage, folder, keys, done)
    rejected = {
        task_id: fault
        for task_id, fault in folder.rejected().items()
        if keys.get(task_id) == fault.get("key") and task_id not in done
    }
    if retry_rejected:
        rejected = {}
    pending = [task for task in tasks if task.id not in done and task.id not in rejected]
    undone: list[str] = []
    made = 0
    if pending:
        made = _work_off(stage, context, folder, pending, keys, done, rejected, undone)
    if undone:
        raise StageFailedError(
            f"{stage.name}: {len(undone)} of {len(tasks)} tasks could not be done for now; "
            f"the others are kept. Run again to go on. The last failure: {undone[-1]}"
        )
    limit = context.config.section(stage.name).runtime.max_reject_rate
    if tasks and len(rejected) > limit * len(tasks):
        first = next(iter(rejected.values()))
        raise StageFailedError(
            f"{stage.name}: at most {limit:.0%} of its tasks may be rejected, found "
            f"{len(rejected)} of {len(tasks)}. See {folder.path / 'rejected.jsonl'}; the first: "
            f"{first['task']}: {first['message']} Mend the cause, then run with --retry-rejected."
        )
    counts = {
        "tasks": len(tasks),
        "records": sum(len(entry.lines) for entry in done.values()),
        "rejected": len(rejected),
    }
    lines = [line for entry in done.values() for line in entry.lines]
    return lines, [], counts, {"adopted": adopted, "made": made}


def _check_ids(stage: MapStage, tasks: list[Task]) -> None:
    ids = [task.id for task in tasks]
    assert len(ids) == len(set(ids)), f"{stage.name} gives two tasks one id"


def _adopt(
    stage: MapStage, folder: StageFolder, keys: dict[str, str], done: dict[str, LedgerEntry]
) -> int:
    """Take finished tasks of equal key from this stage's other folders; returns how many."""
    adopted = 0
    for donor in folders_of(folder.path.parent, stage.number, stage.name):
        if donor.path == folder.path or len(done) == len(keys):
            continue
        for entry in donor.ledger().values():
            wanted = keys.get(entry.task_id) == entry.key and entry.task_id not in done
            # A damaged blob must not travel by hard link from folder to folder.
            if wanted and donor.holds_blobs(entry) and donor.blobs_are_whole(entry):
                folder.adopt(donor, entry)
                done[entry.task_id] = entry
                adopted += 1
    return adopted


def _work_off(
    stage: MapStage,
    context: StageContext,
    folder: StageFolder,
    pending: list[Task],
    keys: dict[str, str],
    done: dict[str, LedgerEntry],
    rejected: dict[str, Any],
    undone: list[str],
) -> int:
    made = transient_in_a_row = 0
    with closing(outcomes(stage, context, folder, pending)) as results:
        for outcome in _progress(stage.name, results, len(pending)):
            task_id = outcome.task_id
            if isinstance(outcome.error, TransientError):
                undone.append(f"{task_id}: {outcome.error}")
                transient_in_a_row += 1
                if transient_in_a_row >= TRANSIENT_LIMIT:
                    break
                continue
            if outcome.error is not None:
                folder.reject_task(task_id, keys[task_id], outcome.error)
                rejected[task_id] = {"task": task_id, "message": str(outcome.error)}
                continue
            transient_in_a_row = 0
            entry = LedgerEntry(
                task_id, keys[task_id], outcome.lines, outcome.blobs, outcome.seconds
            )
            folder.finish_task(entry)
            done[task_id] = entry
            made += 1
    return made


def _progress(name: str, results: Iterator[Outcome], total: int) -> Iterator[Outcome]:
    """The outcomes, with a bar on a terminal; without one, the run's own lines are enough."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from results
        return
    columns = (
        TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(results, total=total, description=name)


def describe_environment(context: StageContext) -> dict[str, Any]:
    """Where and with what: times, host, commit, versions. Never part of a digest."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "commit": _git_commit(),
        "packages": versions,
        "config": context.config.name,
    }


def _git_commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def describe_os_error(error: OSError) -> str:
    """An error of the system in the words of somebody who has to act on it."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full{where}. Finished records are kept: free some space "
            "(`duplex clean CONFIG` shows what no config needs), then run again."
        )
    return f"{error.strerror or error}{where}. Finished records are kept; mend it and run again."
