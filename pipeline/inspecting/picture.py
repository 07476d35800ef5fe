"""A tensor as a timeline: phases, text row, activity of both sides, turns. PNG by matplotlib.

Long tensors are drawn in strips of up to `STRIP_FRAMES`, so that a frame stays wider than a
pixel; past `MAX_STRIPS` the strips grow instead.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from duplex.files import write_atomic
from duplex.frames import FRAME_RATE, frames_to_seconds
from duplex.inspection import is_word
from duplex.judgement import Inspection
from duplex.streams import CODEBOOKS, TEXT_EPAD, TEXT_PAD, TEXT_ROW, ZERO_TOKEN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRIP_FRAMES = 1000
MAX_STRIPS = 8
WIDTH_IN, STRIP_IN, DPI = 16.0, 2.6, 110
PHASE_COLOURS = {
    "voice": "#c7a76c",
    "silence": "#d9d9d9",
    "text": "#7fa8d1",
    "greeting": "#a5c882",
    "prompt": "#7fa8d1",
    "dialogue": "#f3efe6",
}
# Words, EPAD, PAD, -1, ids that are none of these.
TEXT_COLOURS = ("#1f4e8c", "#e69f00", "#ededed", "#c0392b", "#000000")
TEXT_NAMES = ("token", "EPAD", "PAD", "-1", "out of range")
SIDE_COLOURS = {"agent": "#1f4e8c", "user": "#2e7d4f"}
LANES = ("phases", "text", "agent", "user", "turns")


def draw_timeline(codes: np.ndarray, inspection: Inspection, path: Path) -> None:
    """Write the picture of codes int64 [17, T] that were measured.

    Raises:
        OSError: the file cannot be written.
    """
    write_atomic(path, timeline_png(codes, inspection))


def timeline_png(codes: np.ndarray, inspection: Inspection) -> bytes:
    """The picture of codes int64 [17, T] that were measured."""
    import matplotlib

    matplotlib.use("Agg", force=True)
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    m = inspection.measures
    assert m is not None, "only measured tensors are drawn"
    strip, starts = strips(m.num_frames)
    figure = Figure(figsize=(WIDTH_IN, 1.0 + STRIP_IN * len(starts)), dpi=DPI)
    axes = figure.subplots(len(starts), 1, squeeze=False)[:, 0]
    kinds = text_kinds(codes[TEXT_ROW])
    for axis, start in zip(axes, starts, strict=True):
        _strip(axis, kinds, inspection, start, strip)
    handles = [
        Patch(facecolor=TEXT_COLOURS[kind], edgecolor="#888888", label=TEXT_NAMES[kind])
        for kind in sorted({*np.unique(kinds).tolist(), 0, 2})
    ]
    figure.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False, fontsize=9)
    codes_of_harm = sorted({f.code for f in inspection.findings if f.severity == "harm"})
    harm = f"harm: {', '.join(codes_of_harm)}" if codes_of_harm else "fit for training"
    seconds = frames_to_seconds(m.num_frames)
    name = inspection.record_id or inspection.name
    name = name if len(name) <= 48 else name[:47] + "…"
    figure.suptitle(
        f"{_plain(name)}: {m.num_frames} frames, {seconds:.1f} s, "
        f"looks like {inspection.profile.name}, {harm}",
        x=0.01,
        ha="left",
        fontsize=11,
    )  # fmt: skip
    figure.text(
        0.985, 0.012, "bars of agent and user: how many of 8 codes differ from silence; "
        "the prompt is pale", ha="right", fontsize=8, color="#555555",
    )  # fmt: skip
    height = figure.get_size_inches()[1]
    figure.subplots_adjust(
        left=0.055, right=0.985, top=1 - 0.75 / height, bottom=0.5 / height, hspace=0.42
    )
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def strips(num_frames: int) -> tuple[int, range]:
    """Frames of a strip, and where the strips start."""
    count = min(MAX_STRIPS, math.ceil(num_frames / STRIP_FRAMES))
    width = math.ceil(num_frames / count)
    return width, range(0, num_frames, width)


def text_kinds(text: np.ndarray) -> np.ndarray:
    """0 token, 1 EPAD, 2 PAD, 3 -1, 4 anything else: int64 [T]."""
    kinds = np.full(len(text), 4, dtype=np.int64)
    kinds[is_word(text)] = 0
    for kind, value in ((1, TEXT_EPAD), (2, TEXT_PAD), (3, ZERO_TOKEN)):
        kinds[text == value] = kind
    return kinds


def _strip(axis: Axes, kinds: np.ndarray, inspection: Inspection, start: int, width: int) -> None:
    from matplotlib.colors import ListedColormap

    m = inspection.measures
    assert m is not None
    end = min(start + width, m.num_frames)
    height = len(LANES)
    prompt_end = m.dialogue.start if m.dialogue else m.num_frames
    axis.set_xlim(start, start + width)
    axis.set_ylim(height, 0)
    axis.set_yticks([lane + 0.5 for lane in range(height)], LANES, fontsize=9)
    axis.tick_params(axis="y", length=0)
    for phase in m.phases:
        _block(axis, 0, phase.start, phase.end, PHASE_COLOURS.get(phase.label, "#cccccc"),
               phase.label, (start, width))  # fmt: skip
    axis.imshow(
        kinds[None, start:end],
        extent=(start, end, 1.92, 1.08),
        cmap=ListedColormap(TEXT_COLOURS),
        vmin=-0.5,
        vmax=len(TEXT_COLOURS) - 0.5,
        aspect="auto",
        interpolation="nearest",
    )
    for lane, side, differs in ((2, "agent", m.agent_differs), (3, "user", m.user_differs)):
        # The prompt is pale: its sine and its voice sample are nobody's turn.
        parts = ((start, min(end, prompt_end), 0.35), (max(start, prompt_end), end, 1.0))
        for first, last, alpha in parts:
            if first < last:
                axis.stairs(
                    lane + 0.92 - 0.84 * differs[first:last] / CODEBOOKS,
                    np.arange(first, last + 1), baseline=lane + 0.92, fill=True,
                    color=SIDE_COLOURS[side], alpha=alpha,
                )  # fmt: skip
    for turn in m.turns:
        offset = 0.0 if turn.role == "agent" else 0.44
        if turn.start < end and turn.end > start:
            axis.barh(
                4.08 + offset, min(turn.end, end) - max(turn.start, start), 0.4,
                left=max(turn.start, start), align="edge",
                color=SIDE_COLOURS.get(turn.role, "#888888"), edgecolor="white", linewidth=0.5,
            )  # fmt: skip
    _axes(axis, start, width, end)


def _block(
    axis: Axes, lane: int, start: int, end: int, colour: str, label: str, strip: tuple[int, int]
) -> None:
    first, last = max(start, strip[0]), min(end, strip[0] + strip[1])
    if first >= last:
        return
    axis.barh(lane + 0.08, last - first, 0.84, left=first, align="edge", color=colour,
              edgecolor="#777777", linewidth=0.5)  # fmt: skip
    letter = strip[1] / 210  # of the strip's frames, roughly, at this size
    if last - first >= letter * (len(label) + 1):
        axis.text((first + last) / 2, lane + 0.5, label, ha="center", va="center", fontsize=8)


def _axes(axis: Axes, start: int, width: int, end: int) -> None:
    """Seconds below, frames above."""
    seconds = frames_to_seconds(width)
    step_s = next(s for s in (0.5, 1, 2, 5, 10, 30, 60, 300, 1e9) if seconds / s <= 16)
    first = math.ceil(frames_to_seconds(start) / step_s)
    last = math.floor(frames_to_seconds(end) / step_s)
    marks = [number * step_s for number in range(first, last + 1)]
    axis.set_xticks([mark * FRAME_RATE for mark in marks], [f"{mark:g} s" for mark in marks])
    axis.tick_params(axis="x", labelsize=8)
    step = next(s for s in (5, 10, 25, 50, 100, 250, 500, 1000, 10**9) if width / s <= 12)
    frames = range(math.ceil(start / step) * step, end + 1, step)
    top: Any = axis.secondary_xaxis("top")
    top.set_xticks(list(frames), [str(frame) for frame in frames])
    top.tick_params(labelsize=8)
    axis.text(-0.005, 1.05, "frames", transform=axis.transAxes, ha="right", fontsize=8)
    for side in ("left", "right"):
        axis.spines[side].set_visible(False)


def _plain(text: str) -> str:
    """A title that matplotlib does not read as mathematics."""
    return "".join(char if char.isprintable() else "?" for char in text).replace("$", r"\$")
