"""Tasks -> outcomes, in this process or in several.

A stage that takes workers gets processes of its own making: each runs `setup` once, then one
task after the other. Records depend on the task alone, so the outcomes are the same however
many there are; only their order differs, and the store sorts.

Spawned, not forked: a forked torch deadlocks. On Linux a worker dies with its parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any, Protocol

from duplex.errors import (
    CorruptFileError,
    DuplexError,
    RecordError,
    StageFailedError,
    TransientError,
)
from duplex.records import record_line
from duplex.sinks import FolderBlobs
from duplex.stage import MapStage, StageContext, Task, record_seed
from duplex.store import StageFolder

TASKS_PER_WORKER = 16  # fewer do not repay a process's start: 5 s with torch and moshi


@dataclass(frozen=True)
class Outcome:
    """What became of a task: record lines and blob names, or the error that ended it."""

    task_id: str
    lines: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()
    seconds: float = 0.0
    error: Exception | None = field(default=None)


class Runner(Protocol):
    """Who makes outcomes of tasks, as `LocalRunner` does. `notes`: for provenance."""

    def outcomes(
        self,
        stage: MapStage,
        context: StageContext,
        folder: StageFolder,
        tasks: list[Task],
        begin: Callable[[], None],
    ) -> Generator[Outcome, None, None]: ...

    def notes(self) -> dict[str, Any]: ...


@contextmanager
def at_work(stage: MapStage, context: StageContext) -> Iterator[Callable[[], None]]:
    """Gives what sets the stage up, once, however often it is asked to; closes the stage at the
    end if it was."""
    begun = False

    def begin() -> None:
        nonlocal begun
        if not begun:
            begun = True
            stage.setup(context)

    try:
        yield begin
    finally:
        if begun:
            stage.close()


class LocalRunner:
    """On this machine: in this process, its threads, or processes of its own."""

    def outcomes(
        self,
        stage: MapStage,
        context: StageContext,
        folder: StageFolder,
        tasks: list[Task],
        begin: Callable[[], None],
    ) -> Generator[Outcome, None, None]:
        """One outcome a task, as they come. Closing the iterator gives up what is left.

        Args:
            begin: sets the stage up in this process, unless it is (`at_work`).

        Raises:
            StageFailedError: a worker process died.
        """
        count = num_workers(stage, context, len(tasks))
        if count > 1:
            yield from _in_processes(stage, context, folder, tasks, count)
            return
        begin()
        threads = min(stage.threads(context.config), len(tasks))
        if threads > 1:
            yield from _in_threads(stage, context, folder, tasks, threads)
            return
        for task in tasks:
            yield work_off(stage, context, folder, task)

    def notes(self) -> dict[str, Any]:
        return {}


LOCAL = LocalRunner()


def _in_threads(
    stage: MapStage, context: StageContext, folder: StageFolder, tasks: list[Task], count: int
) -> Generator[Outcome, None, None]:
    """As `LocalRunner.outcomes`. A task is begun only when another one is done; after an error none
    is, and those under way are finished before it is raised: they may have been paid for. When it
    is closed or interrupted the stage is told, so that they begin nothing more that costs."""
    waiting = iter(tasks)
    failure: BaseException | None = None
    with ThreadPoolExecutor(count, thread_name_prefix=stage.name) as pool:

        def begin() -> set[Future[Outcome]]:
            task = next(waiting, None) if failure is None else None
            return {pool.submit(work_off, stage, context, folder, task)} if task else set()

        running: set[Future[Outcome]] = set()
        try:
            for _ in range(count):
                running |= begin()
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    error = future.exception()
                    if error is not None:
                        failure = failure or error
                        continue
                    yield future.result()
                    running |= begin()
        except BaseException:  # closed, or a signal; the pool waits for what is under way
            stage.stop()
            raise
    if failure is not None:
        raise failure


def num_workers(stage: MapStage, context: StageContext, num_tasks: int) -> int:
    """As many as the config says; unsaid, one for each core that has enough to do."""
    if num_tasks < 2 or not stage.takes_workers(context.config):
        return 1
    wanted = context.config.section(stage.name).runtime.workers
    if wanted is None:
        wanted = min(num_cores(), num_tasks // TASKS_PER_WORKER)
    return max(1, min(wanted, num_tasks))


def num_cores() -> int:
    """Cores that this process may use, which a container or an affinity mask may limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def work_off(stage: MapStage, context: StageContext, folder: StageFolder, task: Task) -> Outcome:
    """Process one task. Errors of the task are its outcome; all others are raised."""
    blobs = FolderBlobs(folder)
    started = time.monotonic()
    try:
        seed = record_seed(context.config.seed, stage.name, task.id, task.attempt)
        records = stage.process(task, seed, blobs)
    except (RecordError, CorruptFileError, TransientError) as error:
        return Outcome(task.id, error=error)
    return Outcome(
        task.id,
        lines=tuple(record_line(record) for record in records),
        blobs=tuple(dict.fromkeys(blobs.names)),
        seconds=time.monotonic() - started,
    )


# -- processes

_worker: dict[str, Any] = {}


def _in_processes(
    stage: MapStage, context: StageContext, folder: StageFolder, tasks: list[Task], count: int
) -> Generator[Outcome, None, None]:
    stage.prepare(context)
    # Reports of workers would interleave; what they have to say is in their outcomes.
    quiet = replace(context, report=_say_nothing)
    pool = ProcessPoolExecutor(
        count,
        mp_context=get_context("spawn"),
        initializer=_begin_worker,
        initargs=(type(stage), quiet, folder, os.getpid()),
    )
    futures: list[Future[Outcome]] = []
    try:
        futures = [pool.submit(_work_off_in_worker, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise StageFailedError(
            f"{stage.name}: its {count} worker processes must stay alive, one ended (out of "
            f"memory, perhaps). What is finished is kept: run again with --workers {count // 2}."
        ) from None
    finally:
        for future in futures:
            future.cancel()
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(
    stage_type: type[MapStage], context: StageContext, folder: StageFolder, parent: int
) -> None:
    _die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    stage = stage_type()
    try:
        stage.setup(context)
    except DuplexError as error:  # raised here it would only be a broken pool
        _worker["error"] = error
    except Exception as error:  # noqa: BLE001 - whatever it is, its message must come through
        _worker["error"] = StageFailedError(
            f"{stage.name}: a worker must be able to start, it raised {type(error).__name__}: "
            f"{error}"
        )
    _worker.update(stage=stage, context=context, folder=folder)


def _work_off_in_worker(task: Task) -> Outcome:
    if "error" in _worker:
        raise _worker["error"]
    return work_off(_worker["stage"], _worker["context"], _worker["folder"], task)


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)


def _say_nothing(_: str) -> None:
    pass
