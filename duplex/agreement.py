"""How far two graders of the same conversations agree, beyond what chance would give. Pure.

table     counts: rows are our grades, columns the other's, categories in one order (best first)
raw       the share of conversations on which both gave the same grade, with exact bounds
kappa     Cohen 1968, weighted: 1 - sum(w · found) / sum(w · expected). Categories i and j of k lie
          w = |i - j| / (k - 1) apart (linear), and `expected` is what two graders with these shares
          of grades would give by chance. 1: they agree in all; 0: no more than chance; undefined,
          None, where each of them gave one grade alone, and it was the same
interval  Percentiles of kappa over `DRAWS` bootstrap samples of conversations, widened by
          sqrt(n / (n - 1)) as in `duplex.verdict`. Samples in which kappa is undefined are left
          out; where they are more than half, or n is 1, there is no interval

Conversations are taken as independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from duplex.metrics import proportion_interval

CONFIDENCE = 0.95
DRAWS = 4_000


@dataclass(frozen=True)
class Agreement:
    """table: [ours][theirs] in the order of `categories`. raw_low, raw_high: exact bounds."""

    categories: tuple[str, ...]
    table: tuple[tuple[int, ...], ...]
    n: int
    raw: float | None = None
    raw_low: float | None = None
    raw_high: float | None = None
    kappa: float | None = None
    kappa_low: float | None = None
    kappa_high: float | None = None


def agreement(
    pairs: Iterable[tuple[str, str]], categories: Sequence[str], seed: int = 0
) -> Agreement:
    """Of (our grade, the other's grade) for each conversation.

    Args:
        categories: all grades, in order; at least two.

    Raises:
        ValueError: a grade that is none of them.
    """
    table = confusion(pairs, categories)
    n = int(table.sum())
    counts = tuple(tuple(int(cell) for cell in row) for row in table)
    if not n:
        return Agreement(tuple(categories), counts, 0)
    same = int(np.trace(table))
    low, high = kappa_interval(table, seed)
    return Agreement(
        tuple(categories), counts, n, same / n, *proportion_interval(same, n, CONFIDENCE),
        linear_kappa(table), low, high,
    )  # fmt: skip


def confusion(pairs: Iterable[tuple[str, str]], categories: Sequence[str]) -> np.ndarray:
    """int64 [k, k]; raises as `agreement`."""
    place = {name: index for index, name in enumerate(categories)}
    table = np.zeros((len(categories), len(categories)), dtype=np.int64)
    for ours, theirs in pairs:
        if ours not in place or theirs not in place:
            raise ValueError(f"a grade must be {', '.join(categories)}; found {ours}, {theirs}")
        table[place[ours], place[theirs]] += 1
    return table


def linear_kappa(table: np.ndarray) -> float | None:
    """Of counts [k, k]; None where it is undefined."""
    value = float(_kappas(table[None].astype(float))[0])
    return None if np.isnan(value) else value


def kappa_interval(table: np.ndarray, seed: int = 0) -> tuple[float | None, float | None]:
    """Bounds of kappa, drawing the table's conversations again and again."""
    n = int(table.sum())
    centre = linear_kappa(table)
    if n < 2 or centre is None:
        return None, None
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, table.ravel() / n, DRAWS).reshape(DRAWS, *table.shape)
    kappas = _kappas(drawn.astype(float))
    kappas = kappas[~np.isnan(kappas)]
    if len(kappas) <= DRAWS / 2:
        return None, None
    wide = centre + (kappas - centre) * np.sqrt(n / (n - 1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(wide, [tail, 1 - tail])
    return float(max(low, -1.0)), float(min(high, 1.0))


def _kappas(tables: np.ndarray) -> np.ndarray:
    """float [D, k, k] -> float [D], NaN where undefined."""
    k = tables.shape[-1]
    places = np.arange(k)
    apart = np.abs(places[:, None] - places) / (k - 1)
    n = tables.sum((1, 2))
    found = (apart * tables).sum((1, 2)) / n
    expected = np.einsum("ij,di,dj->d", apart, tables.sum(2), tables.sum(1)) / n**2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, 1 - found / expected, np.nan)
