"""`duplex compare`: training runs side by side, from what their stages handed in.

A run is a finished train stage folder; a run folder stands for all that are in it, oldest first,
and a config for the one of its plan. Figures are of the log and of timing.jsonl; nothing is
computed anew. Losses compare only where the loss is the same: streams are unweighted NLL, in nats.
"""

from __future__ import annotations

import html
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from duplex.configfile import load_config
from duplex.errors import CorruptFileError, MissingInputError, RequestError
from duplex.files import read_lines, write_atomic
from duplex.store import StageFolder, folders_of
from pipeline.commands import show_json
from pipeline.run import STAGE_NAMES, plan

TRAIN = 6
STREAMS = ("loss", "text", "text_nonpad", "semantic", "acoustic_1", "acoustic_7")
COLOURS = ("#4b7bec", "#d6522c", "#2a9d6f", "#9b59b6", "#c29200", "#1aa5b8", "#d6336c", "#6c757d")
# Of further rounds through the colours: stroke-dasharray and the sign in the legend.
DASHES = (("none", "—"), ("6 3", "╌"), ("2 3", "┈"))


@dataclass(frozen=True)
class TrainRun:
    """A finished train stage. `facts` are its adapter's; `log` and `timing` its lines."""

    label: str
    folder: StageFolder
    facts: dict[str, Any]
    adapter_bytes: int
    log: list[dict[str, Any]]
    timing: list[dict[str, Any]]


def find_runs(targets: Sequence[str], runs_root: Path) -> list[TrainRun]:
    """
    Raises:
        RequestError: a target that is none of the three.
        MissingInputError: one without a finished train stage.
        CorruptFileError: a stage that does not hold what its manifest says.
    """
    folders: list[StageFolder] = []
    chosen = [target for target in targets if not _is_unfinished(Path(target))]
    if skipped := sorted(set(targets) - set(chosen)):
        print(f"left out, not finished: {', '.join(skipped)}", file=sys.stderr)
    for target in chosen or targets:
        found = _folders_of_target(Path(target), runs_root)
        folders += [f for f in found if f.path.resolve() not in {o.path.resolve() for o in folders}]
    same_run = len({folder.path.resolve().parent for folder in folders}) == 1
    return [_read(folder, same_run) for folder in folders]


def _is_unfinished(path: Path) -> bool:
    """A train stage folder of a run that failed or is under way, as `06-train-*` names it too."""
    is_stage = path.is_dir() and path.name.startswith(f"{TRAIN:02d}-train-")
    return is_stage and not (path / "manifest.json").exists()


def _folders_of_target(path: Path, runs_root: Path) -> list[StageFolder]:
    if path.is_dir():
        if (path / "manifest.json").exists():
            try:
                stage = json.loads((path / "manifest.json").read_text()).get("stage")
            except (ValueError, AttributeError) as error:
                raise CorruptFileError(
                    f"{path / 'manifest.json'}: cannot be read: {error}"
                ) from None
            if stage != "train":
                raise RequestError(f"{path} must be a train stage, found the stage {stage}.")
            return [StageFolder(path, "train", "")]
        found = [f for f in folders_of(path, TRAIN, "train") if f.manifest() is not None]
        if not found:
            raise MissingInputError(
                f"{path} must be, or hold, a finished train stage (06-train-… with manifest.json), "
                "found none. `duplex run CONFIG --to train` makes one."
            )
        return sorted(found, key=lambda f: (f.path / "manifest.json").stat().st_mtime)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        step = plan(load_config(path), runs_root)[STAGE_NAMES.index("train")]
        if not step.done or step.folder is None:
            raise MissingInputError(
                f"{path} must have a finished train stage under {runs_root}, found none: "
                f"`duplex run {path} --to train` makes it."
            )
        return [step.folder]
    raise RequestError(
        f"RUN must be a train stage folder, a run folder or a config, found nothing at {path}."
    )


def _read(folder: StageFolder, same_run: bool) -> TrainRun:
    records = {record.id: record for record in folder.records()}
    adapter: Any = records.get("adapter")
    if adapter is None:
        raise CorruptFileError(f"{folder.path}: must hold an adapter, found none recorded.")
    path = folder.path.resolve()
    return TrainRun(
        label=path.name if same_run else f"{path.parent.name}/{path.name}",
        folder=folder,
        facts=adapter.facts,
        adapter_bytes=adapter.num_bytes,
        log=list(read_lines(folder.artifact("metrics"))),
        timing=list(read_lines(folder.path / "timing.jsonl")),
    )


def compare(runs: Sequence[TrainRun]) -> dict[str, Any]:
    """`runs`: a summary each; `differ`: setting -> its value in each run."""
    settings = [_flat(run.facts.get("settings", {})) for run in runs]
    names = sorted({name for values in settings for name in values})
    differ = {name: [values.get(name) for values in settings] for name in names}
    differ = {name: v for name, v in differ.items() if any(value != v[0] for value in v)}
    return {"runs": [summary(run) for run in runs], "differ": differ}


def summary(run: TrainRun) -> dict[str, Any]:
    """What one run came to. seconds, frames_per_s: of its training steps, killed attempts too."""
    facts = run.facts
    trained = [line for line in run.timing if line["kind"] == "train"]
    seconds = sum(line["seconds"] for line in trained)
    frames = sum(line["frames"] for line in trained)
    padded = sum(line.get("padded_frames", line["frames"]) for line in trained)
    valid = {
        when.removeprefix("valid_"): values
        for when, values in facts.items()
        if when.startswith("valid_")
    }
    return {
        "label": run.label,
        "folder": str(run.folder.path),
        "steps": facts.get("final_step", facts.get("steps")),
        "best_step": facts.get("best_step"),
        "stopped": facts.get("stopped"),
        "validation": valid,
        "frames_per_s": round(frames / seconds, 1) if seconds else None,
        "median_step_s": statistics.median(line["seconds"] for line in trained)
        if trained
        else None,
        "seconds": round(seconds, 1),
        "padding": round(1 - frames / padded, 4) if padded else None,
        "memory_bytes": max((line.get("memory_bytes", 0) for line in trained), default=0),
        "adapter_bytes": run.adapter_bytes,
        "trainable_parameters": facts.get("trainable_parameters"),
        "has_settings": "settings" in facts,
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return found


def rows_of(result: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The table: name of a row, a cell for each run."""
    runs = result["runs"]
    rows: list[tuple[str, list[str]]] = [
        (name, [_shown(value) for value in values]) for name, values in result["differ"].items()
    ]
    rows += [
        ("steps done", [_shown(run["steps"]) for run in runs]),
        ("best step", [_shown(run["best_step"]) for run in runs]),
    ]
    if any(run["stopped"] for run in runs):
        rows.append(("stopped", [_shown(run["stopped"]) for run in runs]))
    for when in ("initial", "best", "final", "base_initial", "base_best", "base_final"):
        for name in STREAMS:
            cells = [_shown(run["validation"].get(when, {}).get(name)) for run in runs]
            if any(cells):
                rows.append((f"valid {when.replace('_', ' ')}: {name}", cells))
    rows += [
        ("frames/s", [_shown(run["frames_per_s"]) for run in runs]),
        ("median step, s", [_shown(run["median_step_s"]) for run in runs]),
        ("training, s", [_shown(run["seconds"]) for run in runs]),
        ("padding, share", [_shown(run["padding"]) for run in runs]),
        ("memory, GB", [_shown(run["memory_bytes"] / 1e9) for run in runs]),
        ("adapter, MB", [_shown(run["adapter_bytes"] / 1e6) for run in runs]),
        ("trainable parameters", [_shown(run["trainable_parameters"]) for run in runs]),
    ]
    return rows


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,d}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def show(targets: list[str], runs_root: Path, *, page: Path | None, as_json: bool) -> None:
    runs = find_runs(targets, runs_root)
    result = compare(runs)
    if page is not None:
        write_atomic(page, compare_page(runs, result).encode())
    if as_json:
        show_json(result)
        return
    table = Table(box=None)
    table.add_column("")
    for run in result["runs"]:
        table.add_column(run["label"], overflow="fold", justify="right")
    for name, cells in rows_of(result):
        table.add_row(name, *cells)
    Console().print(table)
    for run in result["runs"]:
        if not run["has_settings"]:
            print(f"{run['label']}: made before settings were kept; they are not compared.")
    if page is not None:
        print(f"Page:  {page}")


def _styles(count: int) -> list[tuple[str, str, str]]:
    """Colour, dashes and sign of each run's lines."""
    found = []
    for index in range(count):
        round_, place = divmod(index, len(COLOURS))
        dashes, sign = DASHES[round_ % len(DASHES)]
        found.append((COLOURS[place], dashes, sign))
    return found


def compare_page(runs: Sequence[TrainRun], result: dict[str, Any]) -> str:
    """One HTML file: the table, and each curve of all runs in one panel; nothing is fetched."""
    from training.curves import STYLE, Line, panels, plot

    drawn = [{panel.title: panel for panel in panels(run.log, run.timing)} for run in runs]
    titles = list(dict.fromkeys(title for found in drawn for title in found))
    figures = []
    for title in titles:
        lines = []
        for index, found in enumerate(drawn):
            if title in found:
                panel = found[title]
                valid = panel.valid or panel.base
                css = f"run{index}"
                lines.append(Line(css, valid or panel.train, dots=bool(valid)))
        figures.append(
            f"<figure style='margin:0'><h2>{html.escape(title)}</h2>{plot(title, lines)}</figure>"
        )
    colours = "".join(
        f".run{i} {{ stroke: {colour}; fill: none; stroke-width: 2; "
        f"stroke-dasharray: {dashes}; }}\n"
        f"circle.run{i}-dot {{ fill: {colour}; }}\n"
        f".key.of-run{i}::before {{ color: {colour}; content: '{sign}'; }}\n"
        for i, (colour, dashes, sign) in enumerate(_styles(len(runs)))
    )
    labels = [
        f"<span class='key of-run{i}'>{html.escape(run.label)}</span>" for i, run in enumerate(runs)
    ]
    head = "".join(f"<th>{label}</th>" for label in labels)
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows_of(result)
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>Training runs compared</title><style>{STYLE}{colours}</style></head><body>"
        f"<h1>Training runs compared</h1><p>{' &nbsp; '.join(labels)}</p>"
        "<p>Validation where there is one, else each training step. Negative log-likelihoods are "
        f"in nats: lower is better.</p><div class='panels'>{''.join(figures)}</div>"
        f"<h2>Settings that differ, and what came of them</h2>"
        f"<table><tr><th></th>{head}</tr>{rows}</table></body></html>\n"
    )
