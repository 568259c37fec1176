"""Ways to choose among candidate chunks, from the learned planner to the true return."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.config.acting import RankBy
from cosmos_ray.model.injection import probability
from cosmos_ray.model.latents import current_latents, training_latents
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.training_batch import TrainingBatch
from cosmos_ray.oracle.branch import Branch, Simulator
from cosmos_ray.planning.aggregate import aggregate
from cosmos_ray.planning.lookahead import look_ahead
from cosmos_ray.planning.proposals import Proposals, propose
from cosmos_ray.planning.scoring import score, value_samples
from cosmos_ray.rollout.ticket import decision_noise_seed

#: Arm -> its way to choose. All arms propose the same candidates in the same state.
ARMS = {
    "policy": "the first candidate: no planning",
    "random": "any candidate",
    "Q(s,a)": "learned value of state and action, nothing imagined",
    "V(s')": "learned value of the learned world model's future",
    "V(true s')": "learned value of the simulator's future",
    "return": "return of the policy from there on, in the simulator",
}


class Chooser:
    """Chooses among the candidates of a policy, in any of the ways of ``ARMS``.

    Args:
        policy: proposes the candidates.
        simulator: plays them.
        planner: number and spread of candidates, and the settings of the learned arms.
        steps: network evaluations per proposed chunk.
        gamma: discount of returns per control step.
        planning_network: imagines and values candidates; by default the policy does.
    """

    def __init__(self, policy: CosmosPolicy, simulator: Simulator, planner: PlannerConfig, *, steps: int, gamma: float,
                 planning_network: CosmosPolicy | None = None):
        self.planning_network = planning_network or policy
        self.policy, self.simulator, self.planner, self.steps, self.gamma = policy, simulator, planner, steps, gamma

    def propose(self, branches: list[Branch], n: int | None = None) -> Proposals:
        """``n`` candidates in each state (the planner's number by default), with the noise that an evaluation episode has there."""
        known = current_latents(self.policy, np.stack([b.images for b in branches]), np.stack([b.proprio for b in branches]))
        text = self.policy.embed([self.simulator.instruction] * len(branches))
        seeds = torch.tensor([decision_noise_seed(b.noise_seed, b.step) for b in branches])
        return propose(self.policy, known, text, seeds, self.steps, n or self.planner.candidates, self.planner.spread)

    def outcomes(self, branches: list[Branch], proposals: Proposals) -> list[Branch]:
        """The true end of every candidate, one branch per row."""
        n = len(proposals.seeds) // len(branches)
        return [self.simulator.run(branches[row // n], chunk) for row, chunk in enumerate(proposals.actions.cpu().numpy())]

    def imagined_values(self, proposals: Proposals, rank_by: RankBy = "future") -> np.ndarray:
        """(B*N,) float32 scores of the planner in [0, 1]: V(s'), or Q(s, a) with ``rank_by`` "action". With ``planner.beam``, 1 less
        for a candidate that was left behind."""
        return self._scores(proposals, rank_by, {})

    def true_future_values(self, branches: list[Branch], proposals: Proposals, outcomes: list[Branch]) -> np.ndarray:
        """(B*N,) float32 learned values of the true end of every candidate, in [0, 1]."""
        latents = self._true_latents(branches, proposals, outcomes)
        prompts = self._prompts(len(outcomes))
        values = value_samples(self.planning_network, latents, prompts, proposals.seeds, self.planner, SampleType.VALUE_FUTURE)
        return aggregate(probability(values), self.planner.aggregate).cpu().numpy()

    def partly_true_values(self, branches: list[Branch], proposals: Proposals, outcomes: list[Branch]) -> dict[str, np.ndarray]:
        """{part: (B*N,) float32 scores V(s') in [0, 1]}, where the true future replaces this part of the imagined one.

        A part is ``proprioception`` or a camera.
        """
        layout, true = self.planning_network.layout, self._true_latents(branches, proposals, outcomes)
        return {name: self._scores(proposals, "future", {frame: true[:, :, frame]})
                for name, frame in zip(("proprioception", *layout.cameras), layout.future, strict=True)}

    def _scores(self, proposals: Proposals, rank_by: RankBy, known: dict[int, torch.Tensor]) -> np.ndarray:
        planner, network = dataclasses.replace(self.planner, rank_by=rank_by), self.planning_network
        if planner.depth > 1:
            states = len(proposals) // planner.candidates
            text = self.policy.embed([self.simulator.instruction] * states)
            ahead = look_ahead(self.policy, text, network, self._prompts(states), proposals, self.steps, planner, known)
            return ahead.ranking.flatten().cpu().numpy()
        proposals = proposals.seen_by(network, self._prompts(len(proposals)), self.policy)
        return score(network, proposals, planner, known)[1].cpu().numpy()

    def _true_latents(self, branches: list[Branch], proposals: Proposals, outcomes: list[Branch]) -> torch.Tensor:
        """Latents (B*N, C, T, h, w) float32 of state, candidate and true end."""
        before = [branch for branch in branches for _ in range(len(outcomes) // len(branches))]
        return training_latents(self.planning_network, TrainingBatch(
            images=np.stack([b.images for b in before]), future_images=np.stack([o.images for o in outcomes]),
            proprio=np.stack([b.proprio for b in before]), future_proprio=np.stack([o.proprio for o in outcomes]),
            actions=proposals.actions.cpu().numpy(),
            value=np.zeros(len(outcomes), np.float32), instructions=[self.simulator.instruction] * len(outcomes),
            sample_types=np.full(len(outcomes), int(SampleType.VALUE_FUTURE))))

    def _prompts(self, rows: int) -> Prompts:
        """``rows`` prompts of the planning network, all with the simulator's instruction."""
        return self.planning_network.embed([self.simulator.instruction] * rows)

    def returns(self, outcomes: list[Branch], began: np.ndarray) -> np.ndarray:
        """(rows,) float64 returns of the policy alone: gamma to the power of the control steps from ``began`` (rows,) to success; 0 for a
        failure."""
        return self._discounted(self.play_on(outcomes), began)

    def _discounted(self, ends: list[Branch], began: np.ndarray) -> np.ndarray:
        return np.array([self.gamma ** (end.step - t) if end.success else 0.0 for end, t in zip(ends, began, strict=True)])

    def play_on(self, branches: list[Branch]) -> list[Branch]:
        """The ends of the episodes when the policy continues alone."""
        ends = list(branches)
        while running := [i for i, end in enumerate(ends) if not end.done]:
            proposals = self.propose([ends[i] for i in running], 1)
            for i, end in zip(running, self.outcomes([ends[i] for i in running], proposals), strict=True):
                ends[i] = end
        return ends

    def choose(self, arm: str, branches: list[Branch]) -> list[Branch]:
        """One decision of ``arm`` in each state; returns the branches behind the chosen candidates.

        Once "return" has found a success, the result is the end of the episode: later candidates include the policy's own, so the arm
        cannot lose the success again.
        """
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
