"""What pods cost: seconds between start and stop, times the price of an hour. Pure.

RunPod bills by the second. Storage is billed apart and is in no pod's `cost`: it is not in here.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from duplex.base import Frozen

HOUR_S = 3600.0


class Span(Frozen):
    """One stretch of running. Times in seconds since the epoch; end_s None: it still runs."""

    start_s: float
    usd_h: float
    end_s: float | None = None

    def seconds(self, now_s: float) -> float:
        return max(0.0, (now_s if self.end_s is None else self.end_s) - self.start_s)

    def usd(self, now_s: float) -> float:
        return self.seconds(now_s) / HOUR_S * self.usd_h


def spent_usd(spans: Iterable[Span], now_s: float) -> float:
    return sum(span.usd(now_s) for span in spans)


def opened(spans: tuple[Span, ...], start_s: float, usd_h: float) -> tuple[Span, ...]:
    """`spans` with one that runs. One that runs already gets the price, from its start: the API's
    price takes the place of the table's."""
    if spans and spans[-1].end_s is None:
        return (*spans[:-1], spans[-1].model_copy(update={"usd_h": usd_h}))
    return (*spans, Span(start_s=start_s, usd_h=usd_h))


def closed(spans: tuple[Span, ...], end_s: float) -> tuple[Span, ...]:
    """`spans` with none that runs."""
    if not spans or spans[-1].end_s is not None:
        return spans
    last = spans[-1]
    return (*spans[:-1], last.model_copy(update={"end_s": max(last.start_s, end_s)}))


def hours_left(budget_usd: float, spent: float, usd_h: float) -> float:
    return max(0.0, budget_usd - spent) / usd_h


# -- the API's times


def parse_time(text: object) -> float | None:
    """Seconds of an ISO time."""
    if not isinstance(text, str) or len(text) > 200:
        return None
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def plausible(moment_s: float | None, first_s: float, last_s: float) -> float | None:
    """A time that somebody else's clock gave, if it lies between two of ours."""
    return moment_s if moment_s is not None and first_s <= moment_s <= last_s else None
