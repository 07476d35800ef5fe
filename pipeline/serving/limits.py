"""How much a stranger may take: connections, and time to say what they want.

aiohttp waits forever for the first request of a connection, so a few hundred that send a header a
minute (slowloris) would use up the process' files. Here a connection has `HEADER_S` for that, and
there are at most `max_connections`.
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
    """max_connections: of all kinds, at once. session_s: the longest conversation. idle_s: without
    audio from the user. stall_s: how long a client may leave what it is sent unread. roll: go on
    where the model's context ends, the oldest frames and the prompt with them dropping out."""

    max_connections: int = 64
    session_s: float = 1800
    idle_s: float = 60
    stall_s: float = 10
    roll: bool = False


class ConnectionGuard:
    """Counts the connections of a server and drops those that are too many, or say nothing.

    Args:
        server: aiohttp's, once its runner is set up.
    """

    def __init__(self, server: web.Server, limits: Limits, counts: Counts):
        self._server, self._limits, self._counts = server, limits, counts
        self._made, self._lost = server.connection_made, server.connection_lost
        server.connection_made = self.connection_made  # pyright: ignore[reportAttributeAccessIssue]
        server.connection_lost = self.connection_lost  # pyright: ignore[reportAttributeAccessIssue]
        self._waiting: dict[Any, asyncio.TimerHandle] = {}

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        self._made(handler, transport)
        self._counts.connections.inc()
        if len(self._server.connections) > self._limits.max_connections:
            self._counts.refused.labels("connection").inc()
            transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._waiting[handler] = loop.call_later(HEADER_S, self._drop_silent, handler, transport)

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        self._counts.connections.dec()
        self.heard(handler)
        self._lost(handler, exc)

    def heard(self, handler: Any) -> None:
        """A whole request has come: aiohttp's keep-alive time holds from now on."""
        timer = self._waiting.pop(handler, None)
        if timer is not None:
            timer.cancel()

    def _drop_silent(self, handler: Any, transport: asyncio.Transport) -> None:
        if self._waiting.pop(handler, None) is not None:
            self._counts.refused.labels("silent").inc()
            transport.abort()
