"""Verdicts hold their level, find what is there, and say nothing where nothing can be said."""

import math
from itertools import product

import numpy as np
import pytest

from duplex.verdict import ALL_SIGNS, LEVEL, Pair, compare, holm, least_items


def pairs_of(a, b):
    return [Pair(x, 1, y, 1) for x, y in zip(a, b, strict=True)]


def finding(pairs, better="high", seed=0):
    return compare({"m": (pairs, better)}, seed)["m"]


def test_p_is_that_of_the_permutation_test_worked_out_by_hand():
    """Three items, all better by 1, 2 and 3: only swapping none or all is as far from 0."""
    one = finding(pairs_of([0, 0, 0], [1, 2, 3]))
    assert one.p == 2 / 8 and one.difference == 2 and one.n == 3
    assert one.word == "inconclusive"


def test_p_agrees_with_scipy_on_more_items():
    from scipy import stats  # here: a second for each worker, and one needs it

    rng = np.random.default_rng(3)
    a, b = rng.normal(size=10), rng.normal(0.8, size=10)
    theirs = stats.permutation_test(
        (b, a), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=math.inf,
    )  # fmt: skip
    assert finding(pairs_of(a, b)).p == pytest.approx(theirs.pvalue, abs=1e-9)


def test_an_item_weighs_the_same_however_much_was_said():
    one = finding([Pair(9, 10, 10, 10), Pair(0, 1, 1, 1)])
    assert one.value_a == pytest.approx(0.45) and one.value_b == 1
    assert one.difference == pytest.approx(0.55)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_talkative_model_is_not_called_different_for_talking(share):
    """Equal error rates, one reply in some items against five in each."""
    rng = np.random.default_rng(int(10 * share))
    wrong = told = 0
    for seed in range(120):
        pairs = []
        for _ in range(20):
            count_a = int(rng.random() < share)
            pairs.append(Pair(rng.binomial(count_a, 0.3), count_a, rng.binomial(5, 0.3), 5))
        one = finding(pairs, seed=seed)
        told += one.p is not None
        wrong += one.p is not None and one.p <= LEVEL
    assert told > 80 and wrong / 120 < 0.11


def test_a_planted_difference_is_found_in_its_direction():
    rng = np.random.default_rng(1)
    a = rng.normal(size=40)
    b = a + 1 + 0.3 * rng.normal(size=40)
    assert finding(pairs_of(a, b), "high").word == "improved"
    assert finding(pairs_of(a, b), "low").word == "regressed"
    assert finding(pairs_of(b, a), "high").word == "regressed"
    assert finding(pairs_of(a, b), "").word == "differs"
    one = finding(pairs_of(a, b))
    assert one.low is not None and one.high is not None and 0.85 < one.low < 1 < one.high < 1.15


@pytest.mark.parametrize("n", [6, 30])
def test_equal_models_are_told_apart_no_more_often_than_the_level_allows(n):
    """200 comparisons of what does not differ: about 5 %."""
    rng = np.random.default_rng(n)
    wrong = 0
    for seed in range(200):
        a, b = rng.normal(size=(2, n))
        one = finding(pairs_of(a, b), seed=seed)
        assert one.p is not None
        wrong += one.p <= LEVEL
    assert wrong / 200 < 0.09 and (n == 6 or wrong > 2)


def test_eight_measures_together_are_wrong_no_more_often_than_one():
    rng = np.random.default_rng(0)
    wrong = 0
    for seed in range(60):
        measures = {str(k): (pairs_of(*rng.normal(size=(2, 12))), "high") for k in range(8)}
        found = compare(measures, seed)
        wrong += any(one.word != "inconclusive" for one in found.values())
    assert wrong / 60 < 0.13


def test_a_model_against_itself_is_never_called_different():
    rng = np.random.default_rng(5)
    for _ in range(20):
        a = rng.normal(size=20)
        one = finding(pairs_of(a, a))
        assert one.p == 1 and one.difference == 0 and one.word == "inconclusive"
        assert one.low == one.high == 0


def test_where_nothing_was_measured_nothing_is_said():
    assert finding([]).word == "not measured"
    assert finding([Pair(0, 0, 0, 0), Pair(0, 0, 1, 1)]) == finding([])
    alone = finding([Pair(0, 0, 1, 1), Pair(0, 1, 1, 1)])
    assert alone.n == 1 and alone.p == 1 and alone.low is None


def test_exact_and_drawn_signs_meet_at_the_border():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=ALL_SIGNS), rng.normal(0.4, size=ALL_SIGNS)
    exact = finding(pairs_of(a, b)).p
    # The same items and one that shows no difference: too many for the whole list.
    drawn = finding([*pairs_of(a, b), Pair(0, 1, 0, 1)]).p
    assert exact is not None and drawn == pytest.approx(exact, abs=0.03)


def test_an_interval_stays_within_what_items_show():
    one = finding([Pair(0, 1, 0, 1), Pair(0, 1, 1, 1)])
    assert (one.low, one.high) == (0, 1)


def test_how_many_items_a_verdict_takes():
    assert [least_items(m) for m in (1, 2, 8, 12)] == [6, 7, 9, 9]
    for m, n in ((1, 6), (12, 9)):
        pairs = pairs_of([0] * n, [1] * n)
        undecided = pairs_of([0] * n, [(-1) ** k for k in range(n)])
        others = {str(k): (undecided, "high") for k in range(m - 1)}
        assert compare({"m": (pairs, "high"), **others})["m"].word == "improved"
        assert compare({"m": (pairs[1:], "high"), **others})["m"].word == "inconclusive"


def test_what_can_never_differ_costs_the_others_nothing():
    """Thirty measures beside it, the same for both models but for five items of each."""
    pairs = pairs_of([0] * 6, [1] * 6)
    alike = pairs_of([0] * 6, [1, 1, 1, 1, 1, 0])
    found = compare({"m": (pairs, "high")} | {str(k): (alike, "high") for k in range(30)})
    assert (found["m"].word, found["m"].differ, found["m"].p_holm) == ("improved", 6, 2 / 64)
    assert (found["0"].word, found["0"].differ, found["0"].p_holm) == ("inconclusive", 5, 1.0)


def test_holm_is_that_of_its_definition():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": 0.03, "c": 0.06, "b": 0.06}
    assert holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
    for p in product((0.001, 0.02, 0.2), repeat=3):
        adjusted = holm(dict(enumerate(p)))  # pyright: ignore[reportArgumentType]
        assert all(adjusted[k] >= value for k, value in enumerate(p))  # pyright: ignore


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_gets_no_verdict(value):
    with pytest.raises(ValueError, match="finite"):
        finding([*pairs_of([0] * 8, [1] * 8), Pair(1, 1, value, 1)], "low")
