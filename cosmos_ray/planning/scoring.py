"""Scores of candidates: imagine the future of each, and value these futures or the candidates themselves (method 4.1). Pure torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.model import sampling
from cosmos_ray.model.given import Given
from cosmos_ray.model.injection import probability
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.planning.aggregate import aggregate
from cosmos_ray.planning.proposals import Proposals
from cosmos_ray.seeds import mix_seed


def step_ladder(longest: int, count: int, ladder: str = "rounded") -> list[int]:
    """Network evaluations of each member of an ensemble: ``count`` numbers spread over 1..longest, as the paper's [1, 3, 5].

    ``ladder`` "truncated" rounds down, as the public code does. One member is no ensemble: it takes the longest.
    """
    if count == 1:
        return [longest]
    if ladder == "truncated":
        return np.linspace(1, longest, count).astype(int).tolist()
    return [round(1 + i * (longest - 1) / (count - 1)) for i in range(count)]


def score(policy: CosmosPolicy, proposals: Proposals, config: PlannerConfig,
          known: dict[int, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(first imagined futures (B*N, C, T, h, w), scores (B*N,) in [0, 1]), by the network ``policy``; not for ``rank_by`` "joint".

    All futures of all candidates are valued together: the members of an ensemble that take as many evaluations share one batch.
    ``known`` maps the position of a frame to latents (B*N, C, h, w) that replace the imagined frame before its future is valued.
    """
    futures = imagine_all(policy, proposals, config, known) if config.rank_by != "action" else []
    return (futures or [proposals.latents])[0], judge(policy, proposals, futures, config)


def imagine_all(policy: CosmosPolicy, proposals: Proposals, config: PlannerConfig,
                known: dict[int, torch.Tensor] | None = None) -> list[torch.Tensor]:
    """All futures of every proposal, (B*N, C, T, h, w) each; ``known`` as for :func:`score`."""
    futures = [imagine(policy, proposals, config, i) for i in range(config.futures)]
    for frame, latents in (known or {}).items():
        for future in futures:
            future[:, :, frame] = latents
    return futures


def judge(policy: CosmosPolicy, proposals: Proposals, futures: list[torch.Tensor], config: PlannerConfig) -> torch.Tensor:
    """Scores (B*N,) of proposals, whose ``futures`` are those of :func:`imagine_all`; these are not read with ``rank_by`` "action"."""
    scores = []
    if config.rank_by != "action":
        seeds = torch.cat([future_seeds(proposals.seeds, i) for i in range(config.futures)])
        values = value_samples(policy, torch.cat(futures), proposals.text.repeat(config.futures), seeds, config, SampleType.VALUE_FUTURE)
        scores.append(aggregate(probability(torch.cat(values.chunk(config.futures), dim=1)), config.aggregate))
    if config.rank_by != "future":
        values = value_samples(policy, proposals.latents, proposals.text, proposals.seeds, config, SampleType.VALUE_ACTION)
        scores.append(aggregate(probability(values), config.aggregate))
    return torch.stack(scores).mean(0)


def imagine(policy: CosmosPolicy, proposals: Proposals, config: PlannerConfig, index: int) -> torch.Tensor:
    """Future ``index`` of every proposal, (B*N, C, T, h, w)."""
    steps = step_ladder(config.future_steps, config.futures, config.ladder)[index]
    return sampling.imagine(policy, proposals.latents, proposals.text, _derive(proposals.seeds, 2, index), steps)


def future_seeds(seeds: torch.Tensor, index: int) -> torch.Tensor:
    """Seeds for the values of future ``index``."""
    return _derive(seeds, 3, index)


def members_of_equal_steps(config: PlannerConfig) -> Iterator[tuple[int, list[int]]]:
    """(network evaluations, members of the value ensemble that take as many), fewest evaluations first."""
    members = defaultdict(list)
    for member, steps in enumerate(step_ladder(config.value_steps, config.value_samples, config.ladder)):
        members[steps].append(member)
    yield from members.items()


def value_samples(policy: CosmosPolicy, latents: torch.Tensor, text: Prompts, seeds: torch.Tensor, config: PlannerConfig,
                  sample_type: SampleType) -> torch.Tensor:
    """(rows, config.value_samples) value samples in [-1, 1]."""
    given = sampling.give(policy, sample_type, latents, text)
    return torch.cat([values_of_members(policy, given, seeds, steps, members) for steps, members in members_of_equal_steps(config)], dim=1)


def values_of_members(policy: CosmosPolicy, given: Given, seeds: torch.Tensor, steps: int, members: Sequence[int]) -> torch.Tensor:
    """(rows, members) value samples in [-1, 1], of members that take ``steps`` evaluations each, in one batch."""
    drawn = torch.stack([_derive(seeds, 4, member) for member in members], dim=1)
    return sampling.evaluate(policy, given, drawn.flatten(), steps).view(len(given), -1)


def _derive(seeds: torch.Tensor, stage: int, index: int) -> torch.Tensor:
    return torch.tensor([mix_seed(s, stage, index) for s in seeds.tolist()])
