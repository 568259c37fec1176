"""Best-of-N in waves: whenever it is asked, the best of the candidates so far. Pure torch.

Candidate q is the same one as in :func:`best_of_n`, and so is its score: after N candidates the choice is that of best-of-N, in whatever
waves they came.
"""

from __future__ import annotations

import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.model.injection import probability
from cosmos_ray.model.latents import read_value
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.planning.best_of_n import Decision
from cosmos_ray.planning.proposals import Proposals, propose
from cosmos_ray.planning.rejection import score_until_certain
from cosmos_ray.planning.scoring import score


class OutOfTime(Exception):
    """The next evaluation would end after the deadline: what it belongs to is given up."""


class Waves:
    """The candidates of one decision for B observations. Arguments as for :func:`best_of_n`; ``prompts`` are those of ``network``."""

    def __init__(self, policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int, config: PlannerConfig,
                 network: CosmosPolicy, prompts: Prompts):
        self.policy, self.known, self.text, self.seeds, self.steps, self.config = policy, known, text, seeds, steps, config
        self.network, self.prompts = network, prompts
        self.count = 0  #: waves that were compared

    def begin(self) -> None:
        """Candidate 0, the policy's own chunk."""
        self._best = self._propose(0, 1)
        self._futures, self._chosen = self._best.latents, torch.zeros(len(self.seeds), dtype=torch.int64)
        self._best_scores = torch.full((len(self.seeds),), -1.0)
        self._scores: list[torch.Tensor] = []  # (B, n) of every wave
        self._candidates = [self._best.actions[:, None]]

    @property
    def compared(self) -> int:
        """Candidates so far."""
        return sum(chunks.shape[1] for chunks in self._candidates)

    @property
    def valued_again(self) -> int:
        """Candidates that the next wave values beside its own: the best so far, where it has no score that can be compared."""
        return int(not self.count or self.config.early_rejection)

    def add(self, n: int) -> None:
        """Propose and value ``n`` more; the best so far changes where one of them is better. Nothing changes when this is given up."""
        b, before = len(self.seeds), self.compared
        new = self._propose(before, n)
        group = _side_by_side(self._best, new, n, self.text) if self.valued_again else new
        size, wins = n + self.valued_again, None
        if self.config.rank_by == "joint":
            futures, scores = group.latents, probability(read_value(self.policy, group.latents)).view(b, size)
        else:
            seen = group.seen_by(self.network, self.prompts.repeat_interleave(size), self.policy)
            if self.config.early_rejection:
                futures, scores, wins = score_until_certain(self.network, seen, self.config, size)
            else:
                futures, scores = score(self.network, seen, self.config)
                scores = scores.view(b, size)
        scores = scores.cpu()
        if wins is None:
            wins = scores.argmax(1)  # the first of equals
        rows = torch.arange(b)
        numbers = torch.cat((self._chosen[:, None], torch.arange(before, before + n).expand(b, n)), 1)[:, 1 - self.valued_again:]
        better = scores[rows, wins] > self._best_scores if not self.valued_again else torch.ones(b, dtype=torch.bool)
        pick = rows * size + wins
        self._best = _where(better, group.take(pick), self._best)
        self._futures = torch.where(_rows(better, futures), futures[pick], self._futures)
        self._best_scores = torch.where(better, scores[rows, wins], self._best_scores)
        self._chosen = torch.where(better, numbers[rows, wins], self._chosen)
        self._scores.append(scores if not self.count else scores[:, self.valued_again:])
        self._candidates.append(new.actions.unflatten(0, (b, n)))
        self.count += 1

    def decision(self) -> Decision:
        """The best so far."""
        values = read_value(self.policy, self._best.latents)
        scores = torch.cat(self._scores, 1) if self._scores else probability(values)[:, None]
        return Decision(self._best.actions, values, scores, self._chosen, torch.cat(self._candidates, 1), self._futures)

    def _propose(self, first: int, n: int) -> Proposals:
        return propose(self.policy, self.known, self.text, self.seeds, self.steps, n, self.config.spread, first)


def _side_by_side(one: Proposals, more: Proposals, n: int, text: Prompts) -> Proposals:
    """One proposal of each of B observations before ``n`` more of each: B * (1 + n) rows."""
    def joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat((a[:, None], b.unflatten(0, (-1, n))), 1).flatten(0, 1)

    return Proposals(joined(one.latents, more.latents), joined(one.actions, more.actions), text.repeat_interleave(n + 1),
                     joined(one.seeds, more.seeds))


def _where(better: torch.Tensor, new: Proposals, old: Proposals) -> Proposals:
    """Rows of ``new`` where they are ``better`` (B,), else of ``old``."""
    return Proposals(torch.where(_rows(better, new.latents), new.latents, old.latents),
                     torch.where(_rows(better, new.actions), new.actions, old.actions), old.text, old.seeds)


def _rows(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask (B,) that broadcasts along the rows of ``like``."""
    return mask.to(like.device).view(-1, *(1,) * (like.dim() - 1))
