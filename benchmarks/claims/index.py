"""docs/results/claims/README.md: what each page says, and what to try on the 7B, of the NAME.json
that are there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.claims.page import sentence
from benchmarks.claims.plan import Claim, claim_names, load_claim
from benchmarks.claims.tables import shown
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
    lines = [HEAD, "| page | what was found |", "| --- | --- |"]
    for name, claim in claims.items():
        if name in results:
            found = sentence(claim, results[name]["measures"])
            lines.append(f"| [{claim.title}]({name}.md) | {found} |")
    missing = [claim.title for name, claim in claims.items() if name not in results]
    if missing:
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    lines += ["", "## What to try on the 7B, in this order", ""]
    lines += [
        "First what made a difference here, by how much of the key measure it moved; then what "
        "made none that could be seen.",
        "",
        "| | try | because | page |",
        "| ---: | --- | --- | --- |",
    ]
    for number, (name, effect) in enumerate(ranked(claims, results), 1):
        claim = claims[name]
        because = claim.seven_b.shown if effect else claim.seven_b.not_shown
        size = f" (moved by {100 * effect:.0f} %)" if effect else ""
        lines.append(f"| {number} | {claim.order}{size} | {because} | [{name}]({name}.md) |")
    return "\n".join([*lines, ""])


def ranked(
    claims: Mapping[str, Claim], results: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, float]]:
    """Claims with something to try, and how far the key measure moved, as a share of the
    reference's value; 0 where no verdict stands."""
    found = [
        (name, largest_effect(claims[name], result["measures"]))
        for name, result in results.items()
        if claims[name].order
    ]
    return sorted(found, key=lambda one: (-one[1], one[0]))


def largest_effect(claim: Claim, measures: list[dict[str, Any]]) -> float:
    one = next(one for one in measures if one["key"] == claim.key and not one["group"])
    value = next(row["value"] for row in one["rows"] if row["arm"] == claim.reference)
    rows = shown(measures, claim.key)
    return max((abs(row["difference"]) / max(abs(value or 0), 1e-9) for row in rows), default=0.0)
