"""Best-of-N as the public code runs it: one candidate, one future and one value at a time, every batch of one row (method 4.1).

What the batched planner is held against, in results (tests/test_planning.py) and in time (jobs/bench/planning.py). Seeds are this
project's, and the world model is asked about the averaged chunk.
"""

from __future__ import annotations

import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.model import sampling
from cosmos_ray.model.injection import probability
from cosmos_ray.model.latents import action_frame, read_actions, read_value
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.planning.aggregate import aggregate
from cosmos_ray.planning.scoring import step_ladder
from cosmos_ray.seeds import mix_seed


def plan(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seed: int, steps: int,
         config: PlannerConfig) -> tuple[int, torch.Tensor, list[float]]:
    """(chosen candidate, its actions (K, d), all scores) for one observation, (1, C, T, h, w)."""
    chunks, scores = [], []
    for query in range(config.candidates):
        proposed = sampling.act(policy, known, text, torch.tensor([mix_seed(seed, 1, query) if query else seed]), steps)
        actions = read_actions(policy, proposed)
        joint = probability(read_value(policy, proposed))
        proposed[:, :, policy.layout.action] = action_frame(policy, actions)
        chunks.append(actions[0])
        scores.append(float(joint if config.rank_by == "joint" else _score(policy, proposed, text, seed, config)))
    best = max(range(len(scores)), key=scores.__getitem__)  # the first of equals
    return best, chunks[best], scores


def _score(policy: CosmosPolicy, proposed: torch.Tensor, text: Prompts, seed: int, config: PlannerConfig) -> torch.Tensor:
    parts = []
    if config.rank_by != "action":
        values: list[torch.Tensor] = []
        for i, steps in enumerate(step_ladder(config.future_steps, config.futures, config.ladder)):
            future = sampling.imagine(policy, proposed, text, torch.tensor([mix_seed(seed, 2, i)]), steps)
            values += _values(policy, future, text, mix_seed(seed, 3, i), config, SampleType.VALUE_FUTURE)
        parts.append(aggregate(torch.cat(values), config.aggregate))
    if config.rank_by != "future":
        parts.append(aggregate(torch.cat(_values(policy, proposed, text, seed, config, SampleType.VALUE_ACTION)), config.aggregate))
    return torch.stack(parts).mean()


def _values(policy: CosmosPolicy, latents: torch.Tensor, text: Prompts, seed: int, config: PlannerConfig,
            sample_type: SampleType) -> list[torch.Tensor]:
    given = sampling.give(policy, sample_type, latents, text)
    return [probability(sampling.evaluate(policy, given, torch.tensor([mix_seed(seed, 4, member)]), steps))
            for member, steps in enumerate(step_ladder(config.value_steps, config.value_samples, config.ladder))]
