"""How long a job's pods ran and what that cost, kept on the volume: it outlives restarts.

    <run root>/.pod/usage-<job>.json

Also when the watchdog should end it. Pure but for reading and writing that one file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from duplex.base import Frozen
from duplex.files import write_json
from pipeline.pods.bill import HOUR_S

FOLDER = ".pod"
GAP_S = 180.0  # a container that was started again within so long ran, and was paid for, meanwhile
_JOB = re.compile(r"[0-9a-f]{8}")

Limit = Literal["budget", "idle"]


class Usage(Frozen):
    """spent_usd: so far. idle_s: how long nothing has run. seen_s: of the last count, seconds
    since the epoch. ended: the limit that stopped the pod last."""

    spent_usd: Annotated[float, Field(ge=0)] = 0.0
    seconds: Annotated[float, Field(ge=0)] = 0.0
    idle_s: Annotated[float, Field(ge=0)] = 0.0
    seen_s: float = 0.0
    ended: Limit | None = None


class Limits(Frozen):
    budget_usd: Annotated[float, Field(gt=0)]
    usd_h: Annotated[float, Field(gt=0)]
    idle_minutes: Annotated[float, Field(gt=0)]


def begun(usage: Usage, now_s: float, spent_before_usd: float) -> Usage:
    """`usage` as a watchdog begins: what earlier pods cost is in it, and a gap that was none.

    Idle time goes on through a container that dies and comes back, and begins anew in a pod that
    was stopped and that somebody started again.
    """
    spent = max(usage.spent_usd, spent_before_usd)
    gap_s = now_s - usage.seen_s
    is_same = 0 <= gap_s <= GAP_S and usage.ended is None
    return usage.model_copy(
        update={
            "spent_usd": spent,
            "idle_s": usage.idle_s if is_same else 0.0,
            "seen_s": usage.seen_s if is_same else now_s,
            "ended": None,
        }
    )


def uncounted_s(before: Usage, begun_s: float, started_s: float) -> float:
    """Seconds that were paid for before a watchdog could count them: an image is pulled, a
    container starts, or dies and comes back.

    Args:
        before: as it was found. begun_s: from when on the watchdog has counted.
        started_s: since when the pod runs, as the API says.
    """
    return max(0.0, begun_s - max(started_s, before.seen_s))


def counted(usage: Usage, now_s: float, usd_h: float, *, active: bool) -> Usage:
    """`usage` with the time since it was last counted. A clock that was set back counts nothing."""
    passed_s = max(0.0, now_s - usage.seen_s)
    idle_s = 0.0 if active else usage.idle_s + passed_s
    return added(usage, passed_s, usd_h).model_copy(update={"idle_s": idle_s, "seen_s": now_s})


def added(usage: Usage, seconds: float, usd_h: float) -> Usage:
    return usage.model_copy(
        update={
            "spent_usd": usage.spent_usd + seconds / HOUR_S * usd_h,
            "seconds": usage.seconds + seconds,
        }
    )


def repriced(usage: Usage, seconds: float, old_usd_h: float, new_usd_h: float) -> Usage:
    """`usage` with `seconds` of it at another price."""
    spent = usage.spent_usd + seconds / HOUR_S * (new_usd_h - old_usd_h)
    return usage.model_copy(update={"spent_usd": max(0.0, spent)})


def reached(usage: Usage, limits: Limits, tick_s: float) -> Limit | None:
    """The limit that is reached, or would be before the next count."""
    if usage.spent_usd + tick_s / HOUR_S * limits.usd_h >= limits.budget_usd:
        return "budget"
    return "idle" if usage.idle_s >= limits.idle_minutes * 60 else None


# -- the file


def usage_path(runs: Path, job: str) -> Path:
    return runs / FOLDER / f"usage-{job if _JOB.fullmatch(job) else 'default'}.json"


def read_usage(path: Path) -> Usage:
    """A damaged file counts as none: what the environment says was spent still holds."""
    try:
        return Usage.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return Usage()


def write_usage(path: Path, usage: Usage) -> None:
    write_json(path, usage.model_dump(mode="json"))
