"""Runs one control step of a robosuite environment: robosuite's own way, or a fused way that is about three times as fast.

A control step is 25 physics substeps of 2 ms at 20 Hz. robosuite runs its whole Python controller stack in every substep,
but only the arm torques change between two policy steps. :class:`FusedStepper` runs the first substep through robosuite,
which sets the goal and the gripper command. The other substeps are MuJoCo calls and one compiled function with the same
formulas (operational space control, Khatib 1987, as in ``robosuite/controllers/parts/arm/osc.py``). The result agrees with
robosuite to rounding, not bit for bit, so use one way for a whole data set.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from cosmos_ray.sim import gl


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
        super().__init__(env)
        self.mujoco, _ = gl.load()
        self.model, self.data = env.sim.model._model, env.sim.data._data
        velocities = self.model.nv
        self.mass = np.zeros((velocities, velocities))
        self.jacobian_position = np.zeros((3, velocities))
        self.jacobian_rotation = np.zeros((3, velocities))
        robot = env.robots[0]
        self.site = robot.eef_site_id[robot.arms[0]]
        self.actuators = np.array(robot._ref_actuators_indexes_dict[robot.arms[0]])
        self.limits = self.model.actuator_ctrlrange[self.actuators].copy()
        self.ramps = getattr(robot, "gripper_each_substep", False)

    def advance(self, action: np.ndarray) -> None:
        """Run one control step with the full robosuite action (float64), without task bookkeeping."""
        self.first_substep(action)
        robot = self.env.robots[0]
        arm = robot.part_controllers[robot.arms[0]]
        goal_position = arm.origin_pos + arm.origin_ori @ arm.goal_pos
        goal_rotation = arm.origin_ori @ arm.goal_ori
        rows, angles = np.array(arm.qvel_index), np.array(arm.qpos_index)
        mujoco, model, data = self.mujoco, self.model, self.data
        position, rotation = data.site_xpos[self.site], data.site_xmat[self.site]
        fingers, ramp = self._ramp(action) if self.ramps else (None, None)
        for substep in range(self.substeps - 1):
            mujoco.mj_step1(model, data)
            if ramp is not None:
                data.ctrl[fingers] = ramp[substep]
            mujoco.mj_fullM(model, self.mass, data.qM)
            mujoco.mj_jacSite(model, data, self.jacobian_position, self.jacobian_rotation, self.site)
            data.ctrl[self.actuators] = arm_torques(
                self.mass, self.jacobian_position, self.jacobian_rotation, rows, data.qvel, data.qpos[angles],
                data.qfrc_bias, position, rotation, goal_position, goal_rotation, arm.kp, arm.kd, arm.initial_joint,
                self.limits,
            )  # fmt: skip
            mujoco.mj_step2(model, data)
        # robosuite caches kinematics per substep; the next control step must not reuse those of the first substep.
        for controller in robot.part_controllers.values():
            controller.new_update = True

    def _ramp(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gripper's actuators (m,), and what they are told in each substep but the first, (substeps - 1, m)."""
        robot = self.env.robots[0]
        arm = robot.arms[0]
        part, gripper = robot.get_gripper_name(arm), robot.gripper[arm]
        first, last = robot._action_split_indexes[part]
        fingers = np.array(robot._ref_actuators_indexes_dict[part])
        goals = np.array([robot.part_controllers[part].scale_action(gripper.format_action(action[first:last]))
                          for _ in range(self.substeps - 1)])
        low, high = self.model.actuator_ctrlrange[fingers].T
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


@numba.njit(cache=True)
def multiply(matrix, vector):
    """Matrix (n, m) times vector (m,). At these sizes a plain loop is faster than BLAS, and it compiles sooner."""
    product = np.zeros(matrix.shape[0])
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            product[i] += matrix[i, j] * vector[j]
    return product


@numba.njit(cache=True)
def inverse(matrix):
    """Inverse of a symmetric positive definite matrix (n, n), by Gauss-Jordan elimination.

    Raises:
        ZeroDivisionError: the matrix is singular.
    """
    n = matrix.shape[0]
    left = matrix.copy()
    right = np.eye(n)
    for i in range(n):
        pivot = left[i, i]
        if not pivot > 1e-14:
            raise ZeroDivisionError("singular matrix")
        for j in range(n):
            left[i, j] /= pivot
            right[i, j] /= pivot
        for k in range(n):
            if k != i:
                factor = left[k, i]
                for j in range(n):
                    left[k, j] -= factor * left[i, j]
                    right[k, j] -= factor * right[i, j]
    return right


@numba.njit(cache=True)
def arm_torques(mass, jac_position, jac_rotation, rows, velocity, angles, bias, position, rotation, goal_position,
                goal_rotation, kp, kd, rest_angles, limits):  # fmt: skip
    """Arm torques of decoupled operational space control for a base at rest, clipped to ``limits``.

    Args:
        mass: (nv, nv) joint-space inertia; ``rows`` (n,) picks the arm's n joints from it and from the velocities.
        jac_position, jac_rotation: (3, nv) Jacobians of the grip site in the world frame.
        velocity, bias: (nv,) joint velocities, and Coriolis plus gravity torques.
        angles, rest_angles: (n,) joint angles, and the joint angles that the null space pulls towards.
        position, rotation: (3,) and row-major (9,) pose of the grip site; goal_position (3,), goal_rotation (3, 3).
        kp, kd: (6,) stiffness and damping. limits: (n, 2) torque range.

    Returns:
        (n,) float64 torques in N m.

    Raises:
        ZeroDivisionError: the arm is in a singular configuration.
    """
    n = rows.shape[0]
    arm_mass = np.empty((n, n))
    jacobian = np.empty((6, n))
    arm_velocity = np.empty(n)
    arm_bias = np.empty(n)
    for i in range(n):
        arm_velocity[i] = velocity[rows[i]]
        arm_bias[i] = bias[rows[i]]
        for j in range(n):
            arm_mass[i, j] = mass[rows[i], rows[j]]
        for k in range(3):
            jacobian[k, i] = jac_position[k, rows[i]]
            jacobian[3 + k, i] = jac_rotation[k, rows[i]]

    # Half the sum of cross products of the current and desired axes: the small-angle rotation error.
    error = np.zeros(6)
    for k in range(3):
        error[k] = goal_position[k] - position[k]
    for axis in range(3):
        c0, c1, c2 = rotation[axis], rotation[3 + axis], rotation[6 + axis]
        d0, d1, d2 = goal_rotation[0, axis], goal_rotation[1, axis], goal_rotation[2, axis]
        error[3] += 0.5 * (c1 * d2 - c2 * d1)
        error[4] += 0.5 * (c2 * d0 - c0 * d2)
        error[5] += 0.5 * (c0 * d1 - c1 * d0)
    wrench = kp * error - kd * multiply(jacobian, arm_velocity)

    mass_inverse = inverse(arm_mass)
    mobility = np.empty((6, 6))
    for k in range(6):
        mobility[k] = multiply(jacobian, multiply(mass_inverse, jacobian[k]))
    force = np.empty(6)
    force[:3] = multiply(inverse(mobility[:3, :3]), wrench[:3])
    force[3:] = multiply(inverse(mobility[3:, 3:]), wrench[3:])

    # Null-space posture control with robosuite's gains: stiffness 10, critically damped.
    posture = multiply(arm_mass, 10.0 * (rest_angles - angles) - 2.0 * np.sqrt(10.0) * arm_velocity)
    felt = multiply(inverse(mobility), multiply(jacobian, multiply(mass_inverse, posture)))
    torques = multiply(jacobian.T, force - felt) + posture + arm_bias
    for i in range(n):
        torques[i] = min(max(torques[i], limits[i, 0]), limits[i, 1])
    return torques
