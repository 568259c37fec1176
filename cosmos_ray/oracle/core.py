"""Plays the arms of an audit on held-out initial states, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cosmos_ray.config import RunConfig
from cosmos_ray.inference.core import load_core
from cosmos_ray.oracle.branch import Branch, Simulator
from cosmos_ray.oracle.chooser import Chooser
from cosmos_ray.rollout.ticket import evaluation_noise_seed, task_and_state
from cosmos_ray.seeds import state_seed
from cosmos_ray.sim.make import make

KEPT = 4  #: tasks whose simulator stays; a ticket has one task, and tickets of a task come together
PROBED = 0.25  #: share of the policy's decisions at which every candidate gets every score


class OracleCore:
    """A simulator of each task and one policy.

    Episode ``index`` has the task, the initial state and the noise of this episode in ``evaluate``. Episodes that are played together are
    of one task.

    Args:
        checkpoint: directory of the policy.
        planning_checkpoint: directory of the planning network; "" lets the policy plan for itself.
    """

    def __init__(self, config: RunConfig, checkpoint: str, planning_checkpoint: str = ""):
        self.config = config
        self._core = load_core(checkpoint, config.inference, "cuda" if config.inference.gpus else "cpu", planning_checkpoint)
        self._choosers: dict[str, Chooser] = {}
        self.chooser(0)  # what cannot be simulated is said at once

    def chooser(self, index: int) -> Chooser:
        """Who chooses in episode ``index``, with the simulator of its task."""
        config, core = self.config, self._core
        task, _ = task_and_state(config.sim.names, index)
        if task not in self._choosers:
            if len(self._choosers) >= KEPT:
                self._choosers.pop(next(iter(self._choosers))).simulator.env.close()
            sim = next(sim for sim in config.sim.each() if sim.task == task)
            self._choosers[task] = Chooser(
                core.policy, Simulator(make(sim), config.rollout.execute), config.planner, steps=config.inference.steps,
                gamma=config.replay.gamma, planning_network=core.planning_network)
        return self._choosers[task]

    def play(self, arm: str, indices: list[int]) -> list[dict[str, Any]]:
        """Whether ``arm`` succeeds in each episode: {arm, index, success, steps}."""
        chooser, ends = self.chooser(indices[0]), [self._begin(index) for index in indices]
        while running := [i for i, end in enumerate(ends) if not end.done]:
            for i, end in zip(running, chooser.choose(arm, [ends[i] for i in running]), strict=True):
                ends[i] = end
        return [{"arm": arm, "index": index, "success": end.success, "steps": end.step} for index, end in zip(indices, ends, strict=True)]

    def probe(self, indices: list[int]) -> list[dict[str, Any]]:
        """The scores of all candidates at some decisions of the policy.

        One {index, step, spread, name of a score: its N numbers, parts} per decision. ``spread`` is the mean standard deviation of the
        candidates' actions; ``parts`` are those of :meth:`Chooser.partly_true_values`.
        """
        return [row for index in indices for row in self._probe(index)]

    def close(self) -> None:
        for chooser in self._choosers.values():
            chooser.simulator.env.close()

    def _begin(self, index: int) -> Branch:
        seed = state_seed("eval", self.config.seed, task_and_state(self.config.sim.names, index)[1])
        return self.chooser(index).simulator.begin(seed, evaluation_noise_seed(seed))

    def _probe(self, index: int) -> Iterator[dict[str, Any]]:
        chooser, branch = self.chooser(index), self._begin(index)
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
