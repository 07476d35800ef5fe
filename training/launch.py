"""Starts the processes of one training run on this machine, and ends them together.

Each gets its place in the environment (RANK, WORLD_SIZE, MASTER_ADDR …, as torch.distributed
reads it), what to do as JSON on its standard input, so that no secret of a config is written
down, and answers in JSON lines on its standard output:

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
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from duplex import errors
from duplex.datafiles import CHECKOUT
from duplex.errors import DuplexError, WorkError
from duplex.lock import LOCK_FD_VARIABLE

TRAINING_ADVICE = (
    "The last checkpoint is kept: run again to go on from it. Signal 9 that nobody sent is most "
    "often the system short of memory: a smaller batch, shorter crops or a higher train.accumulate "
    "take less."
)
GRACE_S = 5.0  # for the others to say what they know, once one has ended badly
LOOPBACK = "127.0.0.1"
_PR_SET_PDEATHSIG = 1


def run_workers(
    module: str,
    job: dict[str, Any],
    processes: int,
    report: Callable[[str], None] = lambda line: None,
    advice: str = TRAINING_ADVICE,
) -> dict[str, Any]:
    """Run `python -m module` in `processes` processes; returns the first rank's result.

    Args:
        advice: what to do when one died.

    Raises:
        DuplexError: what a rank raised, of its own class.
        WorkError: a rank died without a word; names it and its signal or exit code.
    """
    port = _free_port()
    workers = [_start(module, rank, processes, port) for rank in range(processes)]
    answers: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    for rank, worker in enumerate(workers):
        threading.Thread(target=_listen, args=(rank, worker, answers), daemon=True).start()
    try:
        for worker in workers:
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.write(json.dumps(job))
                worker.stdin.close()
        return _follow(workers, answers, report, advice)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()


def _follow(
    workers: list[subprocess.Popen[str]],
    answers: queue.Queue[tuple[int, dict[str, Any] | None]],
    report: Callable[[str], None],
    advice: str,
) -> dict[str, Any]:
    result: dict[str, Any] | None = None
    faults: list[tuple[int, int, str, str]] = []  # (rank of the cause, rank, class, message)
    running = set(range(len(workers)))
    deadline: float | None = None
    while running:
        wait_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            rank, answer = answers.get(timeout=wait_s)
        except queue.Empty:
            break
        if answer is None:
            running.discard(rank)
            code = workers[rank].wait()
            if code and not any(fault[1] == rank for fault in faults):
                faults.append(
                    (1, rank, "WorkError", _describe_death(rank, len(workers), code, advice))
                )
        elif "report" in answer and rank == 0:
            report(answer["report"])
        elif "result" in answer and rank == 0:
            result = answer["result"]
        elif "error" in answer:
            known = _error_class(answer["error"]) is not None
            # A rank that lost its neighbour says so too; the neighbour's own word comes first.
            faults.append((0 if known else 2, rank, answer["error"], answer["message"]))
        if faults and deadline is None:
            deadline = time.monotonic() + GRACE_S
        if faults and min(faults)[0] == 0:
            break
    if faults:
        _, rank, name, message = min(faults)
        kind = _error_class(name)
        if kind is not None:
            raise kind(message)
        raise WorkError(f"rank {rank} of {len(workers)} failed: {name}: {message}")
    if result is None:
        raise WorkError("the first of the processes must give a result, found none.")
    return result


def _error_class(name: str) -> type[DuplexError] | None:
    """One of `duplex/errors.py` by its name."""
    kind = getattr(errors, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, DuplexError) else None


def _describe_death(rank: int, processes: int, code: int, advice: str) -> str:
    how = f"exit code {code}"
    if code < 0:
        how = f"signal {-code} ({signal.Signals(-code).name})"
    return (
        f"all {processes} processes must live until the end, found rank {rank} dead by {how}; the "
        f"others were stopped. {advice}"
    )


def _start(module: str, rank: int, processes: int, port: int) -> subprocess.Popen[str]:
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # a host's name need not lead anywhere
    environment |= os.environ
    environment |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(
            [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }  # fmt: skip
    environment.pop(LOCK_FD_VARIABLE, None)  # the parent holds the lock, and outlives them
    return subprocess.Popen(
        [sys.executable, "-m", module],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _listen(
    rank: int,
    worker: subprocess.Popen[str],
    answers: queue.Queue[tuple[int, dict[str, Any] | None]],
) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        with contextlib.suppress(ValueError):
            answers.put((rank, json.loads(line)))
    answers.put((rank, None))


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind((LOOPBACK, 0))
        return trial.getsockname()[1]


# -- in a worker


def work(do: Callable[[dict[str, Any], Callable[[str], None]], dict[str, Any]]) -> None:
    """The life of one worker: read the job, do it, answer, end the process.

    Args:
        do: job, report -> result.
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
