"""docs/results/claims/README.md: what each page says, what all arms gave, and what to try on the
7B, of the NAME.json that are there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.claims.page import (
    BESIDE,
    against,
    change,
    is_of,
    key_result,
    listing,
    meaning,
    said_of,
    shown,
)
from benchmarks.claims.plan import BASE, Claim, Outcome, claim_names, load_claim, pocket_base
from benchmarks.claims.tables import VERDICTS, beside, decided, key_measure
from duplex.files import write_atomic

HEAD = """\
# The claims, measured

Each page holds one claim of the documents that the project started from against the pocket model,
with its command. `python -m benchmarks.claims NAME` measures it again, `python -m benchmarks.claims
index` writes this page. Three seeds and some dozens of items find large differences only:
"inconclusive" means that this size cannot show any.

Key measures were named before there were numbers. Their own correction, the least differences that
matter, that `depth` decides nothing, and 2e-6 as the reference of the rates were set when
alignment, before and after, learning rate, layers, padding, loss on the prompt, sampling and
semantic weight had been measured once.
"""
CLASSES: dict[tuple[Outcome, bool], str] = {  # outcome, and whether the arm has a price
    ("better", False): "Another setting than the reference did better, and no row of it worse.",
    ("better", True): "Another setting than the reference did better, at a price.",
    ("worse", False): "Keep the reference: no other did better by as much as matters, and some did "
    "worse.",
    ("none", False): "Too small to matter, or not to be told.",
}
AT_A_GLANCE = ("response_rate", "answered_in_words", "facts_said", "hallucinated")
FEW = 10  # trials, under which a share says less than its counts


def write_index(folder: Path) -> None:
    results = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in claim_names()
        if (folder / f"{name}.json").exists()
    }
    write_atomic(folder / "README.md", describe_index(results, pocket_base()).encode())


def describe_index(results: Mapping[str, Mapping[str, Any]], today: Mapping[str, Any]) -> str:
    """The page. today: of which base data/pocket is."""
    claims = {name: load_claim(name) for name in claim_names()}
    earlier = [claims[name].title for name, result in results.items() if not is_of(result, today)]
    lines = [HEAD]
    if earlier:
        lines += [
            f"Measured with an earlier pocket base than the one in data/pocket ({said_of(today)}), "
            f"as their pages say: {'; '.join(earlier)}.",
            "",
        ]
    lines += ["| page | against the claim | what was found |", "| --- | --- | --- |"]
    for name, claim in claims.items():
        if name in results:
            measures = results[name]["measures"]
            lines.append(
                f"| [{claim.title}]({name}.md) | {against(claim, measures)} "
                f"| {key_result(claim, measures)} |"
            )
    missing = [claim.title for name, claim in claims.items() if name not in results]
    if missing:
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    lines += ["", *_to_try(claims, results), "", *_at_a_glance(claims, results)]
    return "\n".join([*lines, ""])


def _to_try(claims: Mapping[str, Claim], results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "## What to try on the 7B, in this order",
        "",
        "In four classes; within one by the difference against the least that each page says would "
        "matter. Classes go by each page's key measure; what else an arm changes stands beside it. "
        "The arm that is named is the one with the clearest difference, not the largest.",
    ]
    number = 0
    for kind, mine in groupby(ranked(claims, results), key=lambda one: one[1]):
        lines += [
            "", f"**{CLASSES[kind]}**", "",
            f"| | knob | what was found | {BESIDE[kind[0]].lower()} | for a 7B run |",
            "| ---: | --- | --- | --- | --- |",
        ]  # fmt: skip
        for name, _, row in mine:
            number += 1
            claim, measures = claims[name], results[name]["measures"]
            lines.append(
                f"| {number} | [{claim.knob}]({name}.md) | {_found(claim, measures, row)} "
                f"| {listing(beside(claim, measures)) or 'none'} | {meaning(claim, measures)} |"
            )
    return lines


def _found(claim: Claim, measures: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str:
    one = key_measure(claim, measures)
    return f"{one['label']}: `{row['arm']}` against `{claim.reference}`: {change(one, row)}"


def ranked(
    claims: Mapping[str, Claim], results: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, tuple[Outcome, bool], Mapping[str, Any]]]:
    """Claims with a knob: name, class (of CLASSES), and the row that says it most clearly."""
    found: list[tuple[str, tuple[Outcome, bool], Mapping[str, Any]]] = []
    sizes: dict[str, float] = {}
    for name, result in results.items():
        claim, measures = claims[name], result["measures"]
        if not claim.knob:
            continue
        outcome, row = decided(claim, measures)
        has_price = outcome == "better" and bool(beside(claim, measures))
        found.append((name, (outcome, has_price), row))
        sizes[name] = abs(row.get("difference") or 0.0) / claim.least if claim.least else 0.0
    order = list(CLASSES)
    return sorted(found, key=lambda one: (order.index(one[1]), -sizes[one[0]], one[0]))


def _at_a_glance(
    claims: Mapping[str, Claim], results: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Every arm that talked: what was tried for a larger effect, and what it gave."""
    lines = [
        "## All arms that were tried",
        "",
        "Pooled over items and seeds. Pages differ in their items and steps: compare within a "
        f"page. `*`: a verdict against its page's reference. A share of under {FEW} is shown as "
        "counts. A turn counts as answered by sound; who makes sound without words makes nothing "
        "up.",
        "",
        "| page | arm | turns answered | of those in words | facts said | made up, of replies |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, result in results.items():
        by_key = {one["key"]: one for one in result["measures"] if not one["group"]}
        if not set(AT_A_GLANCE) & by_key.keys():
            continue
        for arm in claims[name].arms:
            cells = [_glance(by_key.get(key), arm) for key in AT_A_GLANCE]
            label = "base, no adapter" if arm == BASE else f"`{arm}`"
            lines.append(f"| [{name}]({name}.md) | {label} | {' | '.join(cells)} |")
    return lines


def _glance(one: Mapping[str, Any] | None, arm: str) -> str:
    row = next((row for row in one["rows"] if row["arm"] == arm), None) if one else None
    if one is None or row is None:
        return ""
    star = " *" if row.get("word") in VERDICTS else ""
    if row["value"] is not None and row["trials"] < FEW:
        return f"{row['value'] * row['trials']:.0f} of {row['trials']:.0f}{star}"
    return shown(one, row["value"]) + star
