"""Whoever answers on the server's port before the server does, and leaves it when told to.

`runpod/start.sh` has runpod/ping.py answer /ping from a pod's first second. The server takes over
at the last moment, after its imports: it sends SIGTERM to the process that `VARIABLE` names and
listens as soon as the port is free, so that a health check finds nobody for some milliseconds only.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress

VARIABLE = "DUPLEX_PLACEHOLDER_PID"
LEAVES_WITHIN_S = 2.0


def is_held() -> bool:
    """Whether the port is held for us."""
    return bool(os.environ.get(VARIABLE))


def dismiss(host: str, port: int) -> None:
    """Let the placeholder go, where there is one, and wait until the port is free, or 2 s.

    A port that is still taken then is found out by whoever listens on it.
    """
    pid = os.environ.pop(VARIABLE, "")
    if not pid.isdecimal() or int(pid) <= 1:
        return
    with suppress(ProcessLookupError, PermissionError):
        os.kill(int(pid), signal.SIGTERM)
    deadline = time.monotonic() + LEAVES_WITHIN_S
    while not is_free(host, port) and time.monotonic() < deadline:
        time.sleep(0.005)


def is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError:
            return False
    return True
