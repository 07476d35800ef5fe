"""Whether one model did better than another on the same items, and how sure that is. Pure.

Both models played the same items with the same seeds. A *pair* is what an item gave for each of
them: a sum and a count, whose pooled ratio is the measure (hits and trials of a rate; the sum of
values and their number for a mean). What is asked of all pairs together is

    d = Σ sum_b / Σ count_b - Σ sum_a / Σ count_a

p-value   Under "the models do not differ" each item could have come out with its sides swapped.
          p is the share of swaps whose |d| is at least the one that was found: of all 2^n up to
          `ALL_SWAPS` items, else of `DRAWS` drawn ones with the found one among them. Exact at any
          n: with four items p is never under 1/8, and nothing can be concluded. (Fisher's paired
          permutation test; Phipson & Smyth 2010 for drawn ones.)
interval  Percentiles of d over `DRAWS` bootstrap samples of items, widened by sqrt(n / (n - 1)),
          since a bootstrap of few items is too narrow (Hesterberg 2015). It describes; p decides.
many      Holm 1979: with m measures asked at once, no verdict is wrong with more than `LEVEL`.

Items are taken as independent; several seeds of one item are one pair, their sums added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import numpy as np

LEVEL = 0.05
ALL_SWAPS = 11
DRAWS = 4_000

Better = Literal["high", "low", ""]
Word = Literal["improved", "regressed", "differs", "inconclusive", "not measured"]


class Pair(NamedTuple):
    """An item's sums and counts for the two models; a count of 0: nothing to measure there."""

    sum_a: float
    count_a: float
    sum_b: float
    count_b: float


@dataclass(frozen=True)
class Finding:
    """What a measure says. n: items where either model gave something to measure; value_a,
    value_b, difference, low, high: None where that is nothing; p, p_holm: None likewise."""

    word: Word
    n: int
    value_a: float | None = None
    value_b: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None


def compare(
    measures: dict[str, tuple[Sequence[Pair], Better]], seed: int = 0
) -> dict[str, Finding]:
    """A finding for each measure, corrected for their number.

    Args:
        measures: pairs by item, and which way is better; "": neither, then a difference is said to
            be one and no more.
        seed: of the swaps and samples that are drawn.
    """
    found = {key: _measured(pairs, seed) for key, (pairs, _) in measures.items()}
    adjusted = holm({key: one.p for key, one in found.items() if one.p is not None})
    return {
        key: _judged(one, adjusted[key], measures[key][1]) if key in adjusted else one
        for key, one in found.items()
    }


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: to be held against the level as they are."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p))
        adjusted[key] = highest
    return adjusted


def _judged(one: Finding, p_holm: float, better: Better) -> Finding:
    assert one.difference is not None
    word: Word = "inconclusive"
    if p_holm <= LEVEL and one.difference != 0:
        good = (one.difference > 0) == (better == "high")
        word = "differs" if not better else "improved" if good else "regressed"
    return Finding(
        word, one.n, one.value_a, one.value_b, one.difference, one.low, one.high, one.p, p_holm
    )


def _measured(pairs: Sequence[Pair], seed: int) -> Finding:
    """Everything but the verdict."""
    kept = np.array([pair for pair in pairs if pair.count_a or pair.count_b], dtype=float)
    n = len(kept)
    if not n:
        return Finding("not measured", 0)
    sums, counts = kept[:, [0, 2]], kept[:, [1, 3]]
    value_a, value_b = _ratios(sums.sum(0), counts.sum(0))
    if np.isnan(value_a) or np.isnan(value_b):
        return Finding("not measured", n, _plain(value_a), _plain(value_b))
    rng = np.random.default_rng(seed)
    low, high = _interval(sums, counts, rng)
    return Finding(
        "inconclusive", n, float(value_a), float(value_b), float(value_b - value_a), low, high,
        _swap_p(sums, counts, rng),
    )  # fmt: skip


def _ratios(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """sums / counts, nan where nothing was counted."""
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _differences(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """d of many samples: [R, 2] -> [R], nan where a side counted nothing."""
    ratios = _ratios(sums, counts)
    return ratios[:, 1] - ratios[:, 0]


def _swap_p(sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> float:
    n = len(sums)
    if n <= ALL_SWAPS:
        swaps = np.array(list(product((False, True), repeat=n)))
    else:
        swaps = rng.random((DRAWS, n)) < 0.5
        swaps[0] = False  # the one that was found
    kept = ~swaps

    def both(values: np.ndarray) -> np.ndarray:
        a = kept @ values[:, 0] + swaps @ values[:, 1]
        b = kept @ values[:, 1] + swaps @ values[:, 0]
        return np.stack([a, b], axis=1)

    differences = np.abs(_differences(both(sums), both(counts)))
    found = differences[0]  # no swap at all stands first in both lists
    # A swap that leaves one side with nothing tells nothing, and counts against the finding.
    return float(np.mean(np.isnan(differences) | (differences >= found - 1e-12)))


def _interval(
    sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator
) -> tuple[float | None, float | None]:
    n = len(sums)
    if n < 2:
        return None, None
    drawn = rng.integers(0, n, (DRAWS, n))
    differences = _differences(sums[drawn].sum(1), counts[drawn].sum(1))
    differences = differences[~np.isnan(differences)]
    centre = float(_differences(sums.sum(0)[None], counts.sum(0)[None])[0])
    wide = centre + (differences - centre) * np.sqrt(n / (n - 1))
    low, high = np.quantile(wide, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
