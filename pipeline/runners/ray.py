"""Tasks -> outcomes, in the workers of a Ray cluster. The only module that imports Ray.

The driver, which is the stage's own process, stays the only writer of ledger, rejects, parts and
manifest (`local.py`). A worker is an actor: it runs the stage's `setup` once and then `process`
for one record after the other, writes each record's blobs under their sha256 into the stage's
folder, as a local worker does, and returns the record's lines. Keys, seeds and digests are those
of a local run.

    driver      tasks ── at most workers x in_flight sent and not answered ──► worker: setup
                ledger ◄── lines, blob names, or why it is rejected ────────── process, process …

What a worker held when it died is made again by others, one record at a time from then on. One
that so takes `max_deaths` workers with it is rejected; no other is blamed.

Every node must have the checkout at the driver's path, and see the run root there: a shared file
system. Without one, `runner.runtime.storage` is where blobs and inputs travel (`storage.py`).
What is wrong with a node is said when its first worker starts (`worker.py`).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from duplex.config import RunnerRuntime
from duplex.datafiles import CHECKOUT
from duplex.errors import DuplexError, RecordError, StageFailedError
from duplex.stage import MapStage, StageContext, Task
from duplex.store import StageFolder
from pipeline.runners.placing import (
    batch_of,
    num_workers,
    options_of,
    why_at_the_driver,
    without_secrets,
)
from pipeline.runners.storage import Storage, lend, name_of
from pipeline.runners.work import LOCAL, Outcome
from pipeline.runners.worker import Worker, revision_of

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray is imported
import ray
from ray import exceptions as ray_errors

STARTS_THAT_MAY_FAIL = 3  # in a row, before any worker was ready
SEEN_WITHIN_S = 10.0  # a network file system may be late
CLOSE_S = 10.0  # for a worker to free what its setup took
# Settings of the driver that a worker needs too. No secrets: Ray shows these to who may look.
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "WANDB_MODE", "OMP_WAIT_POLICY", "PYTHONHASHSEED")
DEAD = (
    ray_errors.RayActorError, ray_errors.WorkerCrashedError, ray_errors.OutOfMemoryError,
    ray_errors.NodeDiedError, ray_errors.ObjectLostError,
)  # fmt: skip


@dataclass
class Hand:
    """A worker as the driver knows it. `sent`: answer -> task, oldest first."""

    actor: Any
    started: Any  # the answer of `begin`
    ready: bool = False
    holds_suspect: bool = False
    sent: dict[Any, Task] = field(default_factory=dict)
    block: deque[Task] = field(default_factory=deque)  # what is left of a batch that it has begun


class RayRunner:
    def __init__(self) -> None:
        self._notes: dict[str, Any] = {}

    def outcomes(
        self,
        stage: MapStage,
        context: StageContext,
        folder: StageFolder,
        tasks: list[Task],
        begin: Callable[[], None],
    ) -> Generator[Outcome, None, None]:
        """As `LocalRunner`; a task is drawn from `tasks` when it is sent.

        Raises:
            RequestError: the cluster lacks what the config asks for.
            StageFailedError: no worker could start, a node is unfit, or the cluster is gone.
        """
        why = why_at_the_driver(stage, context.config)
        if why is not None:
            self._notes = {"name": "ray", "at_the_driver": why}
            yield from LOCAL.outcomes(stage, context, folder, tasks, begin)
            return
        stage.prepare(context)
        folder.path.mkdir(parents=True, exist_ok=True)
        settings = context.config.runner.runtime
        if settings.storage is not None:
            lend(context, settings.storage)
        with connected(settings):
            cluster = ray.cluster_resources()
            options = options_of(stage, context.config, cluster)
            count = num_workers(settings, options, cluster)
            crew = Crew(stage, context, folder, options, count, len(tasks))
            try:
                yield from crew.work(tasks)
            except ray_errors.RaySystemError as error:
                raise StageFailedError(
                    f"{stage.name}: the Ray cluster must stay up, it is gone: {_first(error)}. "
                    "What is finished is kept: run again."
                ) from None
            finally:
                self._notes = {"name": "ray", "workers": count, "deaths": crew.deaths, **options}
                crew.dismiss()

    def notes(self) -> dict[str, Any]:
        return {"runner": self._notes}


@contextmanager
def connected(settings: RunnerRuntime) -> Iterator[None]:
    """In a cluster: the one that this process is in, one that is there, or a new one."""
    if ray.is_initialized():
        yield
        return
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    variables["PYTHONPATH"] = os.pathsep.join(
        [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    try:
        ray.init(
            address=settings.address,
            runtime_env={"env_vars": variables},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ray_errors.RayError, OSError, RuntimeError, ValueError) as error:
        raise StageFailedError(
            f"a Ray cluster must answer, {settings.address or 'RAY_ADDRESS or here'} gives: "
            f"{_first(error)}. Start one (`ray start --head`), or mend runner.runtime.address"
        ) from None
    if threading.current_thread() is threading.main_thread():
        for name, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(name, handler)
    try:
        yield
    finally:
        ray.shutdown()


class Crew:
    """The workers of one stage, and which task is where."""

    def __init__(
        self,
        stage: MapStage,
        context: StageContext,
        folder: StageFolder,
        options: dict[str, float],
        count: int,
        num_tasks: int,
    ):
        self._name, self._folder, self._report = stage.name, folder, context.report
        self._count, self._due = count, num_tasks
        self._settings = context.config.runner.runtime
        spread = replace(context, config=without_secrets(context.config), report=_say_nothing)
        stored = self._settings.storage is not None
        lent = {name: name_of(one) for name, one in context.inputs.items()} if stored else {}
        self._storage = Storage(self._settings.storage) if self._settings.storage else None
        self._brief = (type(stage), spread, folder, revision_of(stage, context.config), lent)
        self._options = options | {"max_restarts": 0, "max_task_retries": 0}
        self._hands: list[Hand] = []
        self._again: deque[Task] = deque()  # of workers that died or were taken away
        self._suspects: deque[Task] = deque()  # any of them may have taken its worker along
        self._taken_along: Counter[str] = Counter()  # by task: the workers that died of it
        self._failed_starts = 0  # in a row
        self._said: set[str] = set()  # notes of workers
        self.deaths = 0

    def work(self, tasks: Iterable[Task]) -> Generator[Outcome, None, None]:
        """An outcome for each task, as they come."""
        blocks = (deque(block) for _, block in groupby(tasks, key=batch_of))
        while self._due:
            while len(self._hands) < min(self._count, self._due):
                self._hire()
            for hand in self._hands:
                while hand.ready and len(hand.sent) < self._settings.in_flight:
                    task = self._next_for(hand, blocks)
                    if task is None:
                        break
                    hand.sent[hand.actor.work.remote(task)] = task
            for outcome in self._hear(self._first_to_answer()):
                self._due -= 1
                yield outcome

    def dismiss(self) -> None:
        """Let idle workers free what they hold, then end all."""
        closing = [
            hand.actor.close.remote() for hand in self._hands if hand.ready and not hand.sent
        ]
        with suppress(ray_errors.RayError):
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S) if closing else None
        for hand in self._hands:
            ray.kill(hand.actor)
        self._hands = []

    def _hire(self) -> None:
        actor = ray.remote(Worker).options(**self._options).remote()
        self._hands.append(Hand(actor, actor.begin.remote(*self._brief)))

    def _next_for(self, hand: Hand, blocks: Iterator[deque[Task]]) -> Task | None:
        """None: there is nothing for it now. A suspect goes to a worker that holds nothing else,
        and stays alone there."""
        if self._suspects and not hand.sent:
            hand.holds_suspect = True
            return self._suspects.popleft()
        if hand.holds_suspect and hand.sent:
            return None
        hand.holds_suspect = False
        if not hand.block and self._again:
            return self._again.popleft()
        if not hand.block:
            hand.block = next(blocks, hand.block)
        return hand.block.popleft() if hand.block else None

    def _first_to_answer(self) -> Hand:
        """A worker is asked for its oldest answer: it works in the order in which it is sent to.

        Raises:
            StageFailedError: none has started in the time that it may take.
        """
        asked = {
            next(iter(hand.sent)) if hand.ready else hand.started: hand
            for hand in self._hands
            if hand.sent or not hand.ready
        }
        none_ready = not any(hand.ready for hand in self._hands)
        limit_s = self._settings.start_timeout_s if none_ready else None
        answered, _ = ray.wait(list(asked), num_returns=1, timeout=limit_s)
        if not answered:
            raise StageFailedError(
                f"{self._name}: a worker must start within {limit_s:g} s "
                f"(runner.runtime.start_timeout_s), none did. Each asks for {self._options}; the "
                f"cluster has {ray.cluster_resources()}, of which "
                f"{ray.available_resources()} are free"
            )
        return asked[answered[0]]

    def _hear(self, hand: Hand) -> Iterator[Outcome]:
        """What a worker answers: nothing yet, one outcome, or its death."""
        try:
            answer: Any = ray.get(next(iter(hand.sent)) if hand.ready else hand.started)
        except DEAD as error:
            self.deaths += 1
            self._hands.remove(hand)
            ray.kill(hand.actor)  # out of reach is not dead yet
            if hand.ready:
                taken_away = bool(getattr(error, "preempted", False))
                yield from self._mourn(hand, _cause_of(error), taken_away)
            else:
                self._count_failed_start(_cause_of(error))
            return
        if isinstance(answer, DuplexError):
            raise answer
        if not hand.ready:
            hand.ready, self._failed_starts = True, 0
            if isinstance(answer, str) and answer not in self._said:
                self._said.add(answer)
                self._report(answer)
            return
        del hand.sent[next(iter(hand.sent))]
        self._see_blobs(answer)
        yield answer

    def _mourn(self, hand: Hand, cause: str, taken_away: bool) -> Iterator[Outcome]:
        """What a dead worker held is made again. Which of several took it along cannot be known:
        an answer may have been lost with it. So each is suspected, and is made alone."""
        held = list(hand.sent.values())
        self._again.extend(hand.block)
        if taken_away or len(held) != 1:
            names = ", ".join(task.id for task in held) or "nothing"
            self._report(f"{self._name}: a worker died that held {names}: {cause}")
            (self._again if taken_away else self._suspects).extend(held)
            return
        (task,) = held
        self._taken_along[task.id] += 1
        number, limit = self._taken_along[task.id], self._settings.max_deaths
        self._report(f"{self._name}: a worker died at {task.id} ({number} of {limit}): {cause}")
        if number < limit:
            self._suspects.append(task)
            return
        yield Outcome(
            task.id,
            error=RecordError(
                f"{number} workers died while they made it and nothing else, the last one: "
                f"{cause}. Others are made; try this one by itself where there is more memory"
            ),
        )

    def _count_failed_start(self, cause: str) -> None:
        self._failed_starts += 1
        if self._failed_starts < STARTS_THAT_MAY_FAIL:
            return
        if not any(hand.ready for hand in self._hands):
            raise StageFailedError(
                f"{self._name}: a worker must be able to start, {self._failed_starts} in a row "
                f"died before they were set up, the last one: {cause}"
            )
        self._count = len(self._hands)  # go on with those that there are

    def _see_blobs(self, outcome: Outcome) -> None:
        """What a worker wrote is here, before the ledger names it.

        Raises:
            StageFailedError: it is not to be seen here.
            CorruptFileError: the storage gives something else.
        """
        for name in outcome.blobs:
            if self._storage is not None:
                self._storage.get_blob(name, self._folder.path / "blobs")
                continue
            path = self._folder.path / "blobs" / name
            deadline = time.monotonic() + SEEN_WITHIN_S
            while not path.exists():
                if time.monotonic() > deadline:
                    raise StageFailedError(
                        f"{self._name}: what a worker writes must be seen by the driver, {path} is "
                        "not here. Put the run root on a file system that all nodes share"
                    )
                time.sleep(0.1)


def _cause_of(error: Exception) -> str:
    """Why a worker died, in a line in place of Ray's many."""
    text = str(error)
    if isinstance(error, ray_errors.OutOfMemoryError) or "running low on memory" in text:
        return "Ray ended it, since its node was short of memory"
    if getattr(error, "preempted", False):
        return "its node was taken away"
    if "unexpectedly exits" in text:
        return "its process ended without a word: out of memory, killed, or a crash"
    _, found, detail = text.partition("is dead because")
    return " ".join(detail.split())[:200] if found else _first(error)


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return " ".join((lines[0] if lines else type(error).__name__).split())[:200]


def _say_nothing(_: str) -> None:
    pass
