"""The figures of a claim's page, as SVG: the same bytes for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

CURVES = {"loss": "total", "text": "text", "semantic": "semantic", "acoustic": "acoustic"}
_SETTINGS: dict[Any, Any] = {"svg.hashsalt": "claims", "font.size": 9, "svg.fonttype": "none"}
_COLUMNS = 3
_INK = "#1b1f24"
_COLOURS = {"improved": "#2f8f5b", "regressed": "#d6522c", "differs": "#3f74c7"}


def draw_measures(measures: Sequence[Mapping[str, Any]], reference: str, key: str) -> bytes:
    """A panel a measure, the key's first: by arm the difference from the reference with its
    interval, and the difference of each seed; filled where it is a verdict."""
    panels = sorted((one for one in measures if not one["group"]), key=lambda m: m["key"] != key)
    arms = [row["arm"] for row in panels[0]["rows"] if row["arm"] != reference]
    rows = -(-len(panels) // _COLUMNS)
    height = rows * (0.9 + 0.26 * len(arms))
    with _figure(rows, min(_COLUMNS, len(panels)), (10, height)) as (figure, axes):
        for number, (one, axis) in enumerate(zip(panels, axes, strict=False)):
            scale = 100 if one["kind"] == "rate" else 1
            axis.axvline(0, color="#8a94a6", lw=1, zorder=0)
            for place, arm in enumerate(arms):
                row = next((row for row in one["rows"] if row["arm"] == arm), {})
                if row.get("difference") is None:
                    axis.annotate("not measured", (0, place), fontsize=6, va="center")
                    continue
                seeds = [scale * d for d in row["seed_differences"] if d is not None]
                axis.plot(seeds, [place + 0.18] * len(seeds), "o", ms=2.5, color="#8a94a6")
                if row["low"] is not None:
                    bounds = [scale * row["low"], scale * row["high"]]
                    axis.plot(bounds, [place] * 2, "-", lw=1.6, color=_INK)
                face = _COLOURS.get(row["word"], "white")
                axis.plot(
                    [scale * row["difference"]], [place], "D", ms=6, mfc=face, mec=_INK, mew=1
                )
            first = number % _COLUMNS == 0
            axis.set_yticks(range(len(arms)), arms if first else [""] * len(arms))
            axis.set_ylim(len(arms) - 0.5, -0.5)
            better = {"high": ", more is better", "low": ", less is better"}.get(one["better"], "")
            unit = "pp" if one["kind"] == "rate" else one["unit"]
            weight = "bold" if one["key"] == key else "normal"
            axis.set_title(f"{one['label']} ({unit}{better})", fontsize=7, fontweight=weight)
            axis.tick_params(labelsize=7)
        for axis in axes[len(panels) :]:
            axis.remove()
        return _svg(figure)


def draw_curves(
    curves: Mapping[str, Mapping[str, Any]],
    expected: Mapping[str, Sequence[float]],
    steps_per_epoch: float,
) -> bytes:
    """Validation losses by epoch, an arm a line, and beside them what the seeds expected."""
    with _figure(1, len(CURVES), (11, 3.4)) as (figure, axes):
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
                    range(1, len(expected[key]) + 1), expected[key], "k:", lw=1.5, label="expected"
                )
            axis.set_title(f"{title}, held-out clips", fontsize=9)
            axis.set_xlabel("epoch")
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            axis.yaxis.set_major_formatter(_plain)
            # Within a power of ten the lines between the powers are all there is to read.
            axis.yaxis.set_minor_formatter(_plain if high < 10 * low else "")
            axis.tick_params(labelsize=7, which="both")
        lines, labels = axes[0].get_legend_handles_labels()
        figure.legend(lines, labels, fontsize=7, loc="outside lower center", ncols=len(labels))
        return _svg(figure)


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


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
