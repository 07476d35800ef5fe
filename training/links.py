"""Connections between the nodes of a training run (`nodes.py`), and where its processes are."""

from __future__ import annotations

import json
import queue
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

ALIVE_S = 5.0
SILENCE_S = 60.0  # after which a node counts as gone
LONGEST_LINE = 1 << 18  # bytes
LOOPBACK = "127.0.0.1"
KEY = "the key of the train stage"  # the claim that covers all settings and data

# ("rank", its place on this machine, what it says), ("node", its rank, what it says) and
# ("note", 0, {"note": for the screen}). None for what is said: it has ended.
Event = tuple[str, int, dict[str, Any] | None]


@dataclass(frozen=True)
class Place:
    """Where the processes of this machine are among all of them.

    host, port: of torch's store, which rank 0 opens; interface: by which the nodes reach each
    other, None: torch finds one.
    """

    here: int
    world: int
    first_rank: int = 0
    host: str = LOOPBACK
    port: int = 0
    interface: str | None = None


def free_port(host: str = "") -> int:
    with socket.socket() as trial:
        trial.bind((host, 0))
        return trial.getsockname()[1]


class Link:
    """One end of a connection between two nodes. Thread-safe for sending."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self.local_host: str = connection.getsockname()[0]

    def send(self, **message: Any) -> None:
        """To one that is gone it does nothing: whoever listens learns of that."""
        with self._sending, suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message; None: none came in time, or none that can be read will."""
        self._socket.settimeout(timeout_s)
        try:
            line = self._lines.readline(LONGEST_LINE)
            value = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    def follow(self, node: int, events: queue.Queue[Event]) -> None:
        """From now on, put what comes into `events`, and say regularly that this end is alive."""

        def listen() -> None:
            while (message := self.receive(SILENCE_S)) is not None:
                if "alive" not in message:
                    events.put(("node", node, message))
            events.put(("node", node, None))

        def beat() -> None:
            while not self._closed.wait(ALIVE_S):
                self.send(alive=True)

        for work in (listen, beat):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def interface_of(local_host: str) -> str | None:
    """The network interface that has this address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == local_host for one in addresses):
            return name
    return None


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What two nodes do not have in common, by name; `KEY` only where nothing else says it."""
    names = [n for n in (ours | theirs) if ours.get(n) != theirs.get(n)]
    return [
        f"{name} must be the same on all nodes, found {_shown(ours.get(name))} on node 0 and "
        f"{_shown(theirs.get(name))} here"
        for name in names
        if name != KEY or len(names) == 1
    ]


def _shown(value: Any) -> str:
    return printable(str(value))[:80]


def printable(text: str) -> str:
    """A stranger's text as it may be shown."""
    return "".join(char if char.isprintable() else "?" for char in text)[:400]
