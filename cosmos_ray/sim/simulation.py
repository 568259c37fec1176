"""What the package asks of a simulation of one task, whichever library runs it, and how an episode is recorded with it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from cosmos_ray import instants
from cosmos_ray.config import SimConfig
from cosmos_ray.errors import SimulationError
from cosmos_ray.sim.trajectory import Trajectory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """Result of one control step. ``reward`` is 1.0 on the step that completes the task, else 0.0."""

    reward: float
    success: bool
    done: bool


class Simulation(ABC):
    """A deterministic environment of one task that starts an episode by seed, renders only on request and runs action chunks.

    :func:`cosmos_ray.sim.make.make` builds the one of a configuration.
    """

    config: SimConfig
    task: str
    instruction: str
    horizon: int  #: control steps before an episode times out
    cameras: tuple[str, ...]
    control_freq: int  #: control steps per second
    action_dim: int  #: numbers of an action d
    proprio_dim: int  #: numbers of proprioception p
    state_dim: int  #: numbers of a state S
    moving: tuple[int, ...]  #: places in an action that move a hand; empty where they are not known
    fingerprint: dict[str, str]  #: everything that a repeated episode depends on
    restorable: bool = True  #: whether :meth:`restore` and :meth:`render_state` work; else an episode can only begin again by its seed
    step_index: int
    success: bool
    done: bool

    @abstractmethod
    def reset(self, seed: int) -> None:
        """Start a new episode. The same seed gives a bit-identical initial state in every process."""

    @abstractmethod
    def proprio(self) -> np.ndarray:
        """Proprioception of the current state: (p,) float32."""

    @abstractmethod
    def render(self) -> np.ndarray:
        """Render the current state from every camera: (n_cam, H, W, 3) uint8, upright."""

    @abstractmethod
    def render_state(self, state: np.ndarray) -> np.ndarray:
        """Render a stored state (S,) as :meth:`render` would have rendered it live. The running episode does not change."""

    @abstractmethod
    def state(self) -> np.ndarray:
        """The state, (S,) float64: enough to continue this episode bit for bit where the environment is :attr:`restorable`."""

    @abstractmethod
    def restore(self, state: np.ndarray) -> None:
        """Continue from a saved state (S,) of an environment of the same configuration.

        Raises:
            SimulationError: the vector has another length, or the environment is not :attr:`restorable`.
        """

    @abstractmethod
    def step(self, action: np.ndarray) -> StepResult:
        """Run one control step with an action (d,), which is clipped to [-1, 1].

        Raises:
            SimulationError: the action is not finite or has another shape, the episode is over, or the simulation broke.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the simulator."""

    def _checked(self, action: np.ndarray) -> np.ndarray:
        """``action`` (d,) float32 for :meth:`step`, or the SimulationError that it describes."""
        if self.done:
            raise SimulationError(f"the episode of {self.task} is over after {self.step_index} steps; reset it")
        action = np.asarray(action, np.float32)
        if action.shape != (self.action_dim,):
            raise SimulationError(f"{self.task} takes actions of shape ({self.action_dim},), got {action.shape}")
        if not np.isfinite(action).all():
            raise SimulationError(f"action with a value that is not finite at step {self.step_index} of {self.task}")
        return action

    def execute(self, chunk: np.ndarray, trajectory: Trajectory, render_at: tuple[int, ...] | None = None,
                labels: np.ndarray | None = None) -> None:
        """Run an action chunk (K, d) and append its steps to ``trajectory``; ``labels`` (K, d) as in :meth:`advance`.

        Stops early when the episode succeeds, times out or breaks. Renders after the last executed step, and after the
        steps (1..K) of the chunk in ``render_at``. When the simulation breaks, the episode ends with ``trajectory.invalid``
        set, without the faulty step.
        """
        instants.passes("chunk")
        for offset, action in enumerate(np.asarray(chunk, np.float32), start=1):
            self.advance(action, trajectory, None if labels is None else labels[offset - 1])
            if trajectory.invalid:
                break
            if render_at is not None and offset in render_at:
                trajectory.frames[trajectory.length] = self.render()
            if self.done:
                break
        if trajectory.length not in trajectory.frames:
            trajectory.frames[trajectory.length] = self.render()

    def advance(self, action: np.ndarray, trajectory: Trajectory, label: np.ndarray | None = None) -> None:
        """Run one control step and append it to ``trajectory``, without rendering.

        ``label`` (d,) is the action that a policy should imitate, by default the executed action. When the simulation breaks,
        ``trajectory.invalid`` says why, and the faulty step is not appended.
        """
        try:
            result = self.step(action)
        except SimulationError as error:
            log.warning("episode of %s with seed %d ended as invalid: %s", self.task, trajectory.seed, error)
            trajectory.invalid = str(error)
            self.done = True
            return
        executed = np.clip(action, -1.0, 1.0).astype(np.float32)
        trajectory.actions.append(executed)
        trajectory.labels.append(executed.copy() if label is None else np.clip(label, -1.0, 1.0).astype(np.float32))
        trajectory.rewards.append(result.reward)
        trajectory.proprio.append(self.proprio())
        trajectory.states.append(self.state())
        trajectory.success = result.success
        trajectory.timed_out = result.done and not result.success


def start(env: Simulation, seed: int) -> Trajectory:
    """Reset ``env`` and begin the record of its episode: proprioception, state and frame of step 0."""
    env.reset(seed)
    trajectory = Trajectory(env.task, env.instruction, seed, env.cameras)
    trajectory.proprio.append(env.proprio())
    trajectory.states.append(env.state())
    trajectory.frames[0] = env.render()
    return trajectory
