"""How many items it takes to find a difference that is there: verdicts on made-up rates. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from duplex.verdict import LEVEL, Pair, compare, holm

POWER_ITEMS, POWER_DRAWS, POWER_MEASURES = (6, 8, 12, 16, 24, 32, 48, 64, 100), 400, 30


def power(
    numbers: Sequence[int] = POWER_ITEMS, draws: int = POWER_DRAWS, seed: int = 0
) -> dict[str, Any]:
    """Share of made-up evaluations in which a measure at .35 for one model and .65 for the other
    gets its verdict, by items; asked alone, and beside so many measures that do not differ."""
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for trials in (1, 4):
        for number in numbers:
            p_values = [_made_up(rng, number, trials) for _ in range(draws)]
            rest = {str(i): 1.0 for i in range(POWER_MEASURES - 1)}
            found.setdefault(str(trials), {})[str(number)] = {
                "alone": float(np.mean([p <= LEVEL for p in p_values])),
                "among": float(np.mean([holm({"it": p, **rest})["it"] <= LEVEL for p in p_values])),
            }
    return {"measures": POWER_MEASURES, "draws": draws, "by_trials": found}


def _made_up(rng: np.random.Generator, number: int, trials: int) -> float:
    hits = rng.binomial(trials, [[0.35, 0.65]] * number)
    pairs = [Pair(float(a), trials, float(b), trials) for a, b in hits]
    p = compare({"it": (pairs, "high")}, seed=int(rng.integers(1 << 30)))["it"].p
    assert p is not None
    return p
