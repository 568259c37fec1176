"""Exact early rejection: stop valuing a candidate that cannot win any more (method 9.1). Pure torch.

Value samples are drawn a few at a time, the cheapest first. After each, every candidate has a lowest and a highest score that the samples
still to come could give it. A candidate whose highest score is below another's lowest one is out. Where one candidate is left, nothing more
is drawn. The choice is that of :func:`scoring.score`, whatever the values are.
"""

from __future__ import annotations

import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.model import sampling
from cosmos_ray.model.injection import probability
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.planning.aggregate import THRESHOLD, aggregate
from cosmos_ray.planning.proposals import Proposals
from cosmos_ray.planning.scoring import future_seeds, imagine, members_of_equal_steps, values_of_members

MARGIN = 1e-5  #: between two scores that rounding could swap


def bounds(values: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest score (...,) that (..., n) values in [0, 1] can still get; a value not drawn yet is NaN."""
    n, drawn = values.shape[-1], ~values.isnan()
    seen, left = values.nan_to_num(0), (~drawn).sum(-1)
    low, high = seen.sum(-1) / n, (seen.sum(-1) + left) / n
    if scheme in ("success_vote", "majority_mean"):
        above = seen > THRESHOLD
        count, total = above.sum(-1), (seen * above).sum(-1)
        if scheme == "success_vote":
            return count / n, (count + left) / n
        most = (count + left).clamp_min(1)
        low = torch.where(2 * count >= n, (total + left * THRESHOLD) / most, 0)
        high = torch.where(2 * (count + left) >= n, (total + left) / most, 0)
    elif scheme.startswith("lcb"):
        correction = 1 if scheme == "lcb" and n > 1 else 0
        mean = seen.sum(-1) / drawn.sum(-1).clamp_min(1)
        squares = (torch.where(drawn, seen - mean[..., None], 0) ** 2).sum(-1)
        high = high - (squares / (n - correction)).sqrt()  # no deviation is below that of the values drawn
        widest = torch.where(left > 0, 0.5 * (n / (n - correction)) ** 0.5, (squares / (n - correction)).sqrt())
        low = low - widest  # and none is above that of values which are half 0 and half 1
    elif scheme != "average":
        raise NotImplementedError(f"bounds of {scheme!r}")
    return low.clamp(0, 1), high.clamp(0, 1)


def beaten(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """(B, N) bool: candidates that cannot be the first highest, from their lowest and highest scores (B, N)."""
    first = torch.arange(low.shape[1], device=low.device) == 0
    return (high + MARGIN < low.max(1, keepdim=True).values) | ((high == 0) & ~first)  # at 0 the first candidate wins, with 0 or more


def score_until_certain(policy: CosmosPolicy, proposals: Proposals, config: PlannerConfig,
                        n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(first imagined futures (B*N, C, T, h, w), scores (B, N) float32 in [0, 1], chosen (B,) int64); not for ``rank_by`` "joint".

    The score of a candidate that was not valued to the end is the middle between its lowest and its highest score.
    """
    first = proposals.latents if config.rank_by == "action" else imagine(policy, proposals, config, 0)
    values = {future: torch.full((len(proposals), config.value_samples), torch.nan) for future in _sources(config)}
    out = torch.zeros(len(proposals) // n, n, dtype=torch.bool)
    asked, rows = proposals, torch.arange(len(proposals))
    for future, drawn in values.items():
        if future is None:
            given, seeds = sampling.give(policy, SampleType.VALUE_ACTION, asked.latents, asked.text), asked.seeds
        else:
            latents = imagine(policy, asked, config, future) if future else first[rows]
            given, seeds = sampling.give(policy, SampleType.VALUE_FUTURE, latents, asked.text), future_seeds(asked.seeds, future)
        for steps, members in members_of_equal_steps(config):
            samples = values_of_members(policy, given, seeds, steps, members)
            drawn[rows[:, None], torch.tensor(members)] = probability(samples).cpu()
            low, high = _range(values, config, n)
            out |= beaten(low, high)
            open_ = ~out & ((~out).sum(1, keepdim=True) > 1)
            going = open_.flatten()[rows]
            asked, rows, given, seeds = asked.take(going), rows[going], given.take(going), seeds[going]
            if not len(rows):
                return first, (low + high) / 2, (~out).int().argmax(1)
    scores = torch.where(open_, _complete(values, config, n), (low + high) / 2)
    return first, scores, scores.masked_fill(out, -1).argmax(1)


def _sources(config: PlannerConfig) -> list[int | None]:
    """What is valued, in this order: None is the candidate itself, a number the future of this number."""
    return [*([None] if config.rank_by != "future" else []), *(range(config.futures) if config.rank_by != "action" else [])]


def _parts(values: dict[int | None, torch.Tensor]) -> list[torch.Tensor]:
    """(B*N, n) values of each part of the score: of the candidates themselves, and of all their futures."""
    futures = [drawn for future, drawn in values.items() if future is not None]
    return [*([values[None]] if None in values else []), *([torch.cat(futures, dim=1)] if futures else [])]


def _range(values: dict[int | None, torch.Tensor], config: PlannerConfig, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest scores (B, N)."""
    lows, highs = zip(*(bounds(part, config.aggregate) for part in _parts(values)), strict=True)
    return torch.stack(lows).mean(0).view(-1, n), torch.stack(highs).mean(0).view(-1, n)


def _complete(values: dict[int | None, torch.Tensor], config: PlannerConfig, n: int) -> torch.Tensor:
    """Scores (B, N) as :func:`scoring.score` has them, NaN where values are missing."""
    return torch.stack([aggregate(part, config.aggregate) for part in _parts(values)]).mean(0).view(-1, n)
