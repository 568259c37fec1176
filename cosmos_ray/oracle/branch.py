"""Episodes that can continue in several ways from any state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cosmos_ray.errors import ConfigError, SimulationError
from cosmos_ray.sim.simulation import Simulation


@dataclass(frozen=True)
class Branch:
    """One state of one episode."""

    noise_seed: int  #: fixes the sampler's noise of all decisions
    step: int  #: control steps so far
    state: np.ndarray  #: (S,) float64, enough to continue from here
    images: np.ndarray  #: (cameras, H, W, 3) uint8
    proprio: np.ndarray  #: (p,) float32
    success: bool = False
    done: bool = False


class Simulator:
    """A world model without error: one environment that plays many episodes, each from its own state.

    Args:
        env: the environment; its running episode ends.
        execute: actions of a chunk that are executed; 0 runs the whole chunk.
    """

    def __init__(self, env: Simulation, execute: int = 0):
        if not env.restorable:
            raise ConfigError(f"an audit goes on from one state in several ways, and {env.task} has no state that can be restored: "
                              "`evaluate` works")
        self.env, self.execute = env, execute

    @property
    def instruction(self) -> str:
        return self.env.instruction

    def begin(self, seed: int, noise_seed: int) -> Branch:
        """The first state of an episode."""
        self.env.reset(seed)
        return self._here(noise_seed, self.env.state())

    def run(self, branch: Branch, chunk: np.ndarray) -> Branch:
        """The state after a chunk of actions (K, d), executed as in a rollout. A simulation error is a failed episode."""
        self.env.restore(branch.state)
        try:
            for action in np.clip(chunk[: self.execute or None], -1, 1).astype(np.float32):
                if self.env.step(action).done:
                    break
        except SimulationError:
            return Branch(branch.noise_seed, self.env.step_index, branch.state, branch.images, branch.proprio, done=True)
        return self._here(branch.noise_seed, self.env.state())

    def _here(self, noise_seed: int, state: np.ndarray) -> Branch:
        env = self.env
        return Branch(noise_seed, env.step_index, state, env.render_state(state), env.proprio(), env.success, env.done)
