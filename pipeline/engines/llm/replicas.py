"""One model behind several addresses, such as several vLLM servers: in turn, past those that fail.

Each request goes to the next address. Where that refuses it for now and bills nothing (it cannot
be reached, or answers 429 or 5xx), the others are asked at once; only when all did is it a failure
of the endpoint, which `Client` waits for. One that cannot be reached is passed over for a while.
Which address answered enters neither a key nor the log of exchanges.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from pipeline.engines.llm.wire import Failure, Whole, Wire

REST_S = 30.0  # of an address that could not be reached


class Replicas:
    """As `Wire`, over several of them. Thread-safe."""

    def __init__(self, wires: Sequence[Wire]):
        assert wires, "an endpoint has an address"
        self._wires = tuple(wires)
        self._turn = 0
        self._resting_until_s = [0.0] * len(self._wires)  # monotonic
        self._lock = threading.Lock()

    def connect(self) -> None:
        for wire in self._wires:
            wire.connect()

    def close(self) -> None:
        for wire in self._wires:
            wire.close()

    def post(self, body: dict[str, Any]) -> Whole | Failure:
        """Send a request to one address after the other, until one takes it."""
        outcome: Whole | Failure | None = None
        for index in self._order():
            outcome = self._wires[index].post(body)
            if isinstance(outcome, Whole) or outcome.kind != "retry" or outcome.billed is not False:
                return outcome
            if outcome.reason == "unreachable":
                with self._lock:
                    self._resting_until_s[index] = time.monotonic() + REST_S
        assert outcome is not None
        return outcome

    def _order(self) -> list[int]:
        """From the next one on; those that rest come last, for when no other takes it."""
        count = len(self._wires)
        with self._lock:
            first, now = self._turn, time.monotonic()
            self._turn = (first + 1) % count
            order = [(first + step) % count for step in range(count)]
            return sorted(order, key=lambda index: self._resting_until_s[index] > now)
