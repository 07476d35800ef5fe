"""How much a stranger may take: connections, and time to say who they are.

aiohttp waits forever for the first request of a connection, so a few hundred that send a header a
minute (slowloris) would use up the process' files. Here who has not shown what the server asks for
has `HEADER_S` for that; of more than `max_strangers` the oldest goes. Who has is not counted.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from pipeline.serving.counts import Counts

HEADER_S = 10.0
KEEPALIVE_S = 15.0


@dataclass(frozen=True)
class Limits:
    """What one client may take.

    max_strangers: connections that have not shown what the server asks for.
    session_s: the longest conversation; idle_s: without audio from the user; stall_s: how long a
        client may leave unread what it is sent.
    roll: go on where the model's context ends, the oldest frames and the prompt dropping out.
    """

    max_strangers: int = 64
    session_s: float = 1800
    idle_s: float = 60
    stall_s: float = 10
    roll: bool = False


class ConnectionGuard:
    """Counts the connections of a server and drops strangers that are too many, or say nothing.

    Args:
        server: aiohttp's, once its runner is set up.
    """

    def __init__(self, server: web.Server, limits: Limits, counts: Counts):
        self._limits, self._counts = limits, counts
        self._made, self._lost = server.connection_made, server.connection_lost
        server.connection_made = self.connection_made  # pyright: ignore[reportAttributeAccessIssue]
        server.connection_lost = self.connection_lost  # pyright: ignore[reportAttributeAccessIssue]
        # By handler, the oldest first: what drops them.
        self._strangers: dict[Any, asyncio.TimerHandle] = {}
        self._transports: dict[Any, asyncio.Transport] = {}

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        self._made(handler, transport)
        self._counts.connections.inc()
        loop = asyncio.get_running_loop()
        self._transports[handler] = transport
        self._strangers[handler] = loop.call_later(HEADER_S, self._drop, handler, "silent")
        if len(self._strangers) > self._limits.max_strangers:
            oldest = next(iter(self._strangers))
            loop.call_soon(self._drop, oldest, "too many")

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        self._counts.connections.dec()
        self._transports.pop(handler, None)
        self._forget(handler)
        self._lost(handler, exc)

    def known(self, handler: Any) -> None:
        """A request has shown what the server asks for."""
        self._forget(handler)

    def _forget(self, handler: Any) -> None:
        timer = self._strangers.pop(handler, None)
        if timer is not None:
            timer.cancel()

    def _drop(self, handler: Any, why: str) -> None:
        if handler in self._strangers:
            self._forget(handler)
            self._counts.refused.labels(why).inc()
            self._transports[handler].abort()
