"""`duplex evaluate` of what is there already: servers, checkpoint folders, reports.

Servers and checkpoints are played to and written about; reports are only compared, and only where
their protocols are the same but for what `--allow` names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from duplex import configfile
from duplex.config import EvaluateSection
from duplex.errors import RequestError
from duplex.files import write_atomic
from duplex.verdict import can_tell, least_items
from pipeline.evaluate import play_settings, protocol_of, require_proofs, speak_items
from pipeline.evaluation.verdicts import check_conditions, failures
from pipeline.grades_command import grades_data

SCHEMES = ("http://", "https://", "ws://", "wss://")
REPORT = "report.json"


@dataclass(frozen=True)
class EvaluateOptions:
    """What the command line says of an evaluation without a config."""

    against: str | None = None
    items: tuple[str, ...] = ()
    out: Path | None = None
    seeds: int = 1
    weak: bool = False
    real_time: bool = False
    allow: tuple[str, ...] = ()
    fail_on: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    grades: Path | None = None


def is_report(target: str) -> bool:
    path = Path(target)
    return path.name == REPORT or (path / REPORT).is_file()


def evaluate_to_folder(targets: Sequence[str], options: EvaluateOptions) -> dict[str, Any]:
    """Play the items to servers and checkpoint folders; write a report to `options.out`.

    Returns:
        `report`: path of report.html; `verdicts` as in report.json; `failed`: what of them
        `options.fail_on` names.

    Raises:
        RequestError: a target that is none, or an option that does not go with it.
        DataFileError: the items.
        MissingInputError: no file with people's grades.
        ServerError: a server cannot be reached, or a conversation broke; or with `fail_on` a
            prompt is not proven (the report is written then).
    """
    from pipeline.evaluation.checkpoints import Machine, play_checkpoints
    from pipeline.evaluation.found import recordings
    from pipeline.evaluation.play import Played, evaluate_urls
    from pipeline.evaluation.report import page_files

    # Before anything is played.
    check_conditions(options.fail_on, num_models=len(targets) + bool(options.against))
    people = grades_data(options.grades, options.items) if options.grades else None
    named = name_targets([*([options.against] if options.against else []), *targets])
    section = section_of(options)
    urls = {label: target for label, target in named.items() if target.startswith(SCHEMES)}
    folders = {label: Path(target) for label, target in named.items() if label not in urls}
    if options.real_time and folders:
        listed = ", ".join(map(str, folders.values()))
        raise RequestError(f"--real-time is for servers, found the folder {listed}")
    spoken = speak_items(section)
    own = None if urls else _tokenizer(next(iter(folders.values())))
    settings = replace(play_settings(section, tokenizer=own), lockstep=not options.real_time)
    machine = Machine(section.runtime.device, section.runtime.slots)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # stdout may have to be JSON

    played: dict[str, Played] = {}
    for label, folder in folders.items():
        found, _ = play_checkpoints(
            {label: folder}, spoken, settings, machine, say, tokenizer=_tokenizer(folder)
        )
        played[label] = found[0]
    settings = replace(settings, at_a_time=machine.slots)
    played |= {one.label: one for one in evaluate_urls(urls, spoken, settings, say)}
    ordered = [played[label] for label in named]
    about = {"name": " and ".join(named), "items": ", ".join(section.items)}
    fixed, loose = page_files(
        ordered, {}, about=about, protocol=protocol_of(section, settings), training=[],
        people=people,
    )  # fmt: skip
    out = options.out or Path("evaluation")
    _clear(out)
    for name, content in {**fixed, **loose, **recordings(ordered)}.items():
        write_atomic(out / name, content)
    compared = json.loads(fixed[REPORT])["verdicts"]
    if options.fail_on:
        require_proofs(ordered)
    return {
        "report": str(out / "report.html"),
        "verdicts": compared,
        "failed": failures(compared, options.fail_on),
    }


def section_of(options: EvaluateOptions) -> EvaluateSection:
    """The section that the options describe: `--set evaluate.KEY=VALUE`, then what has an option.

    Raises:
        ConfigError: an override that is none, or of another section.
    """
    section: EvaluateSection = configfile.section_of("evaluate", options.overrides)
    changes: dict[str, Any] = {}
    if options.items:
        changes["items"] = options.items
    if options.seeds != 1:
        changes["seeds"] = options.seeds
    if options.weak:
        changes["prompts"] = "weak"
    return section.model_copy(update=changes)


def _clear(folder: Path) -> None:
    """Remove what an earlier report left here that the new one need not write again, so that no
    judge's word on other models stands beside it. The judge's paid replies (judge/) stay."""
    if (folder / REPORT).is_file():
        stale = [folder / name for name in ("judge.json", "judge.html", "people.json")]
        for path in [*stale, *(folder / "conversations").glob("*.wav")]:
            path.unlink(missing_ok=True)


def _tokenizer(folder: Path) -> bytes:
    from pipeline.engines.checkpoint import Checkpoint

    return Checkpoint.open(folder).files()["tokenizer"].read_bytes()


def name_targets(targets: Sequence[str]) -> dict[str, str]:
    """A short name for each: a server's host and port, a folder's name, as a file name may hold
    them.

    Raises:
        RequestError: neither a server's URL nor a folder.
    """
    named: dict[str, str] = {}
    for target in targets:
        label = urlsplit(target).netloc.rpartition("@")[2] if target.startswith(SCHEMES) else ""
        if not label and not target.startswith(SCHEMES) and Path(target).is_dir():
            folder = Path(target).resolve()
            label = folder.parent.name if folder.name == "checkpoint" else folder.name
        if not label:
            raise RequestError(
                "what is evaluated must be a config (.yaml), a server as http://host:port or "
                f"ws://…, a checkpoint folder, or reports (report.json); found {target}"
            )
        name = re.sub(r"[^a-z0-9.-]+", "-", label.lower()).strip("-.") or "model"
        count = sum(other == name or other.startswith(f"{name}-again") for other in named)
        named[f"{name}-again{count}" if count else name] = target
    return named


# -- reports


def compare_reports(targets: Sequence[str], options: EvaluateOptions) -> dict[str, Any]:
    """Verdicts between the last models of several reports, each against the first report's.

    Raises:
        RequestError: fewer than two, a file that is no report, or protocols that differ.
    """
    from pipeline.evaluation.comparison import compare_reports as compare
    from pipeline.evaluation.comparison import read_report

    if options.grades:
        raise RequestError("--grades is for servers and checkpoints; see `duplex grades`")
    if options.out or options.overrides or options.items:
        raise RequestError(
            "reports are only compared: --out, --set and --items are for what is played. The table "
            "is printed, and all of it with --json"
        )
    paths = [*([options.against] if options.against else []), *targets]
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise RequestError(f"reports must be different ones, found one twice: {', '.join(paths)}")
    if len(paths) < 2:
        raise RequestError(
            "a report is compared with another one: give two, or one and --against; "
            f"found {', '.join(paths)}"
        )
    found = compare({path: read_report(Path(path)) for path in paths}, options.allow)
    return {
        "report": None,
        "verdicts": found,
        "failed": failures(found, options.fail_on),
    }


def show_verdicts(compared: Sequence[Mapping[str, Any]]) -> None:
    """A table for each pair of models, on standard output."""
    from rich.console import Console
    from rich.table import Table

    colours = {"improved": "green", "regressed": "red", "differs": "yellow"}
    console = Console()
    for one in compared:
        table = Table(title=f"{one['from']} -> {one['to']}")
        for head in ("measure", "verdict", "difference", "interval", "p", "items"):
            table.add_column(head, justify="left" if head in ("measure", "verdict") else "right")
        for row in one["rows"]:
            if row["n"] == 0:
                continue
            span = "" if row["low"] is None else f"{row['low']:+.3g} to {row['high']:+.3g}"
            p = "" if row["p_holm"] is None else f"{row['p_holm']:.2g}"
            colour = colours.get(row["word"], "dim")
            table.add_row(
                row["label"], f"[{colour}]{row['word']}[/]", f"{row['difference']:+.3g}", span, p,
                str(row["n"]),
            )  # fmt: skip
        console.print(table)
        told = [row for row in one["rows"] if row["word"] in colours]
        able = sum(can_tell(row["differ"]) for row in one["rows"])
        if not told:
            console.print(
                f"Nothing can be concluded; a verdict takes {least_items(max(1, able))} items at "
                "least, all pointing one way."
            )
