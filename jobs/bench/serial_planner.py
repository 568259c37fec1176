"""Best-of-N as the public code runs it: one candidate, one future and one value at a time, every batch of one row (method 4.1).

Plans of several chunks grow one at a time as well, level by level, with all futures of a plan and the proprioception that was imagined,
which the public code loses (method 4.3).

What the batched planner is held against, in results (tests/test_planning.py) and in time (jobs/bench/planning.py). Seeds are this
project's, and the world model is asked about the averaged chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.model import sampling
from cosmos_ray.model.injection import probability
from cosmos_ray.model.latents import action_frame, read_actions, read_future_proprio, read_value
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.planning.aggregate import aggregate
from cosmos_ray.planning.scoring import step_ladder
from cosmos_ray.seeds import mix_seed


@dataclass
class Plan:
    """A chunk in a state, real or imagined, and what may follow."""

    proposed: torch.Tensor  #: (1, C, T, h, w)
    actions: torch.Tensor  #: (1, K, d)
    seed: int  #: of the state
    score: float = 0.0
    after: list[list[Plan]] = field(default_factory=list)  #: of every future, the plans there

    def worth(self) -> float:
        """Of the best continuation; -inf where the beam left all of them behind."""
        return sum(max(plan.worth() for plan in plans) for plans in self.after) / len(self.after) if self.after else self.score


def plan(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seed: int, steps: int,
         config: PlannerConfig) -> tuple[int, torch.Tensor, list[float]]:
    """(chosen candidate, its actions (K, d), all scores) for one observation, (1, C, T, h, w)."""
    if config.depth > 1:
        return _plan_ahead(policy, known, text, seed, steps, config)
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


def _plan_ahead(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seed: int, steps: int,
                config: PlannerConfig) -> tuple[int, torch.Tensor, list[float]]:
    level = candidates = _proposed(policy, known, text, seed, steps, config.candidates)
    for depth in range(1, config.depth + 1):
        for plan in level:
            if depth == config.depth or config.beam:
                plan.score = float(probability(read_value(policy, plan.proposed)) if config.rank_by == "joint"
                                   else _score(policy, plan.proposed, text, plan.seed, config))
        if depth == config.depth:
            break
        kept = sorted(level, key=lambda plan: -plan.score)[:config.beam or len(level)]
        for plan in level:
            if not any(plan is other for other in kept):
                plan.score = -math.inf
                continue
            for i, future in enumerate(_futures(policy, plan, text, config)):
                plan.after.append(_proposed(policy, _arrived(policy, future), text, mix_seed(plan.seed, 7, i), steps, config.branch))
        level = [after for plan in level for plans in plan.after for after in plans]
    worths = [plan.worth() for plan in candidates]
    best = max(range(len(worths)), key=worths.__getitem__)
    return best, candidates[best].actions[0], worths


def _proposed(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seed: int, steps: int, count: int) -> list[Plan]:
    plans = []
    for query in range(count):
        proposed = sampling.act(policy, known, text, torch.tensor([mix_seed(seed, 1, query) if query else seed]), steps)
        actions = read_actions(policy, proposed)
        proposed[:, :, policy.layout.action] = action_frame(policy, actions)
        plans.append(Plan(proposed, actions, seed))
    return plans


def _futures(policy: CosmosPolicy, plan: Plan, text: Prompts, config: PlannerConfig) -> list[torch.Tensor]:
    if config.rank_by == "joint":
        return [plan.proposed]
    return [sampling.imagine(policy, plan.proposed, text, torch.tensor([mix_seed(plan.seed, 2, i)]), steps)
            for i, steps in enumerate(step_ladder(config.future_steps, config.futures, config.ladder))]


def _arrived(policy: CosmosPolicy, future: torch.Tensor) -> torch.Tensor:
    """The imagined end of a chunk as the state that the next chunk begins in."""
    layout, spec, state = policy.layout, policy.spec, torch.zeros_like(future)
    state[:, :, 0] = future[:, :, 0]
    for now, then in zip(layout.images, layout.future_images, strict=True):
        state[:, :, now] = future[:, :, then]
    felt = policy.proprio_scale.normalize(read_future_proprio(policy, future))
    copies = -(-math.prod(spec.frame_shape) // spec.proprio_dim)
    state[:, :, layout.proprio] = torch.cat([felt] * copies, 1)[:, :math.prod(spec.frame_shape)].view(1, *spec.frame_shape)
    return state


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
