"""How several value samples of one candidate become one score (method 4.1). All work on probabilities in [0, 1]."""

from __future__ import annotations

import torch

from cosmos_ray.errors import ConfigError

THRESHOLD = 0.05  #: a value above this counts as a predicted success


def average(values: torch.Tensor) -> torch.Tensor:
    """Mean of (..., n) values."""
    return values.mean(-1)


def lcb(values: torch.Tensor) -> torch.Tensor:
    """Lower confidence bound: mean minus one standard deviation of the samples (n - 1), at least 0. A single sample has no deviation."""
    return lcb_population(values) if values.shape[-1] == 1 else (values.mean(-1) - values.std(-1)).clamp(0, 1)


def lcb_population(values: torch.Tensor) -> torch.Tensor:
    """The same with the standard deviation of a population (n)."""
    return (values.mean(-1) - values.std(-1, correction=0)).clamp(0, 1)


def success_vote(values: torch.Tensor) -> torch.Tensor:
    """Share of the values above the threshold."""
    return (values > THRESHOLD).float().mean(-1)


def majority_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean of the values above the threshold if they are at least half of them, else exactly 0 (as the public code does)."""
    above = values > THRESHOLD
    mean = (values * above).sum(-1) / above.sum(-1).clamp_min(1)
    return torch.where(above.float().mean(-1) >= 0.5, mean, torch.zeros_like(mean)).clamp(0, 1)


AGGREGATIONS = {f.__name__: f for f in (average, lcb, lcb_population, success_vote, majority_mean)}


def aggregate(values: torch.Tensor, scheme: str) -> torch.Tensor:
    """Apply the named scheme to (..., n) values in [0, 1]; returns (...)."""
    if scheme not in AGGREGATIONS:
        raise ConfigError(f"unknown value aggregation {scheme!r}: choose from {', '.join(AGGREGATIONS)}")
    return AGGREGATIONS[scheme](values)
