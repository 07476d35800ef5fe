"""Starts the processes of one training run on this machine, and ends them together: also with
those of other machines, which `nodes.py` finds.

Each gets its place in the environment (RANK, WORLD_SIZE, MASTER_ADDR …, as torch.distributed
reads it), what to do as JSON on its standard input, so that no secret of a config is written
down, and answers in JSON lines on its standard output:

    {"met": true}                         it has reached all others, where there are several nodes
    {"report": "…"}                       to be shown; the first rank's alone are
    {"error": "WorkError", "message": …}  why it ends
    {"result": {…}}                       of the first rank, before it ends well

A rank that ends badly ends the run: the others would wait for it for ever, or until a timeout
of many minutes. They are killed, and so are all of them when this process is (Linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from duplex import errors
from duplex.datafiles import CHECKOUT
from duplex.errors import DuplexError, WorkError
from duplex.lock import LOCK_FD_VARIABLE
from training.links import LOOPBACK, Event, Place, free_port
from training.nodes import Team

TRAINING_ADVICE = (
    "The last checkpoint is kept: run again to go on from it. Signal 9 that nobody sent is most "
    "often the system short of memory: a smaller batch, shorter crops or a higher train.accumulate "
    "take less."
)
END_S = 300.0  # for the other nodes to end, once all processes of this one have
GRACE_S = 5.0  # for the others to say what they know, once one has ended badly
MEETS = "DUPLEX_PROCESSES_MEET"
_PR_SET_PDEATHSIG = 1


def run_workers(
    module: str,
    job: dict[str, Any],
    processes: int,
    report: Callable[[str], None] = lambda line: None,
    advice: str = TRAINING_ADVICE,
    team: Team | None = None,
) -> dict[str, Any]:
    """Run `python -m module` in `processes` processes; returns the first rank's result.

    Args:
        advice: what to do when one died.
        team: the machines that share the processes, this one among them; the result is empty on
            all but the first.

    Raises:
        DuplexError: what a rank raised, of its own class.
        WorkError: a rank died without a word, or a node is gone; names it, and its signal or exit
            code.
    """
    place = team.place if team else Place(processes, processes, port=free_port(LOOPBACK))
    workers = [_start(module, place, index, meets=team is not None) for index in range(place.here)]
    events: queue.Queue[Event] = team.events if team else queue.Queue()
    for index, worker in enumerate(workers):
        threading.Thread(target=_listen, args=(index, worker, events), daemon=True).start()
    try:
        for worker in workers:
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.write(json.dumps(job))
                worker.stdin.close()
        return _Watch(workers, place, report, advice, team).follow(events)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()


@dataclass(frozen=True, order=True)
class _Fault:
    """Why a run ends. The lowest `order` is the cause: 0 an error of ours, 1 a death, 2 another
    error, which may be of a rank that lost its neighbour."""

    order: int
    place: int  # a rank; of nodes, behind all ranks
    kind: str
    message: str


class _Watch:
    """Hears what the processes here, and the other nodes, say until all have ended."""

    def __init__(
        self,
        workers: list[subprocess.Popen[str]],
        place: Place,
        report: Callable[[str], None],
        advice: str,
        team: Team | None,
    ):
        self._workers, self._place, self._team = workers, place, team
        self._report, self._advice = report, advice
        self._running = set(range(len(workers)))
        self._others = set(team.others) if team else set()
        self._unmet = set(self._running) if team else set()
        self._meet_by = time.monotonic() + (team.join_timeout_s if team else 0)
        self._end_by: float | None = None  # once all here have ended
        self._faults: list[_Fault] = []
        self._result: dict[str, Any] | None = None

    def follow(self, events: queue.Queue[Event]) -> dict[str, Any]:
        deadline: float | None = None
        while self._running or self._others:
            if not self._running and self._end_by is None:
                self._end_by = time.monotonic() + END_S
            until = deadline or (self._meet_by if self._unmet else self._end_by)
            try:
                wait_s = None if until is None else max(0.0, until - time.monotonic())
                kind, index, message = events.get(timeout=wait_s)
            except queue.Empty:
                if not self._faults:
                    said = self._describe_unmet() if self._unmet else self._describe_unended()
                    self._add(1, self._place.world, "WorkError", said)
                break
            if kind == "rank":
                self._hear_rank(index, message)
            elif kind == "node":
                self._hear_node(index, message)
            elif message is not None:
                self._report(message["note"])
            if self._faults and deadline is None:
                deadline = time.monotonic() + GRACE_S
            worst = min(self._faults).order if self._faults else None
            # Nothing better will be known once all here have ended, or of a node that is gone.
            if worst == 0 or (worst == 1 and (not self._running or kind == "node")):
                break
        if self._faults:
            cause = min(self._faults)
            known = _error_class(cause.kind)
            raise known(cause.message) if known else WorkError(cause.message)
        if self._result is None and self._place.first_rank == 0:
            raise WorkError("the first of the processes must give a result, found none.")
        return self._result or {}

    def _hear_rank(self, index: int, message: dict[str, Any] | None) -> None:
        rank = self._place.first_rank + index
        if message is None:
            self._running.discard(index)
            self._unmet.discard(index)
            code = self._workers[index].wait()
            if code and not any(fault.place == rank for fault in self._faults):
                self._add(1, rank, "WorkError", self._describe_death(rank, code))
            if not self._running and not self._faults and self._team:
                self._team.tell(done=True)
        elif "report" in message and rank == 0:
            self._report(message["report"])
        elif "met" in message:
            self._unmet.discard(index)
        elif "result" in message and rank == 0:
            self._result = message["result"]
        elif "error" in message:
            kind, text = message["error"], message["message"]
            if _error_class(kind) is None:  # its neighbour's own word comes first
                text = f"rank {rank} of {self._place.world} failed: {kind}: {text}"
                self._add(2, rank, kind, text)
            else:
                self._add(0, rank, kind, text)

    def _hear_node(self, node: int, message: dict[str, Any] | None) -> None:
        if message is None:
            if node in self._others:
                self._add(1, self._place.world + node, "WorkError", self._describe_gone(node))
        elif "done" in message:
            self._others.discard(node)
        elif "error" in message:
            order = message.get("order")
            fault = _Fault(
                order if order in (0, 1, 2) else 2,
                self._place.world + node,
                str(message["error"]),
                str(message.get("message")),
            )
            self._faults.append(fault)
            assert self._team is not None
            self._team.tell(but=node, **message)

    def _add(self, order: int, place: int, kind: str, text: str) -> None:
        self._faults.append(_Fault(order, place, kind, text))
        if self._team:  # at once: their own errors are only what follows from it
            self._team.tell(error=kind, message=text, order=order)

    def _describe_unended(self) -> str:
        names = ", ".join(f"node {node}" for node in sorted(self._others))
        return (
            f"all nodes must end within {END_S:g} s of each other, {names} did not. Look there for "
            "a process that hangs."
        )

    def _describe_death(self, rank: int, code: int) -> str:
        how = f"exit code {code}"
        if code < 0:
            how = f"signal {-code} ({signal.Signals(-code).name})"
        where = f" on node {self._team.node}" if self._team else ""
        return (
            f"all {self._place.world} processes must live until the end, found rank {rank}{where} "
            f"dead by {how}; the others were stopped. {self._advice}"
        )

    def _describe_gone(self, node: int) -> str:
        assert self._team is not None
        return (
            f"all {self._team.nodes} nodes must stay until the end, {self._team.name_of(node)} is "
            "gone: it was stopped, or the network is. The processes here were stopped. The last "
            "checkpoint is kept: start the run again on all nodes to go on from it."
        )

    def _describe_unmet(self) -> str:
        ranks = ", ".join(str(self._place.first_rank + index) for index in sorted(self._unmet))
        return (
            f"all {self._place.world} processes must reach each other within the time of "
            f"train.runtime.join_timeout_s, rank {ranks} did not. torch connects them at "
            f"{self._place.host} and at ports of its own choice: open all ports between the nodes; "
            "GLOO_SOCKET_IFNAME (CPU) or NCCL_SOCKET_IFNAME (GPU) names the network to take, now "
            f"{self._place.interface or 'its own choice'}."
        )


def _error_class(name: str) -> type[DuplexError] | None:
    """One of `duplex/errors.py` by its name."""
    kind = getattr(errors, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, DuplexError) else None


def _start(module: str, place: Place, index: int, *, meets: bool) -> subprocess.Popen[str]:
    threads = max(1, (os.cpu_count() or 1) // place.here)
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    if place.interface is not None:
        environment["GLOO_SOCKET_IFNAME"] = place.interface
    elif place.host == LOOPBACK and sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # a host's name need not lead anywhere
    environment |= os.environ
    environment |= {
        "RANK": str(place.first_rank + index), "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(place.world), "LOCAL_WORLD_SIZE": str(place.here),
        "MASTER_ADDR": place.host, "MASTER_PORT": str(place.port), MEETS: str(int(meets)),
        "PYTHONPATH": os.pathsep.join(
            [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }  # fmt: skip
    environment.pop(LOCK_FD_VARIABLE, None)  # the parent holds the lock, and outlives them
    return subprocess.Popen(
        [sys.executable, "-m", module],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _listen(index: int, worker: subprocess.Popen[str], events: queue.Queue[Event]) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        with contextlib.suppress(ValueError):
            events.put(("rank", index, json.loads(line)))
    events.put(("rank", index, None))


# -- in a worker


def work(
    do: Callable[[dict[str, Any], Callable[[str], None]], dict[str, Any]],
    meet: Callable[[dict[str, Any]], None] = lambda job: None,
) -> None:
    """The life of one worker: read the job, do it, answer, end the process.

    Args:
        do: job, report -> result.
        meet: job -> nothing; returns once all processes have reached each other. Called first
            where they are on several nodes: a port that is closed shows before a base is loaded.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that call
            os._exit(1)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not stand among the answers
    try:
        job = json.load(sys.stdin)
        if os.environ.get(MEETS) == "1":
            meet(job)
            _answer(channel, {"met": True})
        result = do(job, lambda line: _answer(channel, {"report": line}))
        _answer(channel, {"result": result})
        code = 0
    except DuplexError as error:
        _answer(channel, {"error": type(error).__name__, "message": str(error)})
        code = error.exit_code
    except BaseException as error:  # noqa: BLE001 - the parent has to hear of everything
        traceback.print_exc()
        _answer(channel, {"error": f"{type(error).__name__}", "message": str(error)})
        code = errors.EXIT_WORK_FAILED
    sys.stderr.flush()
    # Not by sys.exit: the process group's threads wait for ranks that may be gone.
    os._exit(code)


def _answer(channel: TextIO, value: dict[str, Any]) -> None:
    channel.write(json.dumps(value) + "\n")
    channel.flush()
