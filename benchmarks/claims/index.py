"""docs/results/claims/README.md: what each page says, and what to try on the 7B, of the NAME.json
that are there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.page import change, key_result, other_comparisons
from benchmarks.claims.plan import Claim, Outcome, claim_names, load_claim
from benchmarks.claims.tables import VERDICTS, deciding, key_measure, outcome
from duplex.files import write_atomic

HEAD = """\
# The claims, measured

Each page holds one claim of the documents that the project started from against the pocket model,
with its command. `python -m benchmarks.claims NAME` measures it again, `python -m benchmarks.claims
index` writes this page. Three seeds and some dozens of items find large differences only: "no
difference" means none that this size can show.
"""


def write_index(folder: Path) -> None:
    results = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in claim_names()
        if (folder / f"{name}.json").exists()
    }
    write_atomic(folder / "README.md", describe_index(results).encode())


def describe_index(results: Mapping[str, Mapping[str, Any]]) -> str:
    claims = {name: load_claim(name) for name in claim_names()}
    lines = [HEAD, "| page | what was found | of other comparisons | show a difference |"]
    lines += ["| --- | --- | ---: | ---: |"]
    for name, claim in claims.items():
        if name in results:
            measures = results[name]["measures"]
            others = [row["word"] in VERDICTS for _, row in other_comparisons(claim, measures)]
            lines.append(
                f"| [{claim.title}]({name}.md) | {key_result(claim, measures)} "
                f"| {len(others)} | {sum(others)} |"
            )
    missing = [claim.title for name, claim in claims.items() if name not in results]
    if missing:
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    lines += ["", "## What to try on the 7B, in this order", ""]
    lines += [
        "First where another setting than ours did better, then where ours was the best of those "
        "tried, then where nothing can be told; in each by how far the difference is from 0, in "
        "halves of its interval.",
        "",
        "| | knob | what was found | for a 7B run |",
        "| ---: | --- | --- | --- |",
    ]
    for number, (name, found, row) in enumerate(ranked(claims, results), 1):
        claim = claims[name]
        lines.append(
            f"| {number} | [{claim.knob}]({name}.md) "
            f"| {_found(claim, results[name]['measures'], row)} "
            f"| {getattr(claim.seven_b, found)} |"
        )
    return "\n".join([*lines, ""])


def _found(claim: Claim, measures: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str:
    one = key_measure(claim, measures)
    return f"{one['label']}: `{row['arm']}` against `{claim.reference}`: {change(one, row)}"


def ranked(
    claims: Mapping[str, Claim], results: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, Outcome, dict[str, Any]]]:
    """Claims with a knob: name, outcome, and the row that says it most clearly."""
    order: dict[Outcome, int] = {"better": 0, "worse": 1, "none": 2}
    wanted = {"better": "improved", "worse": "regressed"}
    rows: list[tuple[str, Outcome, dict[str, Any]]] = []
    for name, result in results.items():
        if claims[name].knob:
            of_key = deciding(claims[name], result["measures"])
            found = outcome(of_key)
            said = [row for row in of_key if found == "none" or row["word"] == wanted[found]]
            rows.append((name, found, max(said, key=clearness)))
    return sorted(rows, key=lambda one: (order[one[1]], -clearness(one[2]), one[0]))


def clearness(row: Mapping[str, Any]) -> float:
    """The difference in halves of its 95 % interval; 0 where there is none."""
    if row["low"] is None or row["high"] == row["low"]:
        return 0.0
    return 2 * abs(row["difference"]) / (row["high"] - row["low"])
