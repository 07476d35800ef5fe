"""The figures of a claim's page, as SVG: the same bytes for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

CURVES = {"loss": "total", "text": "text", "semantic": "semantic", "acoustic": "acoustic"}
_SETTINGS: dict[Any, Any] = {"svg.hashsalt": "claims", "font.size": 9, "svg.fonttype": "none"}
_COLUMNS = 3


def draw_measures(measures: Sequence[Mapping[str, Any]], reference: str) -> bytes:
    """A panel a measure: an arm a line, a small dot a seed, a large one for all of them."""
    panels = [one for one in measures if not one["group"]]
    rows = -(-len(panels) // _COLUMNS)
    arms = [row["arm"] for row in panels[0]["rows"]]
    height = rows * (0.8 + 0.24 * len(arms))
    with _figure(rows, min(_COLUMNS, len(panels)), (10, height)) as (figure, axes):
        for number, (one, axis) in enumerate(zip(panels, axes, strict=False)):
            for place, row in enumerate(one["rows"]):
                seeds = [value for value in row["by_seed"] if value is not None]
                axis.plot(seeds, [place] * len(seeds), "o", ms=3.5, color="#8a94a6")
                colour = "#1b1f24" if row["arm"] == reference else "#d6522c"
                if row["value"] is not None:
                    axis.plot([row["value"]], [place], "D", ms=6, color=colour)
            value = next(row["value"] for row in one["rows"] if row["arm"] == reference)
            if value is not None:
                axis.axvline(value, color="#c3c9d2", lw=1, zorder=0)
            first = number % _COLUMNS == 0
            axis.set_yticks(range(len(arms)), arms if first else [""] * len(arms))
            axis.set_ylim(len(arms) - 0.5, -0.5)
            better = {"high": " (more is better)", "low": " (less is better)"}
            share = "share" if one["kind"] == "rate" else one["unit"]
            axis.set_title(f"{one['label']}, {share}{better.get(one['better'], '')}", fontsize=7)
        for axis in axes[len(panels) :]:
            axis.remove()
        return _svg(figure)


def draw_curves(
    curves: Mapping[str, Mapping[str, Any]],
    expected: Mapping[str, Sequence[float]],
    steps_per_epoch: float,
) -> bytes:
    """Validation losses by epoch, an arm a line, and beside them what the seeds expected."""
    with _figure(1, len(CURVES), (11, 3)) as (figure, axes):
        for axis, (key, title) in zip(axes, CURVES.items(), strict=True):
            for arm, found in curves.items():
                points = found.get(key, {}).get("valid", [])
                axis.plot(
                    [step / steps_per_epoch for step, _ in points],
                    [value for _, value in points],
                    "o-", ms=3, lw=1.2, label=arm,
                )  # fmt: skip
            if key in expected:
                axis.plot(
                    range(len(expected[key])), expected[key], "k:", lw=1.5, label="the seeds'"
                )
            axis.set_title(f"{title}, held-out clips", fontsize=9)
            axis.set_xlabel("epoch")
            axis.set_yscale("log")
        axes[-1].legend(fontsize=7)
        return _svg(figure)


class _figure:
    def __init__(self, rows: int, columns: int, size: tuple[float, float]):
        self._shape, self._size = (rows, columns), size

    def __enter__(self) -> tuple[Any, Any]:
        import matplotlib

        self._settings = matplotlib.rc_context(_SETTINGS)
        self._settings.__enter__()
        from matplotlib.figure import Figure

        self._figure = Figure(figsize=self._size, layout="constrained")
        axes = self._figure.subplots(*self._shape, squeeze=False)
        return self._figure, list(axes.flat)

    def __exit__(self, *error: Any) -> None:
        self._settings.__exit__(*error)


def _svg(figure: Any) -> bytes:
    found = io.BytesIO()
    figure.savefig(found, format="svg", metadata={"Date": None}, facecolor="white")
    # Lines end without blanks, as all files of the repo do.
    return b"\n".join(line.rstrip() for line in found.getvalue().splitlines()) + b"\n"
