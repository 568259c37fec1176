"""Best-of-N: propose N chunks, imagine the future of each, and choose by value (paper, test-time planning; method 4.1).

Each step runs once for all candidates of all observations: first N candidates, then their futures, then the values of these futures.
Candidate 0 keeps the caller's seed. With N = 1 the result is therefore the policy's own, and ties change nothing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.model import sampling
from cosmos_ray.model.injection import probability
from cosmos_ray.model.latents import action_frame, read_actions, read_value, renormalized
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.offsets import chunk_offset
from cosmos_ray.planning.aggregate import aggregate
from cosmos_ray.seeds import mix_seed


@dataclass
class Decision:
    """The chosen chunks of B observations, and the scores behind the choice."""

    actions: torch.Tensor  #: (B, K, d) float32, physical units
    values: torch.Tensor  #: (B,) the policy's own value of the chosen chunk, in [-1, 1]
    scores: torch.Tensor  #: (B, N) candidate scores in [0, 1]; (B, 1) of the policy's own value without planning
    chosen: torch.Tensor  #: (B,) int64 index of the chosen candidate
    candidates: torch.Tensor  #: (B, N, K, d) every proposed chunk
    latents: torch.Tensor  #: (B, C, T, h, w) of the chosen candidate; with planning, its first imagined future, if there is one


def step_ladder(longest: int, count: int, ladder: str = "rounded") -> list[int]:
    """Network evaluations of each member of an ensemble: ``count`` numbers spread over 1..longest, as the paper's [1, 3, 5].

    ``ladder`` "truncated" rounds down, as the public code does. One member is no ensemble: it takes the longest.
    """
    if count == 1:
        return [longest]
    if ladder == "truncated":
        return np.linspace(1, longest, count).astype(int).tolist()
    return [round(1 + i * (longest - 1) / (count - 1)) for i in range(count)]


def act_directly(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int) -> Decision:
    """The policy alone: one chunk per observation. Future and value come from the same samples. Arguments as for :func:`best_of_n`."""
    latents = sampling.act(policy, known, text, seeds, steps)
    actions, values = read_actions(policy, latents), read_value(policy, latents)
    return Decision(actions, values, probability(values)[:, None], torch.zeros(len(seeds), dtype=torch.int64), actions[:, None], latents)


@dataclass
class Proposals:
    """N candidate chunks for each of B observations, as B * N rows. The N rows of one observation are neighbours."""

    latents: torch.Tensor  #: (B*N, C, T, h, w) with the state, and with the candidate as ACTION frame
    actions: torch.Tensor  #: (B*N, K, d) float32, physical units
    text: Prompts
    seeds: torch.Tensor  #: (B*N,) int64, equal for all rows of one observation: the same noise for all candidates

    def seen_by(self, network: CosmosPolicy, prompts: Prompts, policy: CosmosPolicy) -> Proposals:
        """These proposals of ``policy`` for a ``network`` that has its own normalisation and its own ``prompts``, B * N rows."""
        return dataclasses.replace(self, latents=renormalized(self.latents, policy, network), text=prompts)


def propose(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int, n: int,
            spread: float = 0.0) -> Proposals:
    """``n`` chunks of the policy per observation. ``spread`` moves every second chunk. Other arguments as for :func:`best_of_n`."""
    own = torch.tensor([s if q == 0 else mix_seed(s, 1, q) for s in seeds.tolist() for q in range(n)])
    seeds = seeds.repeat_interleave(n)
    known, text = known.repeat_interleave(n, 0), text.repeat_interleave(n)
    latents = sampling.act(policy, known, text, own, steps)
    actions = read_actions(policy, latents)
    if spread and n > 1:
        rows = torch.arange(len(own)) % n % 2 == 1
        moving = policy.spec.moving
        offsets = np.stack([chunk_offset(mix_seed(s, 5), actions.shape[2], spread, moving) for s in own[rows].tolist()])
        actions[rows] = (actions[rows] + torch.as_tensor(offsets[:, None]).to(actions)).clamp(-1, 1)
    # The ACTION frame gets the chunk that would be executed: the averaged one, tiled as in training. (The public code keeps the raw
    # generated frame, method 4.1.)
    latents[:, :, policy.layout.action] = action_frame(policy, actions)
    return Proposals(latents, actions, text, seeds)


def best_of_n(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int, config: PlannerConfig,
              planning_network: tuple[CosmosPolicy, Prompts] | None = None) -> Decision:
    """Choose among ``config.candidates`` chunks per observation.

    Args:
        known: (B, C, T, h, w) float32 latents of the current states.
        text: B rows of prompts.
        seeds: (B,) int64, one per observation.
        steps: network evaluations per proposed chunk.
        planning_network: (network, its own B rows of prompts). The network imagines and values the candidates; by default the policy does.
            Network and policy must share layout and tokenizer; each has its own normalisation.

    The score is V(s') of imagined futures; with ``config.rank_by`` "action" it is Q(s, a), with "both" the mean of the two. With "joint" it
    is the value that the policy generated with the candidate (``ar_future_prediction`` and ``ar_value_prediction`` are False in the public
    code); then nothing else is evaluated, and the planning network is not asked.
    """
    b, n = len(seeds), config.candidates
    proposals = propose(policy, known, text, seeds, steps, n, config.spread)
    if config.rank_by == "joint":
        futures, scores = proposals.latents, probability(read_value(policy, proposals.latents))
    else:
        network, prompts = planning_network or (policy, text)
        futures, scores = score(network, proposals.seen_by(network, prompts.repeat_interleave(n), policy), config)
    scores = scores.view(b, n)
    chosen = scores.argmax(1).cpu()  # argmax takes the first of equals: candidate 0 keeps ties
    pick = torch.arange(b) * n + chosen
    return Decision(proposals.actions[pick], read_value(policy, proposals.latents)[pick], scores, chosen,
                    proposals.actions.unflatten(0, (b, n)), futures[pick])


def score(policy: CosmosPolicy, proposals: Proposals, config: PlannerConfig,
          known: dict[int, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(first imagined futures (B*N, C, T, h, w), scores (B*N,) in [0, 1]), by the network ``policy``; not for ``rank_by`` "joint".

    ``known`` maps the position of a frame to latents (B*N, C, h, w) that replace the imagined frame before its future is valued.
    """
    latents, text, seeds = proposals.latents, proposals.text, proposals.seeds
    futures, scores = latents, []
    if config.rank_by != "action":
        futures, values = _values_of_futures(policy, latents, text, seeds, config, known or {})
        scores.append(aggregate(probability(values), config.aggregate))
    if config.rank_by != "future":
        values = value_samples(policy, latents, text, seeds, config, SampleType.VALUE_ACTION)
        scores.append(aggregate(probability(values), config.aggregate))
    return futures, torch.stack(scores).mean(0)


def _values_of_futures(policy: CosmosPolicy, proposed: torch.Tensor, text: Prompts, seeds: torch.Tensor, config: PlannerConfig,
                       known: dict[int, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(first futures (B*N, ...), values (B*N, futures * values)) of V(s')."""
    futures = []
    for i, steps in enumerate(step_ladder(config.future_steps, config.futures, config.ladder)):
        futures.append(sampling.imagine(policy, proposed, text, _derive(seeds, 2, i), steps))
        for frame, latents in known.items():
            futures[-1][:, :, frame] = latents
    rows = torch.cat([
        value_samples(policy, future, text, _derive(seeds, 3, i), config, SampleType.VALUE_FUTURE) for i, future in enumerate(futures)
    ], dim=1)
    return futures[0], rows


def value_samples(policy: CosmosPolicy, latents: torch.Tensor, text: Prompts, seeds: torch.Tensor, config: PlannerConfig,
                  sample_type: SampleType) -> torch.Tensor:
    """(rows, config.value_samples) value samples in [-1, 1]. Members of the ensemble with equal step counts share one batch."""
    out, member = [], 0
    for steps, count in Counter(step_ladder(config.value_steps, config.value_samples, config.ladder)).items():
        member_seeds = torch.cat([_derive(seeds, 4, member + i) for i in range(count)])
        values = sampling.evaluate(policy, latents.repeat(count, 1, 1, 1, 1), text.repeat(count), member_seeds, steps, sample_type)
        out.append(values.view(count, -1).T)
        member += count
    return torch.cat(out, dim=1)


def _derive(seeds: torch.Tensor, stage: int, index: int) -> torch.Tensor:
    return torch.tensor([mix_seed(s, stage, index) for s in seeds.tolist()])
