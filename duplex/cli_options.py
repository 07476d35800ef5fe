"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunsRoot = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where run folders are.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as in train.steps=20."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
RUNS = Path("runs")
