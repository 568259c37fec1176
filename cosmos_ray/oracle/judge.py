"""Ways to choose among candidate chunks, from the learned planner to one that cannot be wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.model.injection import probability
from cosmos_ray.model.policy import CosmosPolicy, TrainingBatch
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.oracle.branch import Branch, Simulator
from cosmos_ray.planning.aggregate import aggregate
from cosmos_ray.planning.best_of_n import Proposals, propose, score, value_samples
from cosmos_ray.seeds import mix_seed

#: Arm -> what it is. All of them propose the same candidates in the same state; they differ in how they choose.
ARMS = {
    "policy": "the first candidate: no planning",
    "random": "any candidate",
    "Q(s,a)": "learned value of state and action, nothing imagined",
    "V(s')": "learned value of the learned world model's future",
    "V(true s')": "learned value of the future that the simulator gives",
    "return": "the return that the policy gets from there on, in the simulator",
}


class Judge:
    """A policy, a simulator and a planner's settings.

    Args:
        steps: network evaluations per proposed chunk.
        gamma: discount of returns per control step.
        critic: the network that imagines and values candidates, the policy itself by default.
    """

    def __init__(self, policy: CosmosPolicy, simulator: Simulator, planner: PlannerConfig, *, steps: int, gamma: float,
                 critic: CosmosPolicy | None = None):
        self.critic = critic or policy
        self.policy, self.simulator, self.planner, self.steps, self.gamma = policy, simulator, planner, steps, gamma

    def propose(self, branches: list[Branch], n: int | None = None) -> Proposals:
        """The candidates of the planner in each state (``n`` of them), with the noise an evaluation episode has there."""
        known = self.policy.current_latents(np.stack([b.images for b in branches]), np.stack([b.proprio for b in branches]))
        text = self.policy.embed([self.simulator.instruction] * len(branches))
        seeds = torch.tensor([mix_seed(b.noise_seed, b.step) for b in branches])
        return propose(self.policy, known, text, seeds, self.steps, n or self.planner.candidates, self.planner.spread)

    def outcomes(self, branches: list[Branch], proposals: Proposals) -> list[Branch]:
        """Where every candidate really leads, one branch per row."""
        n = len(proposals.seeds) // len(branches)
        return [self.simulator.run(branches[row // n], chunk) for row, chunk in enumerate(proposals.actions.cpu().numpy())]

    def imagined_values(self, proposals: Proposals, value: str = "future") -> np.ndarray:
        """(B*N,) the planner's own scores, in [0, 1]: V(s') or, with ``"action"``, Q(s, a)."""
        return self._scores(proposals, value, {})

    def true_future_values(self, branches: list[Branch], proposals: Proposals, outcomes: list[Branch]) -> np.ndarray:
        """(B*N,) the learned value of what every candidate really leads to, in [0, 1]."""
        latents = self._true_latents(branches, proposals, outcomes)
        values = value_samples(self.critic, latents, self._prompts(len(outcomes)), proposals.seeds, self.planner, SampleType.VALUE_FUTURE)
        return aggregate(probability(values), self.planner.aggregate).cpu().numpy()

    def partly_true_values(self, branches: list[Branch], proposals: Proposals, outcomes: list[Branch]) -> dict[str, np.ndarray]:
        """(B*N,) the planner's scores V(s') with one part of every imagined future as it really comes, in [0, 1], by the name of that
        part: ``proprioception`` or a camera."""
        layout, true = self.critic.layout, self._true_latents(branches, proposals, outcomes)
        return {name: self._scores(proposals, "future", {frame: true[:, :, frame]})
                for name, frame in zip(("proprioception", *layout.cameras), layout.future, strict=True)}

    def _scores(self, proposals: Proposals, value: str, known: dict[int, torch.Tensor]) -> np.ndarray:
        proposals = dataclasses.replace(proposals, text=self._prompts(len(proposals.seeds)))
        return score(self.critic, proposals, dataclasses.replace(self.planner, rank_by=value), known)[1].cpu().numpy()

    def _true_latents(self, branches: list[Branch], proposals: Proposals, outcomes: list[Branch]) -> torch.Tensor:
        """Latents (B*N, C, T, h, w) of state, candidate and what that really leads to."""
        before = [branch for branch in branches for _ in range(len(outcomes) // len(branches))]
        return self.critic.training_latents(TrainingBatch(
            images=np.stack([b.images for b in before]), future_images=np.stack([o.images for o in outcomes]),
            proprio=np.stack([b.proprio for b in before]), future_proprio=np.stack([o.proprio for o in outcomes]),
            actions=proposals.actions.cpu().numpy(),
            value=np.zeros(len(outcomes), np.float32), instructions=[self.simulator.instruction] * len(outcomes),
            kinds=np.full(len(outcomes), int(SampleType.VALUE_FUTURE))))

    def _prompts(self, rows: int) -> Prompts:
        """The instruction as the critic attends to it, ``rows`` times."""
        return self.critic.embed([self.simulator.instruction] * rows)

    def returns(self, outcomes: list[Branch], began: np.ndarray) -> np.ndarray:
        """(rows,) what the policy gets when it goes on alone: gamma to the control steps from ``began`` (rows,) to success, 0 for
        failure."""
        return self._discounted(self.play_on(outcomes), began)

    def _discounted(self, ends: list[Branch], began: np.ndarray) -> np.ndarray:
        return np.array([self.gamma ** (end.step - t) if end.success else 0.0 for end, t in zip(ends, began, strict=True)])

    def play_on(self, branches: list[Branch]) -> list[Branch]:
        """Where the policy alone ends up."""
        ends = list(branches)
        while running := [i for i, end in enumerate(ends) if not end.done]:
            proposals = self.propose([ends[i] for i in running], 1)
            for i, end in zip(running, self.outcomes([ends[i] for i in running], proposals), strict=True):
                ends[i] = end
        return ends

    def choose(self, arm: str, branches: list[Branch]) -> list[Branch]:
        """One decision of ``arm`` in each state: where its choice leads. For "return", where it ends, once that is a success:
        the policy's own way from there on is among its later candidates, so it cannot lose it again."""
        n = 1 if arm == "policy" else self.planner.candidates
        proposals = self.propose(branches, n)
        actions, outcomes = proposals.actions.cpu().numpy(), None
        if arm == "policy":
            scores = np.zeros(len(branches))
        elif arm == "random":
            scores = np.concatenate([np.random.default_rng([b.noise_seed, b.step]).random(n) for b in branches])
        elif arm in ("Q(s,a)", "V(s')"):
            scores = self.imagined_values(proposals, "action" if arm == "Q(s,a)" else "future")
        else:
            outcomes = self.outcomes(branches, proposals)
            if arm == "return":
                ends = self.play_on(outcomes)
                scores = self._discounted(ends, np.repeat([b.step for b in branches], n))
                outcomes = [end if end.success else outcome for end, outcome in zip(ends, outcomes, strict=True)]
            else:
                scores = self.true_future_values(branches, proposals, outcomes)
        best = np.arange(len(branches)) * n + scores.reshape(-1, n).argmax(1)
        if outcomes is not None:
            return [outcomes[row] for row in best]
        return [self.simulator.run(branch, actions[row]) for branch, row in zip(branches, best, strict=True)]
