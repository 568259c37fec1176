"""Best-of-N: propose N chunks, imagine the future of each, and choose by value (paper, test-time planning; method 4.1).

Each step runs once for all candidates of all observations: first N candidates, then their futures, then the values of these futures.
Candidate 0 keeps the caller's seed. With N = 1 the result is therefore the policy's own, and ties change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.model import sampling
from cosmos_ray.model.injection import probability
from cosmos_ray.model.latents import read_actions, read_value
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.planning.lookahead import look_ahead
from cosmos_ray.planning.proposals import propose
from cosmos_ray.planning.rejection import score_until_certain
from cosmos_ray.planning.scoring import imagine, score
from cosmos_ray.planning.selectors import agreement, unjudged


@dataclass
class Decision:
    """The chosen chunks of B observations, and the scores behind the choice."""

    actions: torch.Tensor  #: (B, K, d) float32, physical units
    values: torch.Tensor  #: (B,) the policy's own value of the chosen chunk, in [-1, 1]
    scores: torch.Tensor  #: (B, N) candidate scores in [0, 1]; (B, 1) of the policy's own value without planning
    chosen: torch.Tensor  #: (B,) int64 index of the chosen candidate
    candidates: torch.Tensor  #: (B, N, K, d) every proposed chunk
    latents: torch.Tensor  #: (B, C, T, h, w) of the chosen candidate; with planning, its first imagined future, if there is one
    autopilot: dict[str, Any] | None = None  #: with a deadline, what :class:`Autopilot` chose: plain numbers and words


def act_directly(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int) -> Decision:
    """The policy alone: one chunk per observation. Future and value come from the same samples. Arguments as for :func:`best_of_n`."""
    latents = sampling.act(policy, known, text, seeds, steps)
    actions, values = read_actions(policy, latents), read_value(policy, latents)
    return Decision(actions, values, probability(values)[:, None], torch.zeros(len(seeds), dtype=torch.int64), actions[:, None], latents)


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
    code); then nothing else is evaluated, and the planning network is not asked. The other ranks are those of ``selectors``. With
    ``config.depth`` above 1 the score is that of :func:`look_ahead`.
    """
    b, n = len(seeds), config.candidates
    proposals = propose(policy, known, text, seeds, steps, n, config.spread)
    network, prompts = planning_network or (policy, text)
    chosen = None
    if config.depth > 1:
        ahead = look_ahead(policy, text, network, prompts, proposals, steps, config)
        futures, scores, chosen = ahead.first, ahead.scores, ahead.ranking.argmax(1).cpu()
    elif config.rank_by == "joint":
        futures, scores = proposals.latents, probability(read_value(policy, proposals.latents))
    elif config.rank_by in ("random", "medoid"):
        futures, scores = proposals.latents, unjudged(proposals, config.rank_by, n)
    else:
        seen = proposals.seen_by(network, prompts.repeat_interleave(n), policy)
        if config.rank_by == "consensus":
            futures = imagine(network, seen, config, 0)
            scores = agreement(futures[:, :, list(network.layout.future)], n)
        elif config.early_rejection:
            futures, scores, chosen = score_until_certain(network, seen, config, n)
        else:
            futures, scores = score(network, seen, config)
    scores = scores.view(b, n)
    if chosen is None:
        chosen = scores.argmax(1).cpu()  # argmax takes the first of equals: candidate 0 keeps ties
    pick = torch.arange(b) * n + chosen
    return Decision(proposals.actions[pick], read_value(policy, proposals.latents)[pick], scores, chosen,
                    proposals.actions.unflatten(0, (b, n)), futures[pick])
