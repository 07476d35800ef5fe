"""Pauses that an endpoint asks for, kept by all threads; and the pause before a retry.

Read: `Retry-After` (seconds or an HTTP date), `retry-after-ms`, and `x-ratelimit-remaining-*`
with `x-ratelimit-reset-*`, whose values are durations (`1s`, `6m0s`, `120ms`), seconds, or moments
(seconds or milliseconds since 1970, ISO 8601), by server.
Without any: 0.5 s, doubled with each try, times a factor between .5 and 1 that the request's id
decides, so that threads which failed together do not come back together.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

BASE_S = 0.5
_EPOCH_S = 1e9  # larger numbers are moments: no server asks for 30 years
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """The pause that a reply asks for, in seconds; None where it asks for none. `now`: epoch."""
    in_ms = _number(headers.get("retry-after-ms", ""))
    if in_ms is not None:
        return max(0.0, in_ms / 1000)
    return _span(headers.get("retry-after", ""), now)


def exhausted_s(headers: Mapping[str, str], tokens: int, now: float) -> float | None:
    """How long to hold the next request, by the rate limits that a reply states.

    `tokens` is what the last request took: with fewer left, the next one would be refused.
    """
    waits = []
    for kind, needed in (("requests", 1), ("tokens", max(1, tokens)), ("", 1)):
        suffix = f"-{kind}" if kind else ""
        left = _number(headers.get(f"x-ratelimit-remaining{suffix}", ""))
        wait = _span(headers.get(f"x-ratelimit-reset{suffix}", ""), now)
        if left is not None and wait is not None and left < needed:
            waits.append(wait)
    return max(waits) if waits else None


def backoff_s(request_id: str, number: int) -> float:
    """The pause before try `number` + 1 of a request; `number` counts from 1."""
    draw = hashlib.sha256(f"{request_id}/{number}".encode()).digest()[0] / 255
    return BASE_S * 2 ** min(number - 1, 20) * (0.5 + draw / 2)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value == value and abs(value) != float("inf") else None


def _span(text: str, now: float) -> float | None:
    """Seconds from now that a header's value means."""
    text = text.strip()
    number = _number(text)
    if number is not None:
        if number > _EPOCH_S:
            number = (number / 1000 if number > _EPOCH_S * 1000 else number) - now
        return max(0.0, number)
    parts = _PART.findall(text)
    if parts and "".join(value + unit for value, unit in parts) == text:
        return sum(float(value) * _UNITS[unit] for value, unit in parts)
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            moment = parse(text)
        except (ValueError, TypeError):
            continue
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return max(0.0, moment.timestamp() - now)
    return None


class Pace:
    """A moment before which no thread sends. Clock and sleep are given by tests."""

    def __init__(
        self,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._monotonic, self._sleep = monotonic, sleep
        self._not_before = 0.0
        self._lock = threading.Lock()

    def hold(self, seconds: float) -> None:
        """Nobody sends for so long; a longer hold that is there already stays."""
        with self._lock:
            self._not_before = max(self._not_before, self._monotonic() + seconds)

    def wait(self) -> None:
        while True:
            with self._lock:
                rest = self._not_before - self._monotonic()
            if rest <= 0:
                return
            self._sleep(rest)  # then look again: another thread may have been told to wait on

    def pause(self, seconds: float) -> None:
        """This thread alone waits."""
        self._sleep(seconds)
