"""Closed-loop moves of a simulated arm: what the scripted experts are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.transform import Rotation

if TYPE_CHECKING:
    from cosmos_ray.sim.environment import Environment

Actions = Iterator[np.ndarray]
Goal = np.ndarray | Callable[[], np.ndarray]
"""A fixed position or rotation, or one to be read anew at every step."""
OPEN, CLOSE = -1.0, 1.0
CLOSE_STEPS, OPEN_STEPS = 10, 9
"""The gripper command integrates by 0.2 per control step, so closing or opening fully takes this long."""

METRES, RADIANS = 0.05, 0.5
"""What an action of 1 asks for in one control step, from robosuite's OSC_POSE configuration."""
GAIN = 1.2


class Servo:
    """Proportional control of one arm's grip site in world coordinates, in the environment's own action space.

    Every move is a generator. It yields the action for the environment's *current* state, so it corrects for executed noise.
    The finger axis is the x column of the grip site; the approach direction is the z column.
    """

    def __init__(self, env: Environment):
        robot = env.sim_env.robots[0]
        self.env = env
        self.data = env.data
        self.site = robot.eef_site_id[robot.arms[0]]
        self.arm = robot.part_controllers[robot.arms[0]]
        self.gripper = OPEN

    @property
    def position(self) -> np.ndarray:
        """Grip site position in metres, (3,)."""
        return self.data.site_xpos[self.site].copy()

    @property
    def rotation(self) -> np.ndarray:
        """Grip site rotation, (3, 3)."""
        return self.data.site_xmat[self.site].reshape(3, 3).copy()

    @property
    def yaw(self) -> float:
        """Direction of the finger axis in the horizontal plane, in radians."""
        return float(np.arctan2(self.rotation[1, 0], self.rotation[0, 0]))

    def action(self, position: np.ndarray, rotation: np.ndarray | None = None, speed: float = 1.0) -> np.ndarray:
        """The action that moves towards a pose. A ``rotation`` of None keeps the present rotation; so does the position action space.

        ``speed`` bounds the translation, as a share of the largest action.
        """
        frame = self.arm.origin_ori.T
        move = np.clip(GAIN * frame @ (position - self.position) / METRES, -speed, speed)
        if self.env.actions == "position":
            return np.concatenate([move, [self.gripper]]).astype(np.float32)
        turn = np.zeros(3)
        if rotation is not None:
            turn = frame @ Rotation.from_matrix(rotation @ self.rotation.T).as_rotvec()
        return np.concatenate([move, np.clip(turn / RADIANS, -1, 1), [self.gripper]]).astype(np.float32)

    def move(
        self,
        target: Goal,
        rotation: Goal | None = None,
        tolerance: float = 0.01,
        angle: float = 0.1,
        speed: float = 1.0,
        limit: int = 80,
        until: Callable[[], bool] | None = None,
    ) -> Actions:
        """Move until within ``tolerance`` metres and ``angle`` radians, ``until`` holds, or ``limit`` steps have passed."""
        if self.env.actions == "position":
            rotation = None
        for _ in range(limit):
            position = target() if callable(target) else target
            goal = rotation() if callable(rotation) else rotation
            near = np.linalg.norm(position - self.position) < tolerance
            turned = goal is None or Rotation.from_matrix(goal @ self.rotation.T).magnitude() < angle
            if (near and turned) or (until is not None and until()):
                return
            yield self.action(position, goal, speed)

    def grip(self, command: float, rotation: np.ndarray | None = None) -> Actions:
        """Close or open the gripper fully while holding the pose."""
        self.gripper = command
        position = self.position
        for _ in range(CLOSE_STEPS if command == CLOSE else OPEN_STEPS):
            yield self.action(position, rotation)

    def rest(self) -> Actions:
        """Hold still forever."""
        position = self.position
        while True:
            yield self.action(position)


def downward(yaw: float) -> np.ndarray:
    """The rotation of a gripper that points straight down with its finger axis at ``yaw`` radians."""
    fingers = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    approach = np.array([0.0, 0.0, -1.0])
    return np.stack([fingers, np.cross(approach, fingers), approach], axis=1)


def nearest(angle: float, reference: float, period: float) -> float:
    """The angle nearest to ``reference`` among those equal to ``angle`` modulo ``period``; radians."""
    return angle + period * round((reference - angle) / period)


def up(height: float) -> np.ndarray:
    """A displacement of ``height`` metres upwards."""
    return np.array([0.0, 0.0, height])
