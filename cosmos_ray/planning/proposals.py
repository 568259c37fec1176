"""Candidate chunks: what the policy would do, N times, with noise of its own each time. Pure torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from cosmos_ray.model import sampling
from cosmos_ray.model.latents import action_frame, read_actions, renormalized
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.offsets import chunk_offset
from cosmos_ray.seeds import mix_seed


@dataclass
class Proposals:
    """N candidate chunks for each of B observations, as B * N rows. The N rows of one observation are neighbours."""

    latents: torch.Tensor  #: (B*N, C, T, h, w) with the state, and with the candidate as ACTION frame
    actions: torch.Tensor  #: (B*N, K, d) float32, physical units
    text: Prompts
    seeds: torch.Tensor  #: (B*N,) int64, equal for all rows of one observation: the same noise for all candidates

    def __len__(self) -> int:
        return len(self.seeds)

    def take(self, rows: torch.Tensor) -> Proposals:
        """The rows at these indices (n,) int64, or where this mask (B*N,) bool is true."""
        return Proposals(self.latents[rows], self.actions[rows], self.text.take(rows), self.seeds[rows])

    def seen_by(self, network: CosmosPolicy, prompts: Prompts, policy: CosmosPolicy) -> Proposals:
        """These proposals of ``policy`` for a ``network`` that has its own normalisation and its own ``prompts``, B * N rows."""
        return dataclasses.replace(self, latents=renormalized(self.latents, policy, network), text=prompts)


def propose(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int, n: int,
            spread: float = 0.0, first: int = 0) -> Proposals:
    """``n`` chunks of the policy per observation, from candidate ``first`` on. ``spread`` moves every second chunk. Other arguments as for
    :func:`best_of_n`."""
    own = torch.tensor([s if q == 0 else mix_seed(s, 1, q) for s in seeds.tolist() for q in range(first, first + n)])
    latents = sampling.act(policy, known, text, own, steps)
    seeds, text = seeds.repeat_interleave(n), text.repeat_interleave(n)
    actions = read_actions(policy, latents)
    rows = (torch.arange(len(own)) % n + first) % 2 == 1
    if spread and rows.any():
        moving = policy.spec.moving
        offsets = np.stack([chunk_offset(mix_seed(s, 5), actions.shape[2], spread, moving) for s in own[rows].tolist()])
        actions[rows] = (actions[rows] + torch.as_tensor(offsets[:, None]).to(actions)).clamp(-1, 1)
    # The ACTION frame gets the chunk that would be executed: the averaged one, tiled as in training. (The public code keeps the raw
    # generated frame, method 4.1.)
    latents[:, :, policy.layout.action] = action_frame(policy, actions)
    return Proposals(latents, actions, text, seeds)
