"""A page of training curves: one HTML file, its SVG drawn here, nothing fetched.

One panel a quantity: the loss, each stream's likelihood, the perplexity of text, gradient norm,
learning rates, and of each step speed and memory. Training is a thin line of every step, validation
a thick one with points, validation on base data a dashed one.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from training.checks import checks_table
from training.loss import STREAMS, USER_STREAMS

WIDTH, HEIGHT = 420, 210  # px of a panel
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 28  # px around the plot
Point = tuple[float, float]
_RATES = (("lr", "learning rate"), ("lr_depth", "learning rate, depth transformer"))
# Of each line of timing.jsonl: key, title, factor. A step that was made again counts once.
_MEASURED = (
    ("frames_per_s", "frames/s, without padding", 1.0),
    ("memory_bytes", "memory, GB", 1e-9),
)

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #66707c; --grid: #e3e6ea;
  --paper: #fff; --train: #4b7bec; --valid: #d6522c; --base: #2a9d6f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa3ad;
  --grid: #33383f; --paper: #16181b; --train: #7aa2ff; --valid: #ff8a65; --base: #5fd0a3; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 2rem auto; max-width: 92rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: .95rem; margin: 0 0 .2rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr));
  gap: 1.2rem; }
svg { width: 100%; height: auto; } text { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--grid); } .train { stroke: var(--train); fill: none; }
.valid { stroke: var(--valid); fill: none; stroke-width: 2.5; } circle { fill: var(--valid); }
.base { stroke: var(--base); fill: none; stroke-width: 2; stroke-dasharray: 5 3; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left; }
.key::before { content: "—"; font-weight: bold; margin-right: .3rem; }
.key.of-train::before { color: var(--train); } .key.of-valid::before { color: var(--valid); }
.key.of-base::before { color: var(--base); }
"""


@dataclass(frozen=True)
class Line:
    """Points (step, value) drawn in the CSS class `css`; `dots` marks each of them."""

    css: str
    points: list[Point]
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    train: list[Point]
    valid: list[Point]
    base: list[Point] = field(default_factory=list)


def curves_page(
    title: str,
    facts: dict[str, str],
    log: Sequence[dict[str, Any]],
    timing: Sequence[dict[str, Any]] = (),
) -> str:
    """The page as HTML.

    Args:
        facts: what to say in the table at the top.
        log: lines of metrics.jsonl.
        timing: lines of timing.jsonl.
    """
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    figures = "".join(
        f"<figure style='margin:0'><h2>{html.escape(panel.title)}</h2>{draw(panel)}</figure>"
        for panel in panels(log, timing)
    )
    base_key = ""
    if any(line["kind"] == "valid_base" for line in log):
        base_key = "<span class='key of-base'>validation, base data</span> &nbsp; "
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><table>{rows}</table>"
        "<p><span class='key of-train'>training, each step</span> &nbsp; "
        "<span class='key of-valid'>validation, held-out clips</span> &nbsp; "
        f"{base_key}"
        "negative log-likelihoods are in nats a prediction: lower is better</p>"
        f"<div class='panels'>{figures}</div>{checks_table(log)}</body></html>\n"
    )


def panels(log: Sequence[dict[str, Any]], timing: Sequence[dict[str, Any]] = ()) -> list[Panel]:
    """What there is to draw, in order."""
    result = []
    for name in ("loss", *STREAMS, *USER_STREAMS):
        kinds = ("train", "valid", "valid_base")
        result.append(Panel(name, *(_series(log, kind, name) for kind in kinds)))
    perplexity = [line | {"streams": line.get("perplexity", {})} for line in log]
    kinds = ("valid", "valid_base")
    for name in ("text", "text_nonpad"):
        series = (_series(perplexity, kind, name) for kind in kinds)
        result.append(Panel(f"perplexity of {name}", [], *series))
    for name, title in (("grad_norm", "gradient norm"), *_RATES):
        result.append(Panel(title, _series(log, "train", name), []))
    for name, title, scale in _MEASURED:
        points = [(x, y * scale) for x, y in _series(timing, "train", name)]
        result.append(Panel(title, sorted(dict(points).items()), []))
    return [panel for panel in result if panel.train or panel.valid or panel.base]


def _series(log: Sequence[dict[str, Any]], kind: str, name: str) -> list[Point]:
    points = []
    for line in log:
        if line["kind"] != kind:
            continue
        value = line.get("streams", {}).get(name, line.get(name))
        if value is not None and math.isfinite(value):
            points.append((float(line["step"]), float(value)))
    return points


def draw(panel: Panel) -> str:
    """One panel as SVG."""
    lines = [
        Line("train", panel.train),
        Line("valid", panel.valid, dots=True),
        Line("base", panel.base),
    ]
    return plot(panel.title, [line for line in lines if line.points])


def plot(title: str, lines: Sequence[Line]) -> str:
    """Lines over each other as one SVG, their axes fitted to all of them."""
    points = [point for line in lines for point in line.points]
    last = max(x for x, _ in points) or 1.0
    low, high = min(y for _, y in points), max(y for _, y in points)
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x_of(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y_of(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{html.escape(title)}'>"]
    for tick in ticks:
        y = y_of(tick)
        parts.append(
            f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>"
        )
        parts.append(f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{tick:.4g}</text>")
    for step in sorted({0, round(last / 2), round(last)}):
        parts.append(
            f"<text x='{x_of(step):.1f}' y='{HEIGHT - 8}' text-anchor='middle'>{step}</text>"
        )
    for line in lines:
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line.points)
        parts.append(f"<polyline class='{line.css}' points='{path}'/>")
        if line.dots:
            parts += [
                f"<circle class='{line.css}-dot' cx='{x_of(x):.1f}' cy='{y_of(y):.1f}' r='3.5'>"
                f"<title>step {x:.0f}: {y:.4f}</title></circle>"
                for x, y in line.points
            ]
    return "".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that enclose [low, high], about `count` steps apart."""
    span = high - low or abs(high) or 1.0
    magnitude = 10 ** math.floor(math.log10(span / count))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= span / count)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]
