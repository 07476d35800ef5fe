"""What an evaluation says of two models: a verdict for each measure, by pairs of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from duplex.verdict import Better, Pair, compare
from pipeline.evaluation.scoring import MEASURES, Measure, Measured

# The same for both models by design, or a check that has ended the evaluation where it fails.
NOT_JUDGED = {"prompt_proven"}


def verdicts(first: Sequence[Measured], last: Sequence[Measured]) -> list[dict[str, Any]]:
    """A row for each measure: `duplex.verdict.Finding` with the measure's key, label and unit.

    Args:
        first, last: conversations of the two models over the same items, in the same order.
    """
    assert [m.spoken.item.id for m in first] == [m.spoken.item.id for m in last]
    judged = [measure for measure in MEASURES if measure.key not in NOT_JUDGED]
    pairs: dict[str, tuple[Sequence[Pair], Better]] = {
        measure.key: (
            [
                Pair(*_sums(measure, a), *_sums(measure, b))
                for a, b in zip(first, last, strict=True)
            ],
            measure.better,
        )
        for measure in judged
    }
    found = compare(pairs)
    return [
        {
            "key": measure.key,
            "label": measure.label,
            "unit": measure.unit,
            "kind": "rate" if measure.kind == "rate" else "mean",
            "better": measure.better,
            **{
                name: round(value, 6) if isinstance(value, float) else value
                for name, value in asdict(found[measure.key]).items()
            },
        }
        for measure in judged
    ]


def _sums(measure: Measure, measured: Measured) -> tuple[float, float]:
    """Sum and count of what one conversation gives; a median's values are averaged here."""
    values = measure.values(measured)
    if measure.kind == "rate":
        return sum(hits for hits, _ in values), sum(trials for _, trials in values)
    return sum(values), len(values)
