"""LIBERO's robot as robosuite 1.4 drives it, which LIBERO's data and published results were made with.

robosuite 1.5 changed three things, and these classes undo each. Only LIBERO's own robot names lead here, so the robosuite tasks are as
they were. Import after :func:`cosmos_ray.sim.gl.load`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from robosuite.controllers.parts.arm.osc import OperationalSpaceController
from robosuite.models.grippers import GRIPPER_MAPPING
from robosuite.models.grippers.panda_gripper import PandaGripper
from robosuite.robots import ROBOT_CLASS_MAPPING
from robosuite.robots.fixed_base_robot import FixedBaseRobot

GRIPPER = "LiberoPandaGripper"


class LiberoPandaGripper(PandaGripper):
    """A gripper that closes by 0.01 of its range in each substep; robosuite 1.5's jumps by 0.2 in each control step."""

    @property
    def speed(self) -> float:
        return 0.01


class LiberoController(OperationalSpaceController):
    """Operational space control that keeps its goal of orientation when the command has no rotation; robosuite 1.5's takes the present
    orientation as the new goal, and the hand turns slowly by itself."""

    goal_ori: Any

    def set_goal(self, action: np.ndarray) -> None:
        kept = self.goal_ori
        super().set_goal(action)
        if kept is not None and not np.any(np.asarray(action)[3:6]):
            self.goal_ori = kept


class LiberoRobot(FixedBaseRobot):
    """One arm of LIBERO."""

    gripper_each_substep = True
    """The gripper's command changes within a control step: the fused stepping reads this."""

    def _load_controller(self) -> None:
        super()._load_controller()
        for arm in self.arms:
            self.part_controllers[arm].__class__ = LiberoController

    def reset(self, deterministic: bool = False, rng: Any = None) -> None:
        np.random.randn(len(self.init_qpos))  # robosuite 1.4 drew the noise of the pose here; LIBERO's placements come from what follows
        super().reset(deterministic, rng=rng)

    def control(self, action: np.ndarray, policy_step: bool = False) -> None:
        if not policy_step:
            for arm in self.arms:
                part = self.get_gripper_name(arm)
                first, last = self._action_split_indexes[part]
                self.part_controllers[part].set_goal(self.gripper[arm].format_action(action[first:last]))
        super().control(action, policy_step)


def register(envs: ModuleType) -> None:
    """Have robosuite build these classes for LIBERO's two robot models, and mount the one on the floor on nothing."""
    GRIPPER_MAPPING[GRIPPER] = LiberoPandaGripper
    for model in (envs.MountedPanda, envs.OnTheGroundPanda):
        ROBOT_CLASS_MAPPING[model.__name__] = LiberoRobot
    envs.OnTheGroundPanda.default_base = property(lambda model: "NullMount")
