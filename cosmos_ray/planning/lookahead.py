"""Plans of two or three chunks: s -> a -> s' -> a' -> s'' (paper, search depth). Pure torch.

From every imagined future of a candidate the policy proposes again, the world model imagines on, and the value judges where the last chunk
ends. A plan has one chunk per level. All plans of one level, of all candidates of all observations, share each batch.

A candidate's score is what the policy can make of it: the mean over its imagined futures of the best plan from there on, and so on down to
the last level. All plans are judged at the same depth, so that a discount cannot favour the short ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.model.injection import probability
from cosmos_ray.model.latents import next_state, read_value, renormalized
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.planning.proposals import Proposals, propose
from cosmos_ray.planning.scoring import imagine_all, judge
from cosmos_ray.seeds import mix_seed


@dataclass
class Ahead:
    """Candidates after a look ahead."""

    first: torch.Tensor  #: (B*N, C, T, h, w) latents with the first future of every candidate
    scores: torch.Tensor  #: (B, N) float32 in [0, 1]; of a candidate that the beam left behind, its score where that happened
    kept: torch.Tensor  #: (B, N) bool: the beam has not left the candidate behind

    @property
    def ranking(self) -> torch.Tensor:
        """(B, N) scores, 1 less where the beam left a candidate behind: the best has the highest, the first of equals."""
        return self.scores - (~self.kept).float()


@dataclass
class _Level:
    """How the plans of the next level hang on those of this one."""

    kept: torch.Tensor  #: (kept,) int64 plans of this level that were looked further into
    plans: int  #: of this level
    futures: int
    branch: int

    def back(self, scores: torch.Tensor) -> torch.Tensor:
        """(plans,) scores from those of the next level's plans: the best of every future, and the mean of the futures. -inf was left
        behind."""
        best = scores.view(-1, self.futures, self.branch).max(2).values.mean(1)
        return scores.new_full((self.plans,), -torch.inf).index_copy(0, self.kept.to(scores.device), best)


def look_ahead(policy: CosmosPolicy, text: Prompts, network: CosmosPolicy, prompts: Prompts, proposals: Proposals, steps: int,
               config: PlannerConfig, known: dict[int, torch.Tensor] | None = None) -> Ahead:
    """Score candidates by plans of ``config.depth`` chunks.

    Args:
        policy: proposed ``proposals`` and proposes the later chunks, with ``steps`` evaluations each.
        text: B rows of prompts of ``policy``.
        network: imagines and values; with ``config.rank_by`` "joint" the policy's own futures and values count instead.
        prompts: B rows of prompts of ``network``.
        proposals: the B*N candidates.
        known: as for :func:`scoring.score`; acts on the first future.
    """
    if config.rank_by == "joint":
        network, prompts = policy, text
    b = len(text)
    observation = torch.arange(b).repeat_interleave(len(proposals) // b)  # of every plan
    levels: list[_Level] = []
    first, scores = proposals.latents, torch.zeros(len(proposals))
    for level in range(1, config.depth + 1):
        last = level == config.depth
        seen = proposals.seen_by(network, prompts.take(observation.to(prompts.rows.device)), policy)
        futures = _futures(network, seen, config, known if level == 1 else None, last)
        if level == 1 and futures:
            first = futures[0]
        kept = torch.arange(len(proposals))
        if last or config.beam:
            judged = _judge(network, seen, futures, config)
            back = judged
            for above in reversed(levels):
                back = above.back(back)
            scores = torch.where(back.isfinite(), back, scores.to(back))
            if last:
                break
            kept = best(judged.view(b, -1), config.beam)
        levels.append(_Level(kept, len(proposals), len(futures), config.branch))
        states = torch.stack([next_state(network, future[kept]) for future in futures], 1).flatten(0, 1)
        seeds = torch.tensor([mix_seed(seed, 7, i) for seed in proposals.seeds[kept].tolist() for i in range(len(futures))])
        observation = observation[kept].repeat_interleave(len(futures))
        proposals = propose(policy, renormalized(states, network, policy), text.take(observation.to(text.rows.device)), seeds, steps,
                            config.branch, config.spread)
        observation = observation.repeat_interleave(config.branch)
    return Ahead(first, scores.view(b, -1), back.isfinite().view(b, -1))


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """(B * count,) int64 ascending places of the ``count`` highest of each row of (B, n) scores, in the flat tensor; of equals the first.
    All where there are no more."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values.cpu()
    return (order + torch.arange(len(scores))[:, None] * scores.shape[1]).flatten()


def _futures(network: CosmosPolicy, proposals: Proposals, config: PlannerConfig, known: dict[int, torch.Tensor] | None,
             last: bool) -> list[torch.Tensor]:
    """The futures of proposals; at the ``last`` level none that no value reads."""
    if config.rank_by == "joint":
        return [proposals.latents]
    return [] if last and config.rank_by == "action" else imagine_all(network, proposals, config, known)


def _judge(network: CosmosPolicy, proposals: Proposals, futures: list[torch.Tensor], config: PlannerConfig) -> torch.Tensor:
    if config.rank_by == "joint":
        return probability(read_value(network, proposals.latents))
    return judge(network, proposals, futures, config)
