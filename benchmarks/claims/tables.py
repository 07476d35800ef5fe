"""Cells -> what a claim's page says: each arm against the reference. Pure.

A value is pooled: hits over trials, or a sum over its count. A difference is taken as in
`duplex.verdict`: the mean over items, each item pooled over the seeds of both arms, so that items
are what is drawn. Three trained models are no sample to speak of: a verdict stands only where the
same mean of each seed alone points its way too, else the word is `seeds disagree`; a seed without
an item that both arms have is a word of its own. The deciding arms' differences in the key measure,
over all items, are corrected among themselves (Holm); all others of a page, its measures, groups
and arms, are corrected together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.claims.plan import KNOWN, Claim, Outcome
from duplex.base import rounded
from duplex.verdict import LEVEL, Finding, Pair, can_tell, compare
from pipeline.evaluation.likelihood import HELD_OUT, Likelihood

DISAGREE, UNMEASURED = "seeds disagree", "a seed measures nothing"
TOO_FEW = "too few items"  # that differ: whatever they said, p could not pass
VERDICTS = ("improved", "regressed", "differs")
Sums = dict[str, tuple[float, float]]  # item -> sum and count

GROUPS = {
    "": "all",
    "seen": "personas that were trained on",
    "elsewhere": "personas that were trained on, in situations that are in no data",
    "unseen": "personas of the same data that were not",
    "new": "customers that are in no data",
}


def group_of(conversation: Mapping[str, Any], trained: Iterable[str]) -> str:
    if conversation["persona"] is None:
        return "new"
    if conversation["persona"] not in trained:
        return "unseen"
    return "elsewhere" if conversation.get("situation") else "seen"


def groups_of(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """All of GROUPS that some conversation is of, `""` among them, in that order."""
    found = {
        group_of(one, trained_in(cells, cell["seed"]))
        for cell in cells
        for one in cell["conversations"]
    }
    return [group for group in GROUPS if group in found | {""}]


def sums_of_cell(
    cell: Mapping[str, Any], key: str, group: str = "", trained: frozenset[str] = frozenset()
) -> Sums:
    """Item or clip -> sum and count of a measure in one cell."""
    if isinstance(KNOWN[key], Likelihood):
        # A run's own clips are of its seed; the base's are the same for all.
        of = {HELD_OUT: f" {cell['seed']}"}
        return {
            f"{one['group']} {one['clip']}{of.get(one['group'], '')}": (one["values"][key], 1.0)
            for one in cell["likelihood"]
            if one["values"].get(key) is not None
        }
    return {
        one["item"]: (one["sums"][key][0], one["sums"][key][1])
        for one in cell["conversations"]
        if group in ("", group_of(one, trained))
    }


def pooled(sums: Sums) -> float | None:
    """Sum over count; of a likelihood: the mean of clips."""
    count = sum(c for _, c in sums.values())
    return sum(s for s, _ in sums.values()) / count if count else None


def over_seeds(by_seed: Sequence[Sums]) -> Sums:
    found: Sums = {}
    for sums in by_seed:
        for item, (total, count) in sums.items():
            so_far = found.get(item, (0.0, 0.0))
            found[item] = (so_far[0] + total, so_far[1] + count)
    return found


def compared(claim: Claim, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each measure (and group) its rows, one for each arm in the claim's order.

    Args:
        cells: of all arms, with the same seeds each; arms that could not be run may be missing.

    Returns:
        `key`, `group`, `label`, `unit`, `kind`, `better` and `rows`: `arm`, `value`, `by_seed`,
        `trials`, and of all but the reference the fields of a `duplex.verdict.Finding`.
    """
    arms = [arm for arm in claim.arms if any(cell["arm"] == arm for cell in cells)]
    groups = groups_of(cells) if claim.groups else [""]
    asked: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    for key in claim.measures:
        measure = KNOWN[key]
        for group in groups if not isinstance(measure, Likelihood) else [""]:
            by_arm = {arm: _by_seed(cells, arm, key, group) for arm in arms}
            first = over_seeds(by_arm[claim.reference])
            rows: list[dict[str, Any]] = []
            for arm in arms:
                last = over_seeds(by_arm[arm])
                rows.append(
                    {
                        "arm": arm,
                        "value": pooled(last),
                        "by_seed": [pooled(sums) for sums in by_arm[arm]],
                        "trials": sum(count for _, count in last.values()),
                    }
                )
                if arm != claim.reference:
                    asked[f"{key}/{group}/{arm}"] = (paired(first, last), measure.better)
                    rows[-1]["seed_differences"] = [
                        mean_difference(paired(a, b))
                        for a, b in zip(by_arm[claim.reference], by_arm[arm], strict=True)
                    ]
            found.append(
                {
                    "key": key,
                    "group": group,
                    "label": measure.label,
                    "unit": measure.unit,
                    "kind": "rate" if measure.kind == "rate" else "mean",
                    "better": measure.better,
                    "rows": rows,
                }
            )
    primary = {f"{claim.key}//{arm}" for arm in claim.deciding_arms} & asked.keys()
    for family in (primary, asked.keys() - primary):
        verdicts = compare({key: asked[key] for key in asked if key in family})
        size = sum(can_tell(finding.differ) for finding in verdicts.values())
        for one in found:
            for row in one["rows"]:
                finding = verdicts.get(f"{one['key']}/{one['group']}/{row['arm']}")
                if finding is not None:
                    word = _word(finding, row["seed_differences"], size)
                    row |= asdict(finding) | {"word": word}
    return [_rounded(one) for one in found]


def _rounded(one: dict[str, Any]) -> dict[str, Any]:
    lists = ("by_seed", "seed_differences")
    return one | {
        "rows": [
            rounded(row)
            | {
                key: [v if v is None else round(v, 6) for v in row[key]]
                for key in lists
                if key in row
            }
            for row in one["rows"]
        ]
    }


def _by_seed(cells: Sequence[Mapping[str, Any]], arm: str, key: str, group: str) -> list[Sums]:
    """Who was trained on is asked of the seed's trained cells: the base has none of its own."""
    mine = sorted((cell for cell in cells if cell["arm"] == arm), key=lambda cell: cell["seed"])
    return [
        sums_of_cell(cell, key, group, trained_in(cells, cell["seed"]))
        if group
        else sums_of_cell(cell, key)
        for cell in mine
    ]


def trained_in(cells: Sequence[Mapping[str, Any]], seed: int) -> frozenset[str]:
    """Personas that some arm of that seed was trained on."""
    return frozenset(
        persona for cell in cells if cell["seed"] == seed for persona in cell["trained"]
    )


def paired(first: Sums, last: Sums) -> list[Pair]:
    return [Pair(*first[item], *last[item]) for item in first if item in last]


def mean_difference(pairs: Sequence[Pair]) -> float | None:
    """Over the items that both measure."""
    found = [
        pair.sum_b / pair.count_b - pair.sum_a / pair.count_a
        for pair in pairs
        if pair.count_a and pair.count_b
    ]
    return sum(found) / len(found) if found else None


def _word(finding: Finding, by_seed: Sequence[float | None], family: int) -> str:
    if finding.word == "inconclusive" and 2.0 ** (1 - finding.differ) * max(family, 1) > LEVEL:
        return TOO_FEW
    if finding.word not in VERDICTS:
        return finding.word
    if None in by_seed:
        return UNMEASURED
    assert finding.difference is not None
    agree = all(one is not None and one * finding.difference > 0 for one in by_seed)
    return finding.word if agree else DISAGREE


def key_measure(claim: Claim, measures: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(one for one in measures if one["key"] == claim.key and not one["group"])


def deciding(claim: Claim, measures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the key measure, over all items, of the arms that answer the question."""
    return [
        row for row in key_measure(claim, measures)["rows"] if row["arm"] in claim.deciding_arms
    ]


def decided(
    claim: Claim, measures: Sequence[Mapping[str, Any]]
) -> tuple[Outcome, Mapping[str, Any]]:
    """The outcome, and the deciding row that says it most clearly. `better`: some arm improves on
    the reference by `least` or more; `worse`: none does, and some regress by that; `none`:
    neither can be told."""
    rows = deciding(claim, measures)
    words: dict[Outcome, str] = {"better": "improved", "worse": "regressed"}
    for found, word in words.items():
        said = [r for r in rows if r["word"] == word and abs(r["difference"]) >= claim.least]
        if said:
            return found, max(said, key=clearness)
    return "none", max(rows, key=clearness)


def clearness(row: Mapping[str, Any]) -> float:
    """The difference in halves of its 95 % interval; 0 where there is none."""
    if row.get("low") is None or row["high"] == row["low"]:
        return 0.0
    return 2 * abs(row["difference"]) / (row["high"] - row["low"])


def beside(
    claim: Claim, measures: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Measure and row, over all items, that speak against what the key measure says: what got worse
    in the arm that did better, what got better in arms of which none did, or either."""
    found, row = decided(claim, measures)
    arms = [row["arm"]] if found == "better" else claim.deciding_arms
    words = {"better": ("regressed",), "worse": ("improved",), "none": ("improved", "regressed")}
    return [
        (one, row)
        for one in measures
        for row in one["rows"]
        if not one["group"] and one["key"] != claim.key
        and row["arm"] in arms and row.get("word") in words[found]
    ]  # fmt: skip


def held_out_personas(cells: Sequence[Mapping[str, Any]], reference: str) -> dict[str, list[str]]:
    """Seed -> personas of the clips that the reference was not trained on, by the clips' ids."""
    return {
        str(cell["seed"]): sorted(
            {
                one["clip"].partition(".")[0]
                for one in cell["likelihood"]
                if one["group"] == HELD_OUT
            }
        )
        for cell in cells
        if cell["arm"] == reference and cell["likelihood"]
    }


def mean_curves(cells: Sequence[Mapping[str, Any]], arm: str) -> dict[str, dict[str, list[Any]]]:
    """Curve -> split -> [step, mean over seeds], at the steps that all seeds have."""
    of_arm = [cell["curves"] for cell in cells if cell["arm"] == arm and cell.get("curves")]
    found: dict[str, dict[str, list[Any]]] = {}
    for name in of_arm[0] if of_arm else ():
        for split in of_arm[0][name]:
            by_step: dict[int, list[float]] = {}
            for curves in of_arm:
                for step, value in curves[name][split]:
                    by_step.setdefault(int(step), []).append(value)
            found.setdefault(name, {})[split] = [
                [step, round(sum(values) / len(values), 6)]
                for step, values in sorted(by_step.items())
                if len(values) == len(of_arm)
            ]
    return found
