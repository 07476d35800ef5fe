"""The commands about training: `duplex compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from duplex.cli_options import RUNS, AsJson, RunsRoot

training = typer.Typer()


@training.command()
def compare(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Train stage folders, run folders or configs."),
    ],
    page: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Curves over each other: a file.")
    ] = None,
    runs: RunsRoot = RUNS,
    as_json: AsJson = False,
) -> None:
    """Lay training runs side by side: settings that differ, validation, speed, size.

    Example: duplex compare runs/pocket/06-train-1a2b3c4d runs/pocket/06-train-5e6f7a8b
    """
    from pipeline import compare as comparison

    comparison.show(targets, runs, page=page, as_json=as_json)
