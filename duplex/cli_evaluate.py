"""`duplex evaluate` and `duplex grades`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from duplex.cli_options import RUNS, AsJson, Overrides, RunsRoot

evaluation = typer.Typer()


@evaluation.command()
def evaluate(
    targets: Annotated[list[str], typer.Argument(metavar="CONFIG|URL|CHECKPOINT|REPORT...")],
    against: Annotated[
        str | None, typer.Option(help="What to compare with: another such; `base` for a config.")
    ] = None,
    items: Annotated[
        list[str] | None,
        typer.Option(help="Items file; may be repeated; else data/prompts/seeds.yaml."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Report folder, else evaluation/.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Conversations of each item.")] = 1,
    weak: Annotated[
        bool, typer.Option("--weak-prompts", help="Use the items' weak_prompt where they have one.")
    ] = False,
    real_time: Annotated[
        bool, typer.Option("--real-time", help="Speak to servers at 80 ms a frame, not lock-step.")
    ] = False,
    allow: Annotated[
        str, typer.Option(metavar="KEY,…", help="Compare reports although these parts differ.")
    ] = "",
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VERDICT[:MEASURE]",
            help="Exit 1 on it: regressed, not-improved:facts_said; may be repeated.",
        ),
    ] = None,
    grades: Annotated[
        Path | None, typer.Option(help="People's grades of these models, to stand in the report.")
    ] = None,
    runs: RunsRoot = RUNS,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Hold the same conversations with each model, and say which did better and how sure that is.

    A config's stage 9 is base against merged; servers and checkpoint folders are compared as
    given; of reports the protocols must be the same.

    Example: duplex evaluate configs/pocket.yaml --fail-on regressed
    """
    from pipeline import commands
    from pipeline.evaluate_targets import EvaluateOptions

    options = EvaluateOptions(
        against=against, items=tuple(items or ()), out=out,
        seeds=seeds, weak=weak, real_time=real_time,
        overrides=tuple(overrides or ()), fail_on=tuple(fail_on or ()),
        allow=tuple(filter(None, allow.split(","))),
        grades=grades,
    )  # fmt: skip
    commands.evaluate(targets, options, runs, as_json=as_json)


@evaluation.command()
def grades(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="grades.jsonl of `serve`, in the run folder.")
    ],
    items: Annotated[
        list[str] | None,
        typer.Option(help="Items file with the words of the place; else data/prompts/seeds.yaml."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count people's grades by model, and say how far ours of the same conversations agree.

    Example: duplex grades runs/pocket/grades.jsonl
    """
    from pipeline import grades_command

    grades_command.run(path, items or [], as_json=as_json)
