"""`duplex grades`: what people thought of their conversations, beside our grade of the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duplex.config import EvaluateSection


def grades_data(path: Path, items: Sequence[str] = ()) -> dict[str, Any]:
    """`people_data` of a grades.jsonl, with the words of these items files, or the default's.

    Raises:
        MissingInputError: no such file.
        DataFileError: the items.
    """
    from pipeline.evaluation.items import load_place_words
    from pipeline.evaluation.people import people_data

    return people_data(path, load_place_words(tuple(items) or EvaluateSection().items))


def run(path: Path, items: Sequence[str], *, as_json: bool) -> None:
    """Raises as `grades_data`."""
    found = grades_data(path, items)
    if as_json:
        print(json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pipeline.evaluation.people import told

    console = Console()
    table = Table(title=f"{found['conversations']} conversations, graded by people")
    for head in ("model", "n", *(found["models"][0]["grades"] if found["models"] else ())):
        table.add_column(head, justify="left" if head == "model" else "right")
    for row in found["models"]:
        shares = [
            f"{grade['hits']} ({100 * grade['low']:.0f}–{100 * grade['high']:.0f} %)"
            for grade in row["grades"].values()
        ]
        name = f"{row['label'] or 'model'} {row['model_digest'][:12]}"
        table.add_row(escape(name), str(row["n"]), *shares)
    console.print(table)
    _show_agreement(console, found["agreement"])
    for line in told(found):
        console.print(line, markup=False, highlight=False)


def _show_agreement(console: Any, agreement: Mapping[str, Any]) -> None:
    from rich.table import Table

    if not agreement["n"]:
        return
    table = Table(title="rows: our grade; columns: people's")
    for head in ("", *agreement["categories"]):
        table.add_column(head, justify="right" if head else "left")
    for name, row in zip(agreement["categories"], agreement["table"], strict=True):
        table.add_row(name, *map(str, row))
    console.print(table)
