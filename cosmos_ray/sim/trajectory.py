"""The record of one episode, before any encoding."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Trajectory:
    """The record of one episode of T control steps. :meth:`Simulation.execute` appends to it.

    Step 0 is the state after the reset; step t is the state after t control steps. ``actions`` are the executed actions,
    clipped to [-1, 1]. ``labels`` are the actions that a policy should imitate: the clean expert action in a demonstration,
    else the executed action. ``invalid`` is empty, or says why the simulation broke; the faulty step is not recorded.
    """

    task: str
    instruction: str
    seed: int
    cameras: tuple[str, ...]
    actions: list[np.ndarray] = field(default_factory=list)
    """T x (d,) float32"""
    labels: list[np.ndarray] = field(default_factory=list)
    """T x (d,) float32"""
    rewards: list[float] = field(default_factory=list)
    """T, 1.0 on the step that completes the task, else 0.0"""
    proprio: list[np.ndarray] = field(default_factory=list)
    """T+1 x (p,) float32"""
    states: list[np.ndarray] = field(default_factory=list)
    """T+1 x (S,) float64, each enough to restore the simulator bit for bit"""
    frames: dict[int, np.ndarray] = field(default_factory=dict)
    """step index 0..T -> (n_cam, H, W, 3) uint8, only for the steps that were rendered"""
    success: bool = False
    timed_out: bool = False
    invalid: str = ""

    @property
    def length(self) -> int:
        """Number of executed control steps T."""
        return len(self.actions)

    @property
    def done(self) -> bool:
        """Whether the episode has ended, for any reason."""
        return self.success or self.timed_out or bool(self.invalid)

    def last(self) -> Trajectory:
        """A record that begins at this one's last step, which must have been rendered: the end of a chunk."""
        return Trajectory(self.task, self.instruction, self.seed, self.cameras, proprio=[self.proprio[-1]], states=[self.states[-1]],
                          frames={0: self.frames[self.length]})

    def extend(self, piece: Trajectory) -> None:
        """Append the steps of ``piece``, which begins at this record's last step."""
        before = self.length
        self.actions += piece.actions
        self.labels += piece.labels
        self.rewards += piece.rewards
        self.proprio += piece.proprio[1:]
        self.states += piece.states[1:]
        self.frames.update({before + step: frame for step, frame in piece.frames.items() if step})
        self.success, self.timed_out, self.invalid = piece.success, piece.timed_out, piece.invalid
