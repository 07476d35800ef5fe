"""Agreement between graders: a table worked out by hand, and what must hold of any."""

import numpy as np
import pytest

from duplex.agreement import agreement, confusion, kappa_interval, linear_kappa

GRADES = ("perfect", "good", "poor")

# Ours in rows, the other's in columns. n = 20; the same grade in 5 + 4 + 6 = 15.
BY_HAND = [[5, 2, 0], [1, 4, 1], [1, 0, 6]]


def pairs_of(table):
    return [
        (GRADES[i], GRADES[j])
        for i, row in enumerate(table)
        for j, count in enumerate(row)
        for _ in range(count)
    ]


def test_kappa_worked_out_by_hand():
    """w: 0 on the diagonal, 1/2 beside it, 1 in the corners.

    found     (2 + 1 + 1 + 0) / 2 + (0 + 1) = 3                                of 20: .15
    margins   ours 7, 6, 7; theirs 7, 6, 7
    expected  [(7·6 + 6·7 + 6·7 + 7·6) / 2 + 7·7 + 7·7] / 20 = 182 / 20 = 9.1  of 20: .455
    kappa     1 - 3 / 9.1 = .67033
    """
    found = agreement(pairs_of(BY_HAND), GRADES)
    assert found.table == tuple(map(tuple, BY_HAND)) and found.n == 20
    assert found.raw == 15 / 20
    assert found.kappa == pytest.approx(1 - 3 / 9.1)
    assert found.kappa_low < found.kappa < found.kappa_high
    # Clopper-Pearson of 15 in 20, from published tables
    assert (found.raw_low, found.raw_high) == pytest.approx((0.509, 0.913), abs=5e-4)


def test_expected_is_what_shuffled_graders_give():
    """By the definition, over all n x n ways to put one of ours beside one of theirs."""
    rng = np.random.default_rng(5)
    ours, theirs = rng.integers(0, 3, 40), rng.integers(0, 3, 40)
    found = np.mean([abs(a - b) / 2 for a, b in zip(ours, theirs, strict=True)])
    expected = np.mean([abs(a - b) / 2 for a in ours for b in theirs])
    table = confusion([(GRADES[a], GRADES[b]) for a, b in zip(ours, theirs, strict=True)], GRADES)
    assert linear_kappa(table) == pytest.approx(1 - found / expected)


def test_a_near_miss_costs_half_of_a_far_one():
    """Margins are 5, 5, 5 in both, so expected is (4·25/2 + 2·25) / 15 = 20/3: only the distance
    of the two misses differs."""
    near = agreement(pairs_of([[4, 1, 0], [1, 4, 0], [0, 0, 5]]), GRADES).kappa
    far = agreement(pairs_of([[4, 0, 1], [0, 5, 0], [1, 0, 4]]), GRADES).kappa
    assert near == pytest.approx(1 - 1 / (20 / 3))
    assert far == pytest.approx(1 - 2 / (20 / 3)) and near > far


def test_ends_of_the_scale():
    assert agreement(pairs_of([[3, 0, 0], [0, 3, 0], [0, 0, 3]]), GRADES).kappa == 1
    assert agreement(pairs_of([[2, 2, 2]] * 3), GRADES).kappa == pytest.approx(0)
    assert agreement(pairs_of([[0, 0, 5], [0, 0, 0], [5, 0, 0]]), GRADES).kappa == -1


def test_where_kappa_means_nothing_none_is_given():
    """Both always said poor: chance alone would agree as well."""
    same = agreement([("poor", "poor")] * 6, GRADES)
    assert same.raw == 1 and same.kappa is None and same.kappa_low is None
    empty = agreement([], GRADES)
    assert empty.n == 0 and empty.raw is None and empty.kappa is None
    assert kappa_interval(confusion([("good", "poor")], GRADES)) == (None, None)


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="found good, fine"):
        agreement([("good", "fine")], GRADES)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """200 samples of 60 from one made-up pair of graders; 95 % nominal."""
    rng = np.random.default_rng(1)
    shares = np.array([[0.25, 0.08, 0.02], [0.07, 0.2, 0.06], [0.02, 0.05, 0.25]])
    truth = linear_kappa(shares * 100)
    inside = 0
    for seed in range(200):
        low, high = kappa_interval(rng.multinomial(60, shares.ravel()).reshape(3, 3), seed)
        inside += low <= truth <= high
    assert 180 <= inside <= 200
