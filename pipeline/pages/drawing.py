"""Small drawings for the stages' pages: histograms, and counts as bars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
WIDTH, HEIGHT = 240, 72  # of a histogram's bars, in pixels
MAX_ROWS = 500  # of one table: what a browser opens at once; the records are in the folder
NICE = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Histogram:
    """A drawn distribution. `low`, `high`: what stands under its left and right end."""

    title: str
    bars: tuple[Bar, ...]
    summary: str
    low: str
    high: str
    zero_x: float | None = None
    width: int = WIDTH
    height: int = HEIGHT


def histogram(
    title: str, values: Sequence[float], unit: str = "", bins: int = 24
) -> Histogram | None:
    """Counts of values in equal steps of a round size; None without values."""
    if not values:
        return None
    least, most = min(values), max(values)
    step = _round_step((most - least) / bins)
    first = int(least // step)
    count = int(most // step) - first + 1
    counts = [0] * count
    for value in values:
        counts[int(value // step) - first] += 1
    width = WIDTH / count
    bars = [
        Bar(
            x=round(index * width, 2),
            y=round(HEIGHT - _height(number, max(counts)), 2),
            width=round(max(width - 1, 0.5), 2),
            height=_height(number, max(counts)),
            title=f"{_figure((first + index) * step)} to {_figure((first + index + 1) * step)}"
            f"{unit}: {number}",
        )
        for index, number in enumerate(counts)
        if number
    ]
    ranked = sorted(values)
    median = ranked[len(ranked) // 2]
    zero = -first * step / (count * step) * WIDTH if least < 0 <= most else None
    return Histogram(
        title=title,
        bars=tuple(bars),
        summary=f"median {_figure(median)}{unit}, {len(values)} in all",
        low=f"{_figure(first * step)}{unit}",
        high=f"{_figure((first + count) * step)}{unit}",
        zero_x=round(zero, 2) if zero is not None else None,
    )


@dataclass(frozen=True)
class Tally:
    """Counts of names: (name, count, share of the greatest in percent)."""

    title: str
    rows: tuple[tuple[str, int, float], ...]

    @property
    def summary(self) -> str:
        return ", ".join(f"{name} {count}" for name, count, _ in self.rows)


def tally(title: str, names: Sequence[str], order: Sequence[str] = ()) -> Tally | None:
    """Counts of names: those in `order` first, the others by count; None without names."""
    if not names:
        return None
    counts = Counter(names)
    rest = sorted(set(counts) - set(order), key=lambda name: (-counts[name], name))
    shown = [name for name in order if name in counts] + rest
    most = max(counts.values())
    rows = [(name, counts[name], round(100 * counts[name] / most, 1)) for name in shown]
    return Tally(title, tuple(rows))


def _height(number: int, most: int) -> float:
    return round(max(number / most * HEIGHT, 1.0), 2)


def _round_step(least: float) -> float:
    """The next round number that is not smaller."""
    size = 1e-3
    while True:
        for nice in NICE[:-1]:
            if nice * size >= least:
                return nice * size
        size *= 10


def _figure(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def rendered(template: str, values: Mapping[str, Any]) -> str:
    """A page from its template; everything in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(**values)
