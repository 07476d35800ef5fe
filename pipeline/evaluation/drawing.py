"""Timelines of conversations and curves of training, as SVG that a page takes in.

Built with ElementTree, so every text and attribute is escaped by the serializer. Colours are
classes: the page's style sheet knows light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from duplex.frames import FRAME_RATE, FRAME_SAMPLES
from duplex.metrics import Segment

WIDTH = 960
GUTTER = 46  # for the names of the lanes
MARGIN = 26  # for the last time
LANE = 44
ROW = 15
MAX_COLUMNS = 600
LETTER = 6.3  # width of a letter at the size of words, roughly
MAX_WORD_ROWS = 8


@dataclass(frozen=True)
class Track:
    """What a timeline shows. agent, user: float [S]; words: (frame, word) of the agent."""

    agent: np.ndarray
    user: np.ndarray
    agent_speech: Sequence[Segment]
    user_speech: Sequence[Segment]
    turns: Sequence[Segment]
    words: Sequence[tuple[int, str]]


def timeline(track: Track, label: str) -> Markup:
    """Both channels over time, where each was found to speak, the turns, and the words."""
    num_frames = max(1, len(track.user) // FRAME_SAMPLES)
    scale = (WIDTH - GUTTER - MARGIN) / num_frames

    def x(frame: float) -> str:
        return f"{GUTTER + frame * scale:.1f}"

    rows, left_out = _word_rows(track.words, scale)
    user_top = 30
    agent_top = user_top + LANE + 6
    words_top = agent_top + LANE + 4
    height = words_top + ROW * len(rows) + (ROW if left_out else 0) + 6
    svg = _svg(WIDTH, height, label, "timeline")
    svg.set("data-start", str(GUTTER))
    svg.set("data-end", x(num_frames))
    for second in range(0, math.floor(num_frames / FRAME_RATE) + 1, _tick_step(num_frames)):
        at = x(second * FRAME_RATE)
        _add(svg, "line", "grid", x1=at, x2=at, y1=14, y2=height - 4)
        _text(svg, f"{second} s", "tick", at, 10)
    lanes = (
        ("user", user_top, track.user, track.user_speech),
        ("agent", agent_top, track.agent, track.agent_speech),
    )
    for name, top, samples, speech in lanes:
        _text(svg, name, f"lane {name}", 2, top + LANE / 2 + 4)
        for segment in speech:
            _add(
                svg, "rect", f"speech {name}", x=x(segment.start), y=top,
                width=f"{(segment.end - segment.start) * scale:.1f}", height=LANE, rx=3,
            )  # fmt: skip
        _add(svg, "path", f"wave {name}", d=_wave(samples, top + LANE / 2, num_frames * scale))
    for index, turn in enumerate(track.turns, start=1):
        _text(svg, str(index), "turn", x(turn.start), user_top - 4)
        _add(svg, "line", "due", x1=x(turn.end), x2=x(turn.end), y1=user_top, y2=agent_top + LANE)
    for index, row in enumerate(rows):
        for frame, word in row:
            y = words_top + ROW * (index + 1) - 4
            _add(svg, "line", "stem", x1=x(frame), x2=x(frame), y1=agent_top + LANE, y2=y + 2)
            _text(svg, word, "word", x(frame + 0.3), y)
    if left_out:
        _text(svg, f"+ {left_out} more words", "tick", x(0), height - 6)
    head = _add(svg, "line", "head", x1=x(0), x2=x(0), y1=14, y2=height - 4)
    head.set("visibility", "hidden")
    return _markup(svg)


def _word_rows(
    words: Sequence[tuple[int, str]], scale: float
) -> tuple[list[list[tuple[int, str]]], int]:
    """Words in rows, so that none covers another; and how many found no row."""
    rows: list[list[tuple[int, str]]] = []
    ends: list[float] = []
    left_out = 0
    for frame, word in words:
        word = word if len(word) <= 24 else word[:23] + "…"
        width = len(word) * LETTER + 8
        start = min(frame * scale, WIDTH - GUTTER - width)
        row = next((i for i, end in enumerate(ends) if end <= start), len(rows))
        if row == MAX_WORD_ROWS:
            left_out += 1
            continue
        if row == len(rows):
            rows.append([])
            ends.append(0.0)
        rows[row].append((frame if start == frame * scale else round(start / scale), word))
        ends[row] = start + width
    return rows, left_out


def _wave(samples: np.ndarray, middle: float, width: float) -> str:
    """A closed outline: the square root of the peak in each column, so that soft parts show."""
    columns = max(1, min(MAX_COLUMNS, 2 * (len(samples) // FRAME_SAMPLES)))
    edges = np.linspace(0, len(samples), columns + 1).astype(int)
    peaks = [
        math.sqrt(min(1.0, float(np.max(np.abs(samples[a:b]), initial=0.0))))
        for a, b in pairwise(edges)
    ]
    step = width / columns
    top = [
        f"{GUTTER + i * step:.1f} {middle - peak * LANE / 2:.1f}" for i, peak in enumerate(peaks)
    ]
    bottom = [
        f"{GUTTER + i * step:.1f} {middle + peak * LANE / 2:.1f}" for i, peak in enumerate(peaks)
    ]
    return f"M{' L'.join(top + bottom[::-1])} Z"


def _tick_step(num_frames: int) -> int:
    seconds = num_frames / FRAME_RATE
    return next((step for step in (1, 2, 5, 10, 20) if seconds / step <= 16), 60)


# -- curves

CURVE_WIDTH, CURVE_HEIGHT = 300, 170


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], label: str) -> Markup:
    """A small chart of (step, loss) points; the keys are `train` and `valid`.

    The loss axis is linear and starts at 0 where the data come within three times of it.
    """
    points = [point for line in lines.values() for point in line]
    svg = _svg(CURVE_WIDTH, CURVE_HEIGHT, label, "curve")
    if not points:
        return _markup(svg)
    steps, losses = zip(*points, strict=True)
    low, high = min(losses), max(losses)
    if low >= 0 and low < high * 2 / 3:
        low = 0.0
    if high == low:
        low, high = low - 0.5, high + 0.5
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    first, last = min(steps), max(max(steps), min(steps) + 1)
    left, right, top, bottom = 40, CURVE_WIDTH - 10, 10, CURVE_HEIGHT - 22

    def place(step: float, loss: float) -> tuple[float, float]:
        return (
            left + (step - first) / (last - first) * (right - left),
            bottom - (loss - low) / (high - low) * (bottom - top),
        )

    for tick in ticks:
        y = f"{place(first, tick)[1]:.1f}"
        _add(svg, "line", "grid", x1=left, x2=right, y1=y, y2=y)
        _text(svg, f"{tick:g}", "tick end", left - 5, float(y) + 3.5)
    _text(svg, f"step {first:g}", "tick", left, CURVE_HEIGHT - 6)
    _text(svg, f"{last:g}", "tick end", right, CURVE_HEIGHT - 6)
    for name, line in lines.items():
        spots = [place(*point) for point in sorted(line)]
        path = " L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        if len(spots) > 1:
            _add(svg, "path", f"line {name}", d=f"M{path}")
        if name == "valid" or len(spots) == 1:
            for x, y in spots:
                _add(svg, "circle", f"dot {name}", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.6)
    return _markup(svg)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round values that cover [low, high]."""
    raw = (high - low) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]


# -- elements


def _svg(width: float, height: float, label: str, kind: str) -> ElementTree.Element:
    return ElementTree.Element(
        "svg",
        {"viewBox": f"0 0 {width:g} {height:g}", "class": kind, "role": "img", "aria-label": label},
    )


def _add(
    parent: ElementTree.Element, tag: str, kind: str, **attributes: str | float
) -> ElementTree.Element:
    found = {key: value if isinstance(value, str) else f"{value:g}"
             for key, value in attributes.items()}  # fmt: skip
    return ElementTree.SubElement(parent, tag, {"class": kind, **found})


def _text(parent: ElementTree.Element, text: str, kind: str, x: str | float, y: float) -> None:
    _add(parent, "text", kind, x=x, y=y).text = text


def _markup(svg: ElementTree.Element) -> Markup:
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
