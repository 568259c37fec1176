"""Plays the arms of an audit on held-out initial states, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cosmos_ray.config import RunConfig
from cosmos_ray.inference.core import load_core
from cosmos_ray.oracle.branch import Branch, Simulator
from cosmos_ray.oracle.chooser import Chooser
from cosmos_ray.rollout.ticket import evaluation_noise_seed, state_seed
from cosmos_ray.sim.make import make

PROBED = 0.25  #: share of the policy's decisions at which every candidate gets every score


class OracleCore:
    """One simulator and one policy.

    Episode ``index`` has the initial state and the noise of this episode in ``evaluate``.

    Args:
        checkpoint: directory of the policy.
        planning_checkpoint: directory of the planning network; "" lets the policy plan for itself.
    """

    def __init__(self, config: RunConfig, checkpoint: str, planning_checkpoint: str = ""):
        self.config = config
        core = load_core(checkpoint, config.inference, "cuda" if config.inference.gpus else "cpu", planning_checkpoint)
        simulator = Simulator(make(config.sim), config.rollout.execute)
        self.chooser = Chooser(core.policy, simulator, config.planner, steps=config.inference.steps, gamma=config.replay.gamma,
                               planning_network=core.planning_network)

    def play(self, arm: str, indices: list[int]) -> list[dict[str, Any]]:
        """Whether ``arm`` succeeds in each episode: {arm, index, success, steps}."""
        ends = [self._begin(index) for index in indices]
        while running := [i for i, end in enumerate(ends) if not end.done]:
            for i, end in zip(running, self.chooser.choose(arm, [ends[i] for i in running]), strict=True):
                ends[i] = end
        return [{"arm": arm, "index": index, "success": end.success, "steps": end.step} for index, end in zip(indices, ends, strict=True)]

    def probe(self, indices: list[int]) -> list[dict[str, Any]]:
        """The scores of all candidates at some decisions of the policy.

        One {index, step, spread, name of a score: its N numbers, parts} per decision. ``spread`` is the mean standard deviation of the
        candidates' actions; ``parts`` are those of :meth:`Chooser.partly_true_values`.
        """
        return [row for index in indices for row in self._probe(index)]

    def close(self) -> None:
        self.chooser.simulator.env.close()

    def _begin(self, index: int) -> Branch:
        seed = state_seed("eval", self.config.seed, index)
        return self.chooser.simulator.begin(seed, evaluation_noise_seed(seed))

    def _probe(self, index: int) -> Iterator[dict[str, Any]]:
        chooser, branch = self.chooser, self._begin(index)
        while not branch.done:
            if np.random.default_rng([branch.noise_seed, branch.step, 1]).random() < PROBED:
                proposals = chooser.propose([branch])
                outcomes = chooser.outcomes([branch], proposals)
                yield {
                    "index": index, "step": branch.step, "spread": float(proposals.actions.std(0).mean()),
                    "Q(s,a)": chooser.imagined_values(proposals, "action").tolist(),
                    "V(s')": chooser.imagined_values(proposals).tolist(),
                    "V(true s')": chooser.true_future_values([branch], proposals, outcomes).tolist(),
                    "parts": {name: v.tolist() for name, v in chooser.partly_true_values([branch], proposals, outcomes).items()},
                    "return": chooser.returns(outcomes, np.full(len(outcomes), branch.step)).tolist(),
                }
            branch = chooser.choose("policy", [branch])[0]
