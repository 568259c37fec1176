"""Best-of-N: propose N chunks, imagine where each leads, let the value function choose (paper, test-time planning; method 4.1).

Every stage runs once for all candidates of all observations: N candidates, then their futures, then the values of those
futures. Candidate 0 keeps the caller's seed, so with N = 1 this is the policy itself and ties change nothing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.model.injection import probability
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.offsets import chunk_offset
from cosmos_ray.planning.aggregate import aggregate
from cosmos_ray.seeds import mix_seed


@dataclass
class Decision:
    """What was decided for B observations, and why."""

    actions: torch.Tensor  #: (B, K, d) float32, physical units
    values: torch.Tensor  #: (B,) the policy's own value of the chosen chunk, in [-1, 1]
    scores: torch.Tensor  #: (B, N) candidate scores in [0, 1]; (B, 1) of the policy's own value without planning
    chosen: torch.Tensor  #: (B,) int64 index of the executed candidate
    candidates: torch.Tensor  #: (B, N, K, d) every proposed chunk
    latents: torch.Tensor  #: (B, C, T, h, w) of the chosen candidate: its (first) imagined future when planning


def step_ladder(longest: int, count: int) -> list[int]:
    """Network evaluations of each member of an ensemble: ``count`` values spread over 1..longest, as the paper's [1, 3, 5]."""
    if count == 1:
        return [longest]
    return [round(1 + i * (longest - 1) / (count - 1)) for i in range(count)]


def act_directly(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int) -> Decision:
    """The policy alone: one chunk per observation, with the future and value generated jointly."""
    latents = policy.act(known, text, seeds, steps)
    actions, values = policy.read_actions(latents), policy.read_value(latents)
    return Decision(actions, values, probability(values)[:, None], torch.zeros(len(seeds), dtype=torch.int64), actions[:, None], latents)


@dataclass
class Proposals:
    """N candidate chunks for each of B observations, as B * N rows: those of one observation follow each other."""

    latents: torch.Tensor  #: (B*N, C, T, h, w) with the state and, as ACTION, the chunk that would be executed
    actions: torch.Tensor  #: (B*N, K, d) float32, physical units
    text: Prompts
    seeds: torch.Tensor  #: (B*N,) int64, alike for those of one observation: they are compared under the same noise


def propose(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int, n: int,
            spread: float = 0.0) -> Proposals:
    """``n`` chunks of the policy per observation, every second one moved elsewhere by ``spread``; arguments as for :func:`plan`."""
    own = torch.tensor([s if q == 0 else mix_seed(s, 1, q) for s in seeds.tolist() for q in range(n)])
    seeds = seeds.repeat_interleave(n)
    known, text = known.repeat_interleave(n, 0), text.repeat_interleave(n)
    latents = policy.act(known, text, own, steps)
    actions = policy.read_actions(latents)
    if spread and n > 1:
        rows = torch.arange(len(own)) % n % 2 == 1
        offsets = np.stack([chunk_offset(mix_seed(s, 5), actions.shape[2], spread) for s in own[rows].tolist()])
        actions[rows] = (actions[rows] + torch.as_tensor(offsets[:, None]).to(actions)).clamp(-1, 1)
    # The world model is asked about the chunk that would be executed: the averaged one, tiled as in training. (The public
    # code passes the raw generated frame on, method 4.1.)
    latents[:, :, policy.layout.action] = policy.action_frame(actions)
    return Proposals(latents, actions, text, seeds)


def plan(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int, config: PlannerConfig,
         judge: tuple[CosmosPolicy, Prompts] | None = None) -> Decision:
    """Choose among ``config.candidates`` chunks per observation.

    Args:
        known: (B, C, T, h, w) current latents; text B rows of prompts; seeds (B,) int64 one per observation.
        steps: network evaluations per proposed chunk.
        judge: the network that imagines and values the candidates, with its own B rows of prompts; the policy itself by default. Both
            must have one tokenizer and one normalisation.

    Scores are V(s') of imagined futures, or Q(s, a) when ``config.rank_by`` is "action", or the mean of both when it is "both".
    """
    b, n = len(seeds), config.candidates
    proposals = propose(policy, known, text, seeds, steps, n, config.spread)
    judging, prompts = judge or (policy, text)
    futures, scores = score(judging, dataclasses.replace(proposals, text=prompts.repeat_interleave(n)), config)
    scores = scores.view(b, n)
    chosen = scores.argmax(1).cpu()  # argmax takes the first of equals: candidate 0 keeps ties
    pick = torch.arange(b) * n + chosen
    return Decision(proposals.actions[pick], policy.read_value(proposals.latents)[pick], scores, chosen,
                    proposals.actions.unflatten(0, (b, n)), futures[pick])


def score(policy: CosmosPolicy, proposals: Proposals, config: PlannerConfig,
          known: dict[int, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(first imagined futures (B*N, C, T, h, w), scores (B*N,) in [0, 1]). ``known`` are latent frames (B*N, C, h, w), by their
    position, to be valued in place of the imagined ones."""
    latents, text, seeds = proposals.latents, proposals.text, proposals.seeds
    futures, scores = latents, []
    if config.rank_by != "action":
        futures, values = _values_of_futures(policy, latents, text, seeds, config, known or {})
        scores.append(aggregate(probability(values), config.aggregate))
    if config.rank_by != "future":
        values = value_samples(policy, latents, text, seeds, config, SampleType.VALUE_ACTION)
        scores.append(aggregate(probability(values), config.aggregate))
    return futures, torch.stack(scores).mean(0)


def _values_of_futures(policy, proposed, text, seeds, config: PlannerConfig, known: dict[int, torch.Tensor]):
    """(first futures (B*N, ...), values (B*N, futures * values)) of V(s')."""
    futures = []
    for i, steps in enumerate(step_ladder(config.future_steps, config.futures)):
        futures.append(policy.imagine(proposed, text, _derive(seeds, 2, i), steps))
        for frame, latents in known.items():
            futures[-1][:, :, frame] = latents
    rows = torch.cat([
        value_samples(policy, future, text, _derive(seeds, 3, i), config, SampleType.VALUE_FUTURE) for i, future in enumerate(futures)
    ], dim=1)
    return futures[0], rows


def value_samples(policy: CosmosPolicy, latents: torch.Tensor, text: Prompts, seeds: torch.Tensor, config: PlannerConfig,
                  kind: SampleType) -> torch.Tensor:
    """(rows, config.value_samples) value samples of ``kind`` in [-1, 1]; members with equal step counts share one batch."""
    out, member = [], 0
    for steps, count in Counter(step_ladder(config.value_steps, config.value_samples)).items():
        member_seeds = torch.cat([_derive(seeds, 4, member + i) for i in range(count)])
        values = policy.evaluate(latents.repeat(count, 1, 1, 1, 1), text.repeat(count), member_seeds, steps, kind)
        out.append(values.view(count, -1).T)
        member += count
    return torch.cat(out, dim=1)


def _derive(seeds: torch.Tensor, stage: int, index: int) -> torch.Tensor:
    return torch.tensor([mix_seed(s, stage, index) for s in seeds.tolist()])
