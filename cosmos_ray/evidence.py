"""Evidence: intervals and paired tests for counts of successes, ranking and calibration of predicted values."""

from __future__ import annotations

import numpy as np
from scipy.stats import binomtest, norm, rankdata, spearmanr


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of the rate ``successes / n``; (0, 1) when ``n`` is 0.

    Args:
        z: half width in standard deviations of the normal distribution; 1.96 gives 95 %.
    """
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(confidence_level=1 - 2 * norm.sf(z), method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided McNemar p-value of ``won`` against ``lost`` discordant pairs; 1 when there are none."""
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def paired(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Outcomes ``a`` against ``b``, (n,) 0 or 1 of the same initial states: discordant counts, points gained, McNemar's p."""
    a, b = np.asarray(a), np.asarray(b)
    won, lost = int((a > b).sum()), int((a < b).sum())
    return {"won": won, "lost": lost, "gain_points": 100 * (won - lost) / max(1, len(a)), "p": mcnemar(won, lost)}


def bootstrap_difference(a: np.ndarray, b: np.ndarray, draws: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of ``a - b`` over pairs and its 95 % percentile bootstrap interval.

    Args: a, b (n,) outcomes of the same initial states, in the same order.
    """
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    if not len(difference):
        return 0.0, -1.0, 1.0
    rows = np.random.default_rng(seed).integers(0, len(difference), (draws, len(difference)))
    low, high = np.percentile(difference[rows].mean(1), (2.5, 97.5))
    return float(difference.mean()), float(low), float(high)


def paired_with_interval(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """:func:`paired` with the 95 % bootstrap interval of the gain, in points."""
    _, low, high = bootstrap_difference(a, b)
    return {**paired(a, b), "ci_low": 100 * low, "ci_high": 100 * high}


def auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Probability that a positive has a higher score than a negative; a tie counts half. None unless both classes occur.

    Args: scores (n,) float; labels (n,) bool.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, bool)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return None
    return float((rankdata(scores)[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of (n,) ``a`` and ``b``; 0 where all values of one of them are equal."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)


def calibration(predicted: np.ndarray, success: np.ndarray, target: np.ndarray, bins: int = 10) -> list[dict]:
    """Rows of a reliability table over equal bins of [0, 1]; the last bin includes 1, empty bins are left out.

    Args: predicted (n,) in [0, 1]; success (n,) bool; target (n,) what the prediction was trained to be, in [0, 1].
    Returns rows of {low, high, count, predicted, success_share, mean_target}.
    """
    predicted, success, target = np.asarray(predicted, np.float64), np.asarray(success, bool), np.asarray(target, np.float64)
    index = np.clip((predicted * bins).astype(int), 0, bins - 1)
    rows = []
    for i in range(bins):
        inside = index == i
        if inside.any():
            rows.append({"low": i / bins, "high": (i + 1) / bins, "count": int(inside.sum()), "predicted": float(predicted[inside].mean()),
                         "success_share": float(success[inside].mean()), "mean_target": float(target[inside].mean())})
    return rows


def brier(predicted: np.ndarray, outcome: np.ndarray) -> float | None:
    """Mean squared difference of (n,) predictions and outcomes in [0, 1]; None when there are none."""
    predicted, outcome = np.asarray(predicted, np.float64), np.asarray(outcome, np.float64)
    return float(np.square(predicted - outcome).mean()) if len(predicted) else None
