"""Choices without a value: what a planner has to beat. Pure torch."""

from __future__ import annotations

import torch

from cosmos_ray.planning.proposals import Proposals
from cosmos_ray.seeds import mix_seed


def unjudged(proposals: Proposals, rank_by: str, n: int) -> torch.Tensor:
    """(B*N,) float32 scores in [0, 1] of N candidates each: "random", or "medoid" by their chunks."""
    if rank_by == "medoid":
        return agreement(proposals.actions, n)
    return torch.tensor([mix_seed(seed, 6, i % n) % 2**24 / 2**24 for i, seed in enumerate(proposals.seeds.tolist())])


def agreement(of: torch.Tensor, n: int) -> torch.Tensor:
    """(B*N,) float32 scores in [0, 1] of (B*N, ...) tensors: which of N alternatives stands in the middle of the largest group.

    A group are an alternative and all that are at most as far from it as the median of all distances. The score is the group's share of
    the N; of groups of one size the closer one scores higher, by less than one member.
    """
    points = of.float().flatten(1).unflatten(0, (-1, n))
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    if n == 1:
        return points.new_ones(len(points))
    pairs = apart[:, *torch.triu_indices(n, n, 1)]
    radius = pairs.median(1).values[:, None, None]
    close = apart <= radius
    size = close.sum(2)
    mean = (apart * close).sum(2) / size / radius[:, :, 0].clamp_min(1e-12)
    return ((size - mean.clamp(0, 1)) / n).flatten()
