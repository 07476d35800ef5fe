"""Whether one model did better than another on the same items, and how sure that is. Pure.

Both models played the same items with the same seeds. A *pair* is what an item gave for each of
them: a sum and a count, whose ratio is the item's value (hits of trials; a sum of values and their
number). An item on which either model counted nothing is left out: a reply that was not given is
neither right nor wrong. The difference d is the mean over items of `value_b - value_a`: each item
weighs the same, however much a model talks.

p-value   Under "the models do not differ" an item's difference is as likely to point one way as the
          other. p is the share of sign changes whose |d| is at least the one that was found: of all
          2^k, where k items differ and k is at most `ALL_SIGNS`, else of `DRAWS` drawn ones with
          the found one among them. Exact at any n: with four items p is never under 1/8. (Fisher's
          paired randomisation test; Phipson & Smyth 2010 for drawn ones.)
interval  Percentiles of d over `DRAWS` bootstrap samples of items, widened by sqrt(n / (n - 1)),
          since a bootstrap of few items is too narrow (Hesterberg 2015). It describes; p decides.
many      Holm 1979: with m measures asked at once, the chance that any verdict is wrong is at most
          `LEVEL`. m counts the measures that could reach it: where k items differ, p is never under
          2^(1-k), whichever way they point, and what can't be called different can't be called so
          wrongly (Tarone 1990). So a measure that is the same for both costs the others nothing.
          The argument is for one pair of models; of several the counts are added up.

Pooling sums and counts over items instead, and swapping them, would test whether the models are the
same in everything: a silent and a talkative one with equal error rates would be called different.
Items are taken as independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Literal, NamedTuple

import numpy as np

LEVEL = 0.05
ALL_SIGNS = 14
DRAWS = 20_000

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
    """What a measure says. n: items on which both models gave something to measure, differ: those
    of them on which the two are not the same; value_a, value_b: means over n; low, high: of the
    difference. None where nothing was measured, and low, high where it was on one item."""

    word: Word
    n: int
    value_a: float | None = None
    value_b: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    differ: int = 0
    p: float | None = None
    p_holm: float | None = None


def compare(
    measures: dict[str, tuple[Sequence[Pair], Better]], seed: int = 0
) -> dict[str, Finding]:
    """A finding for each measure, corrected for their number.

    Args:
        measures: pairs by item, and which way is better; "": neither, then a difference is said to
            be one and no more.
        seed: of the signs and samples that are drawn.

    Raises:
        ValueError: a value that is not finite.
    """
    found = {key: _measured(pairs, seed) for key, (pairs, _) in measures.items()}
    family = {k: one.p for k, one in found.items() if one.p is not None and can_tell(one.differ)}
    adjusted = holm(family)
    return {
        key: one if one.p is None else _judged(one, adjusted.get(key, 1.0), measures[key][1])
        for key, one in found.items()
    }


def can_tell(differ: int) -> bool:
    """Whether so many items that differ could give a verdict, asked for by themselves."""
    return differ > 0 and 2.0 ** (1 - differ) <= LEVEL


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
    return replace(one, word=word, p_holm=p_holm)


def least_items(num_measures: int) -> int:
    """How many items, all pointing one way, a verdict on one of so many measures takes at least."""
    n = 1
    while num_measures * 2 / 2**n > LEVEL:
        n += 1
    return n


def _measured(pairs: Sequence[Pair], seed: int) -> Finding:
    """Everything but the verdict."""
    kept = np.array([pair for pair in pairs if pair.count_a and pair.count_b], dtype=float)
    if not len(kept):
        return Finding("not measured", 0)
    if not np.isfinite(kept).all():
        raise ValueError("the values of a measure must be finite, found others")
    values_a, values_b = kept[:, 0] / kept[:, 1], kept[:, 2] / kept[:, 3]
    differences = values_b - values_a
    rng = np.random.default_rng(seed)
    p = _sign_p(differences, rng)
    low, high = _interval(differences, rng)
    return Finding(
        "inconclusive", len(kept), float(values_a.mean()), float(values_b.mean()),
        float(differences.mean()), low, high, int(np.count_nonzero(differences)), p,
    )  # fmt: skip


def _sign_p(differences: np.ndarray, rng: np.random.Generator) -> float:
    """float [n] -> p."""
    differences = differences[differences != 0]  # a sign of these changes nothing
    n = len(differences)
    if n <= ALL_SIGNS:
        signs = _all_signs(n)
    else:
        signs = rng.choice((1.0, -1.0), (DRAWS, n))
        signs[0] = 1  # the one that was found
    sums = np.abs(signs @ differences)
    return float(np.mean(sums >= sums[0] * (1 - 1e-12)))


@cache
def _all_signs(n: int) -> np.ndarray:
    """float [2^n, n], the first row without a change."""
    return np.array(list(product((1.0, -1.0), repeat=n))).reshape(2**n, n)


def _interval(
    differences: np.ndarray, rng: np.random.Generator
) -> tuple[float | None, float | None]:
    """Bounds of the mean of float [n]; None for one item. Never beyond what an item shows."""
    n = len(differences)
    if n < 2:
        return None, None
    means = differences[rng.integers(0, n, (DRAWS, n))].mean(1)
    centre = differences.mean()
    wide = centre + (means - centre) * np.sqrt(n / (n - 1))
    low, high = np.quantile(wide, [LEVEL / 2, 1 - LEVEL / 2])
    return float(max(low, differences.min())), float(min(high, differences.max()))
