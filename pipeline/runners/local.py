"""Brings a stage to its manifest: what is done already, what can be adopted, the rest worked off.

A finished task is in the ledger before the next outcome is taken. A rejected task is noted and the
stage goes on; a transient failure leaves its task undone and the stage ends without its
manifest, so that the next run tries again.
"""

from __future__ import annotations

import errno
import json
import platform
import socket
import subprocess
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from duplex.base import canonical_json
from duplex.datafiles import CHECKOUT
from duplex.errors import BudgetError, RecordError, StageFailedError, TransientError
from duplex.files import append_line, read_lines, write_atomic
from duplex.records import parse_record, record_line
from duplex.sinks import FileWriter
from duplex.stage import MapStage, StageContext, Task, WholeStage
from duplex.store import LedgerEntry, StageFolder, folders_of, outlives
from pipeline.runners.work import LOCAL, Outcome, Runner, at_work

TRANSIENT_LIMIT = 5  # transient failures in a row after which a stage gives up for now
SENT_BACK = "sent_back.jsonl"  # a line for each review that sent something back
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
    runner: Runner = LOCAL,
) -> dict[str, Any]:
    """Bring a stage to its manifest, and return it.

    Args:
        runner: makes outcomes of a map stage's tasks; what becomes of them is decided here.

    Raises:
        StageFailedError: too many rejects, or tasks left undone by transient failures.
        WorkError: what a whole stage raised.
    """
    started = time.monotonic()
    context = replace(context, folder=folder)
    folder.reopen()
    if isinstance(stage, WholeStage):
        lines, files, counts, extra = _run_whole(stage, context, folder)
    else:
        lines, files, counts, extra = _run_map(stage, context, folder, retry_rejected, runner)
        _write_page(stage, context, folder)
    provenance = describe_environment(context) | extra
    provenance["seconds"] = round(time.monotonic() - started, 3)
    return folder.complete(lines, files=files, counts=counts, provenance=provenance)


def _write_page(stage: MapStage, context: StageContext, folder: StageFolder) -> None:
    page = stage.page(folder, context)
    if page is not None:
        write_atomic(folder.path / "index.html", page.encode())


def _run_whole(
    stage: WholeStage, context: StageContext, folder: StageFolder
) -> tuple[list[str], list[dict[str, Any]], dict[str, int], dict[str, Any]]:
    writer = FileWriter(folder)
    records = stage.run(context, writer)
    return [record_line(r) for r in records], writer.files, {"records": len(records)}, {}


def _run_map(
    stage: MapStage,
    context: StageContext,
    folder: StageFolder,
    retry_rejected: bool,
    runner: Runner,
) -> tuple[list[str], list[dict[str, Any]], dict[str, int], dict[str, Any]]:
    tasks = sorted(stage.tasks(context), key=lambda task: task.id)
    _check_ids(stage, tasks)
    book = _Book(stage, context, folder, tasks)
    wanted = {task.id: book.key(task.id) for task in book.pending() if task.attempt == 0}
    adopted = _adopt(stage, folder, wanted, book.done)
    if retry_rejected:
        book.retry_rejected()
    made = 0
    with at_work(stage, context) as begin:
        while True:
            if pending := book.pending():
                results = runner.outcomes(stage, context, folder, pending, begin)
                made += _work_off(stage, results, len(pending), folder, book)
            if book.undone:
                raise StageFailedError(
                    f"{stage.name}: {len(book.undone)} of {len(tasks)} tasks could not be done for "
                    "now; the others are kept. Run again to go on. The last failure: "
                    f"{book.undone[-1]}"
                )
            if not book.send_back():
                break
    done, rejected = book.done, book.rejected
    limit = context.config.section(stage.name).runtime.max_reject_rate
    if tasks and len(rejected) > limit * len(tasks):
        first = next(iter(rejected.values()))
        _write_page(stage, context, folder)  # which is where the reasons can be read
        raise StageFailedError(
            f"{stage.name}: at most {limit:.0%} of its tasks may be rejected, found "
            f"{len(rejected)} of {len(tasks)}: {len(rejected)} are missing, the others are kept. "
            f"See {folder.path / 'rejected.jsonl'}; the first: {first['task']}: "
            f"{first['message']} Mend the cause, then run with --retry-rejected: "
            f"{book.what_a_retry_does()}"
        )
    counts = {
        "tasks": len(tasks),
        "records": sum(len(entry.lines) for entry in done.values()),
        "rejected": len(rejected),
    }
    lines = [line for entry in done.values() for line in entry.lines]
    notes = stage.notes(folder) | runner.notes()
    return lines, [], counts, {"adopted": adopted, "made": made} | notes


class _Book:
    """Which tasks are done, rejected, or to be made again, and at which attempt each is.

    A ledger line counts when its key is that of one of its task's attempts. Another folder's
    are adopted at attempt 0 only: what was sent back there may be welcome here.
    A stage that reviews gives a task `max_attempts`, and as many again for each time that it is
    retried: the attempt of a reject is noted with it, and the retry starts at the next one.
    """

    def __init__(
        self, stage: MapStage, context: StageContext, folder: StageFolder, tasks: list[Task]
    ):
        self._stage, self._context, self._folder = stage, context, folder
        self._reviews = type(stage).review is not MapStage.review
        self.tasks = {task.id: task for task in tasks}
        self._keys: dict[str, list[str]] = {task.id: [] for task in tasks}
        self.undone: list[str] = []
        self.done: dict[str, LedgerEntry] = {}
        self.rejected: dict[str, dict[str, Any]] = {}
        ledger, sent_back = folder.ledger(), self._sent_back()
        rejects = folder.rejected()
        self._first = {  # attempt from which `max_attempts` are counted
            task_id: int(rejects[task_id].get("attempt", 0)) + 1 if task_id in rejects else 0
            for task_id in self.tasks
        }
        for task_id in self.tasks:
            entry, fault = ledger.get(task_id), rejects.get(task_id)
            made = self._attempt_of(task_id, entry.key) if entry else None
            failed = self._attempt_of(task_id, fault["key"]) if fault and "key" in fault else None
            wanted = sent_back.get(task_id, 0)
            self._set_attempt(task_id, wanted)
            if fault and failed is not None and (made is None or outlives(fault, entry)):
                if failed >= wanted:
                    self.rejected[task_id] = fault
                    self._set_attempt(task_id, failed)
            elif entry and made is not None and made >= wanted and folder.holds_blobs(entry):
                self.done[task_id] = entry
                self._set_attempt(task_id, made)

    def key(self, task_id: str, attempt: int | None = None) -> str:
        """The record key at an attempt, its present one unless told otherwise."""
        attempt = self.tasks[task_id].attempt if attempt is None else attempt
        keys = self._keys[task_id]
        while len(keys) <= attempt:
            task = replace(self.tasks[task_id], attempt=len(keys))
            keys.append(self._stage.record_key(self._context.config, task))
        return keys[attempt]

    def pending(self) -> list[Task]:
        return [
            task
            for task in self.tasks.values()
            if task.id not in self.done and task.id not in self.rejected
        ]

    def reject(self, task_id: str, error: Exception, *, reviewed: bool = False) -> None:
        attempt = self.tasks[task_id].attempt
        self._folder.reject_task(
            task_id, self.key(task_id), error, attempt=attempt, reviewed=reviewed
        )
        self.rejected[task_id] = {"task": task_id, "message": str(error)}

    def retry_rejected(self) -> None:
        """Make the rejected ones pending again; where the stage reviews, as another attempt."""
        for task_id in self.rejected:
            if self._reviews:
                self._set_attempt(task_id, self.tasks[task_id].attempt + 1)
                self._first[task_id] = self.tasks[task_id].attempt
        self.rejected = {}

    def what_a_retry_does(self) -> str:
        what = "with other seeds" if self._reviews else "from the same seeds"
        return f"those {len(self.rejected)} are made again, {what}, and nothing else."

    def send_back(self) -> bool:
        """Ask the stage for its review; whether something has to be made again."""
        if not self._reviews:
            return False
        finished = [
            (task_id, [parse_record(json.loads(line)) for line in self.done[task_id].lines])
            for task_id in sorted(self.done)
        ]
        faults = self._stage.review(finished, self._context)
        again: dict[str, int] = {}
        given_up: dict[str, str] = {}
        for task_id, reason in sorted(faults.items()):
            attempt = self.tasks[task_id].attempt + 1
            if attempt >= self._last(task_id):
                given_up[task_id] = f"{reason} It was made {attempt} times."
            else:
                again[task_id] = attempt
        if faults:
            line = canonical_json({"again": again, "given_up": given_up})
            append_line(self._folder.path / SENT_BACK, line)
        for task_id, reason in given_up.items():
            self.reject(task_id, RecordError(reason), reviewed=True)
        for task_id, attempt in again.items():
            self._set_attempt(task_id, attempt)
        for task_id in faults:
            del self.done[task_id]
        return bool(faults)

    def _sent_back(self) -> dict[str, int]:
        """The attempt at which each task is that a review sent back. What the last one gave up
        is rejected, if a kill came in between."""
        attempts: dict[str, int] = {}
        lines = list(read_lines(self._folder.path / SENT_BACK)) if self._reviews else []
        for line in lines:
            attempts |= {t: n for t, n in line["again"].items() if t in self.tasks}
        rejected = self._folder.rejected()
        for task_id, reason in lines[-1]["given_up"].items() if lines else ():
            attempt = attempts.get(task_id, 0)
            noted = rejected.get(task_id, {}).get("attempt", -1)
            if task_id in self.tasks and noted < attempt:
                self._set_attempt(task_id, attempt)
                self.reject(task_id, RecordError(reason), reviewed=True)
        self.rejected = {}  # they are read with the others
        return attempts

    def _last(self, task_id: str) -> int:
        return self._first[task_id] + (self._stage.max_attempts if self._reviews else 1)

    def _attempt_of(self, task_id: str, key: str) -> int | None:
        """The attempt that a key belongs to; most are the first, so the others come later."""
        attempts = range(self._last(task_id))
        return next((number for number in attempts if self.key(task_id, number) == key), None)

    def _set_attempt(self, task_id: str, attempt: int) -> None:
        self.tasks[task_id] = replace(self.tasks[task_id], attempt=attempt)


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
    results: Generator[Outcome, None, None],
    total: int,
    folder: StageFolder,
    book: _Book,
) -> int:
    made = transient_in_a_row = 0
    with closing(_kept(results, book)) as kept:
        for outcome in _progress(stage.name, kept, total):
            task_id = outcome.task_id
            if isinstance(outcome.error, TransientError):
                book.undone.append(f"{task_id}: {outcome.error}")
                transient_in_a_row += 1
                if transient_in_a_row >= TRANSIENT_LIMIT:
                    break
                continue
            if outcome.error is not None:
                book.reject(task_id, outcome.error)
                continue
            transient_in_a_row = 0
            entry = LedgerEntry(
                task_id, book.key(task_id), outcome.lines, outcome.blobs, outcome.seconds,
                attempt=book.tasks[task_id].attempt,
            )  # fmt: skip
            folder.finish_task(entry)
            book.done[task_id] = entry
            made += 1
    return made


def _kept(results: Iterator[Outcome], book: _Book) -> Generator[Outcome, None, None]:
    """The outcomes; a budget that ends them says how far they came."""
    try:
        yield from results
    except BudgetError as error:
        done = f"Kept: {len(book.done)} of {len(book.tasks)} tasks."
        raise BudgetError(f"{error} {done}") from None


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
