"""One run at a time in a run folder.

The lock is `flock` on `<run>/.lock`: the kernel drops it when its last holder dies, however
it dies. A stage process inherits the descriptor, so a run whose parent was killed stays
locked until its orphan has ended too.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from duplex.errors import LockedError

LOCK_FD_VARIABLE = "DUPLEX_LOCK_FD"


class RunLock:
    """Holds `<run>/.lock` between `__enter__` and `__exit__`.

    Raises:
        LockedError: somebody else holds it; the message names host and process.
    """

    def __init__(self, run_folder: Path):
        self._path = run_folder / ".lock"
        self._descriptor: int | None = None

    @property
    def descriptor(self) -> int:
        assert self._descriptor is not None, "the lock is held only inside `with`"
        return self._descriptor

    def __enter__(self) -> RunLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock_soon(descriptor)
        except BlockingIOError:
            holder = describe_holder(self._path)
            os.close(descriptor)
            raise LockedError(
                f"{self._path.parent} must have one run at a time; it is held by {holder}. "
                "Wait for that run, or stop it; the lock goes with it."
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(
            descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        )
        self._descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)
        self._descriptor = None


def _lock_soon(descriptor: int) -> None:
    """Lock within half a second: `is_locked` takes the lock for a moment to look."""
    for _ in range(10):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def inherited_lock() -> bool:
    """Whether this process was started by a run that holds the lock for it."""
    name = os.environ.get(LOCK_FD_VARIABLE)
    if not name:
        return False
    try:
        os.fstat(int(name))
    except (OSError, ValueError):
        return False
    return True


def is_locked(run_folder: Path) -> bool:
    path = run_folder / ".lock"
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def describe_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
