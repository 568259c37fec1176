"""Compiled physics substeps of one arm under operational space control (Khatib 1987), as robosuite 1.5 computes it.

Follows ``robosuite/controllers/parts/arm/osc.py``. The loop calls MuJoCo's own C functions, the very ones that its Python package calls:
between two substeps nothing returns to Python. An error inside MuJoCo therefore ends the process, as it ends a C program.
"""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path

import numba
import numpy as np
from numba import types


def _library() -> str:
    """The file of MuJoCo's C library, which its Python package has loaded or will load."""
    found = find_spec("mujoco")
    assert found is not None and found.origin is not None
    return str(next(path for path in sorted(Path(found.origin).parent.glob("*mujoco*.*")) if path.suffix not in (".py", ".txt")))


ctypes.CDLL(_library(), ctypes.RTLD_GLOBAL)  # so that compiled code finds its functions by name
_ADDRESS = types.intp
_step1 = types.ExternalFunction("mj_step1", types.void(_ADDRESS, _ADDRESS))
_step2 = types.ExternalFunction("mj_step2", types.void(_ADDRESS, _ADDRESS))
_full_inertia = types.ExternalFunction("mj_fullM", types.void(_ADDRESS, _ADDRESS, _ADDRESS))
_site_jacobian = types.ExternalFunction("mj_jacSite", types.void(_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, types.int32))


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


@numba.njit(cache=True)
def run_substeps(count, model, data, packed_inertia, mass, jac_position, jac_rotation, site, rows, places, velocities, positions, biases,
                 position, rotation, goal_position, goal_rotation, kp, kd, rest_angles, limits, controls, actuators, fingers,
                 ramp):  # fmt: skip
    """Run ``count`` physics substeps towards one goal.

    Args:
        model, data, packed_inertia: addresses of MuJoCo's structures, and of ``data.qM``.
        mass (nv, nv), jac_position (3, nv), jac_rotation (3, nv): room for what each substep computes.
        site: number of the grip site; position (3,) and rotation (9,) are MuJoCo's own arrays of its pose.
        rows, places: (n,) the arm's joints in ``velocities`` (nv,) and in ``positions`` (nq,), which with ``biases`` (nv,) and
            ``controls`` (nu,) are MuJoCo's own arrays.
        actuators: (n,) of the arm. fingers (m,): actuators of a gripper that in each substep is told a row of ``ramp`` (count, m).

    Further arguments and errors as for :func:`arm_torques`.
    """
    for substep in range(count):
        _step1(model, data)
        for i in range(fingers.shape[0]):
            controls[fingers[i]] = ramp[substep, i]
        _full_inertia(model, mass.ctypes.data, packed_inertia)
        _site_jacobian(model, data, jac_position.ctypes.data, jac_rotation.ctypes.data, site)
        torques = arm_torques(mass, jac_position, jac_rotation, rows, velocities, positions[places], biases, position, rotation,
                              goal_position, goal_rotation, kp, kd, rest_angles, limits)
        for i in range(actuators.shape[0]):
            controls[actuators[i]] = torques[i]
        _step2(model, data)
