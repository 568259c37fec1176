"""Runs one control step of a robosuite environment: robosuite's own way, or a fused way that is about three times as fast.

A control step is 25 physics substeps of 2 ms at 20 Hz. robosuite runs its whole Python controller stack in every substep,
but only the arm torques change between two policy steps. :class:`FusedStepper` has robosuite's controllers run the first
substep, which sets the goal and the gripper command. The other substeps are one compiled function with the same formulas
(:mod:`cosmos_ray.sim.osc`). The result agrees with robosuite to rounding, not bit for bit, so use one way for a whole data set.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class StockStepper:
    """Advances the environment through robosuite's own controller stack. Works for every robot and controller."""

    name = "stock"

    def __init__(self, env: Any):
        self.env = env
        self.substeps = int(env.control_timestep / env.model_timestep)

    def advance(self, action: np.ndarray) -> None:
        """Run one control step with the full robosuite action (float64), without task bookkeeping."""
        self.first_substep(action)
        for _ in range(self.substeps - 1):
            self.env.sim.step1()
            self.env._pre_action(action, False)
            self.env.sim.step2()

    def first_substep(self, action: np.ndarray) -> None:
        """The substep in which the controllers take their goal from the action."""
        self.env.sim.step1()
        self.env._pre_action(action, True)
        self.env.sim.step2()


class FusedStepper(StockStepper):
    """The fast way, for one fixed-base arm under OSC_POSE with robosuite's default options (see :func:`fused_valid`)."""

    name = "fused"

    def __init__(self, env: Any):
        from cosmos_ray.sim.osc import run_substeps  # compiled for the MuJoCo that `gl` has loaded

        super().__init__(env)
        self.run_substeps = run_substeps
        self.model, self.data = env.sim.model._model, env.sim.data._data
        velocities = self.model.nv
        self.mass = np.zeros((velocities, velocities))
        self.jacobian_position = np.zeros((3, velocities))
        self.jacobian_rotation = np.zeros((3, velocities))
        self.robot = robot = env.robots[0]
        self.site = int(robot.eef_site_id[robot.arms[0]])
        self.ranges = {part: (np.array(indices, np.int64), *self.model.actuator_ctrlrange[indices].T)
                       for part, indices in robot._ref_actuators_indexes_dict.items()}
        self.actuators = self.ranges[robot.arms[0]][0]
        self.limits = self.model.actuator_ctrlrange[self.actuators].copy()
        self.ramps = getattr(robot, "gripper_each_substep", False)

    def advance(self, action: np.ndarray) -> None:
        """Run one control step with the full robosuite action (float64), without task bookkeeping."""
        self.first_substep(action)
        arm, data = self.robot.part_controllers[self.robot.arms[0]], self.data
        goal_position = arm.origin_pos + arm.origin_ori @ arm.goal_pos
        goal_rotation = np.ascontiguousarray(arm.origin_ori @ arm.goal_ori)
        fingers, ramp = self._ramp(action)
        self.run_substeps(
            self.substeps - 1, self.model._address, data._address, data.qM.ctypes.data, self.mass, self.jacobian_position,
            self.jacobian_rotation, self.site, np.array(arm.qvel_index), np.array(arm.qpos_index), data.qvel, data.qpos, data.qfrc_bias,
            data.site_xpos[self.site], data.site_xmat[self.site], goal_position, goal_rotation, arm.kp, arm.kd, arm.initial_joint,
            self.limits, data.ctrl, self.actuators, fingers, ramp,
        )  # fmt: skip
        # robosuite caches kinematics per substep; the next control step must not reuse those of the first substep.
        for controller in self.robot.part_controllers.values():
            controller.new_update = True

    def first_substep(self, action: np.ndarray) -> None:
        """As robosuite does, without its records of recent poses and forces, which nothing reads here."""
        self.env.sim.step1()
        controllers = self.robot.composite_controller
        controllers.update_state()
        controllers.set_goal(action)
        for part, controller in controllers.part_controllers.items():
            if self.robot._enabled_parts.get(part, False):
                indices, low, high = self.ranges[part]
                self.data.ctrl[indices] = np.clip(controller.run_controller(), low, high)
        self.env.sim.step2()

    def _ramp(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gripper's actuators (m,), and what they are told in each substep but the first, (substeps - 1, m); m = 0 where what the
        first substep told them stays."""
        if not self.ramps:
            return np.zeros(0, np.int64), np.zeros((self.substeps - 1, 0))
        robot, arm = self.robot, self.robot.arms[0]
        part, gripper = robot.get_gripper_name(arm), robot.gripper[arm]
        first, last = robot._action_split_indexes[part]
        fingers, low, high = self.ranges[part]
        goals = np.array([robot.part_controllers[part].scale_action(gripper.format_action(action[first:last]))
                          for _ in range(self.substeps - 1)])
        return fingers, np.clip((high + low) / 2 + (high - low) / 2 * goals, low, high)


def stepper(env: Any, fast: bool) -> StockStepper:
    """The stepper for ``env``: the fused one if ``fast`` and valid for ``env``, else robosuite's own."""
    return FusedStepper(env) if fast and fused_valid(env) else StockStepper(env)


def fused_valid(env: Any) -> bool:
    """Whether the fused formulas hold for ``env``.

    They need one fixed-base arm under OSC_POSE: deltas in the base frame, fixed impedance, decoupled position and rotation,
    goals relative to the achieved pose, no interpolation.
    """
    from robosuite.controllers.parts.arm.osc import OperationalSpaceController
    from robosuite.robots.fixed_base_robot import FixedBaseRobot

    robot = env.robots[0]
    known = type(robot) is FixedBaseRobot or getattr(robot, "gripper_each_substep", False)
    if len(env.robots) != 1 or not known or len(robot.arms) != 1:
        return False
    arm = robot.part_controllers[robot.arms[0]]
    return (
        isinstance(arm, OperationalSpaceController)
        and type(arm).run_controller is OperationalSpaceController.run_controller
        and robot.composite_controller.name == "BASIC"
        and env.lite_physics
        and arm.use_ori
        and arm.uncoupling
        and arm.impedance_mode == "fixed"
        and arm.input_type == "delta"
        and arm.input_ref_frame == "base"
        and arm._goal_update_mode == "achieved"
        and arm.interpolator_pos is None
        and arm.interpolator_ori is None
    )
