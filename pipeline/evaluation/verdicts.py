"""What an evaluation says of models: verdicts over items, whether they may be compared at all, and
whether CI is to fail.

A conversation enters by its *sums*: for each measure what it adds up and how many it counts. Those
of an item's seeds are added: the item weighs as much with one seed as with ten. A clip that was
scored teacher-forced enters by its value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from duplex.base import rounded
from duplex.errors import RequestError
from duplex.verdict import Better, Pair, Word, compare
from pipeline.evaluation.likelihood import LIKELIHOODS, Likelihood, likelihood_sums
from pipeline.evaluation.measures import MEASURES, Measure

# The same for all models by design, or a check that has ended the evaluation where it fails.
# `p95` has no value of one item's.
NOT_JUDGED = {"prompt_proven", "response_delay_p95_s"}
JUDGED = tuple(measure for measure in MEASURES if measure.key not in NOT_JUDGED)


def item_sums(conversations: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Item -> measure -> [sum, count] over its seeds.

    Args:
        conversations: of one model, as report.json holds them.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for conversation in conversations:
        totals = found.setdefault(conversation["item"], {})
        for key, (total, count) in conversation["sums"].items():
            so_far = totals.setdefault(key, [0.0, 0.0])
            totals[key] = [so_far[0] + total, so_far[1] + count]
    return found


def verdicts(
    conversations: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    likelihood: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Each further model against the first: `from`, `to`, and `rows`, one for each measure: a
    `duplex.verdict.Finding` with the measure's key, label and unit. All are corrected together.

    Args:
        conversations: of all models, as report.json holds them.
        likelihood: clips of all models, as report.json holds them; without any there are no rows
            of them.
    """
    played = {label: item_sums(c for c in conversations if c["model"] == label) for label in labels}
    forced = {label: likelihood_sums(likelihood, label) for label in labels}
    measures: list[Measure | Likelihood] = [*JUDGED, *(LIKELIHOODS if likelihood else ())]
    asked: dict[str, tuple[Sequence[Pair], Better]] = {}
    for label in labels[1:]:
        for measure in measures:
            by_model = forced if isinstance(measure, Likelihood) else played
            first, last = by_model[labels[0]], by_model[label]
            assert list(first) == list(last), f"{label} must have been given the same items"
            pairs = [
                Pair(*first[item].get(measure.key, (0, 0)), *last[item].get(measure.key, (0, 0)))
                for item in first
            ]
            asked[f"{label} {measure.key}"] = (pairs, measure.better)
    found = compare(asked)
    return [
        {
            "from": labels[0],
            "to": label,
            "rows": [
                {
                    "key": measure.key,
                    "label": measure.label,
                    "unit": measure.unit,
                    "kind": "rate" if measure.kind == "rate" else "mean",
                    "better": measure.better,
                    **rounded(asdict(found[f"{label} {measure.key}"])),
                }
                for measure in measures
            ],
        }
        for label in labels[1:]
    ]


def check_conditions(fail_on: Sequence[str], num_models: int) -> None:
    """To be asked before anything is played.

    Raises:
        RequestError: a word or a measure that there is not; or too few models to compare.
    """
    failures([], fail_on)
    if fail_on and num_models < 2:
        raise RequestError("--fail-on needs two models to compare, found one: give --against")


def failures(compared: Sequence[Mapping[str, Any]], fail_on: Sequence[str]) -> list[str]:
    """What of the verdicts is to fail CI: `facts_said regressed: base -> merged`.

    Args:
        fail_on: a verdict's word, of any measure or of one: `regressed`,
            `not-improved:facts_said`.

    Raises:
        RequestError: a word or a measure that there is not.
    """
    words = {word.replace(" ", "-"): word for word in get_args(Word)}
    keys = [measure.key for measure in (*JUDGED, *LIKELIHOODS)]
    found = []
    for condition in fail_on:
        named, colon, key = condition.partition(":")
        negated = named not in words and named.startswith("not-")
        word = words.get(named.removeprefix("not-") if negated else named)
        if word is None or (colon and key not in keys):
            raise RequestError(
                "--fail-on must be a verdict, of one measure if you name it: "
                f"{', '.join(words)}, or not-… of these; for measures {', '.join(keys)}. "
                f"Found {condition!r}"
            )
        for one in compared:
            rows = [(row["key"], row["word"]) for row in one["rows"] if key in ("", row["key"])]
            # A measure of which a report has no row was not measured.
            rows = rows or [(key, "not measured")]
            found += [
                f"{name} {said}: {one['from']} -> {one['to']}"
                for name, said in rows
                if (said == word) is not negated
            ]
    return found
