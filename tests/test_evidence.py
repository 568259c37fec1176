"""Intervals, tests and rankings against values worked out by hand or from their definition."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from cosmos_ray.evidence import auc, brier, calibration, mcnemar, rank_correlation, wilson


def test_wilson_is_the_closed_form_for_every_count():
    for n in (1, 7, 48, 200, 400):
        for k in range(n + 1):
            p, zz = k / n, 1.96**2
            middle, spread = p + zz / (2 * n), 1.96 * ((p * (1 - p) + zz / (4 * n)) / n) ** 0.5
            low, high = max(0.0, (middle - spread) / (1 + zz / n)), min(1.0, (middle + spread) / (1 + zz / n))
            assert wilson(k, n) == pytest.approx((low, high), rel=1e-12, abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_is_the_two_sided_sign_test():
    for won in range(30):
        for lost in range(30):
            n = won + lost
            exact = min(1.0, 2 * sum(comb(n, k) for k in range(min(won, lost) + 1)) / 2**n)
            assert mcnemar(won, lost) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_rank_correlation_is_the_correlation_of_mean_ranks(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 5, 12), rng.random(12)
    ranks = [np.array([((x < v).sum() + (x <= v).sum() + 1) / 2 for v in x]) for x in (a, b)]
    assert rank_correlation(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert rank_correlation(a, 2.0 * a) == pytest.approx(1) and rank_correlation(a, -a) == pytest.approx(-1)


def test_rank_correlation_is_0_where_one_side_has_no_order():
    assert rank_correlation([1.0, 1.0, 1.0], [0.1, 0.2, 0.3]) == rank_correlation([0.1, 0.2, 0.3], [1.0, 1.0, 1.0]) == 0.0
    assert rank_correlation([0.5], [0.7]) == 0.0  # a single candidate


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_ordered_pairs(seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 6, 40) / 5, rng.random(40) < 0.4  # many ties
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs))
    assert auc(scores, np.ones(40, bool)) is None


def test_calibration_puts_every_prediction_in_one_bin():
    rng = np.random.default_rng(1)
    predicted = np.concatenate([rng.random(300), [0.0, 0.5, 1.0]])
    success = rng.random(303) < predicted
    target = success * 0.9
    rows = calibration(predicted, success, target, bins=4)
    assert sum(row["count"] for row in rows) == 303
    for row in rows:
        inside = [i for i, p in enumerate(predicted) if row["low"] <= p < row["high"] or (p == 1.0 and row["high"] == 1.0)]
        assert row["count"] == len(inside)
        assert row["success_share"] == pytest.approx(sum(success[i] for i in inside) / len(inside))
        assert row["predicted"] == pytest.approx(sum(predicted[i] for i in inside) / len(inside))
        assert row["mean_target"] == pytest.approx(0.9 * row["success_share"])
    assert [row["low"] for row in calibration([0.1, 0.9], [0, 1], [0, 1], bins=4)] == [0.0, 0.75]


def test_brier_and_mcnemar_known_values():
    assert brier([0.5, 1.0], [0, 1]) == pytest.approx(0.125)
    assert brier([], []) is None
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0
    assert mcnemar(5, 0) == mcnemar(0, 5) == 0.0625  # 2 / 2**5
    assert mcnemar(8, 1) == pytest.approx(2 * 10 / 512)
