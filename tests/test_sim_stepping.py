"""The fused control step against robosuite's own."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.osc import arm_torques
from cosmos_ray.sim.stepping import StockStepper


@pytest.mark.parametrize("task", ["Lift", pytest.param("PickPlaceCan", marks=pytest.mark.slow)])
def test_fused_steps_agree_with_robosuite_to_rounding(task):
    """The reference runs robosuite's own ``step``. The measured deviation is below 1e-12; contacts amplify it slowly."""
    fused = Environment(SimConfig(task=task, actions="pose"))
    stock = Environment(SimConfig(task=task, actions="pose", fast_step=False))
    assert (fused.fingerprint["stepping"], stock.fingerprint["stepping"]) == ("fused", "stock")
    fused.reset(3)
    stock.reset(3)
    rng = np.random.default_rng(0)
    action = np.zeros(7, np.float32)
    for step in range(60):
        if step % 6 == 0:
            action = rng.uniform(-1, 1, 7).astype(np.float32)
        fused.step(action)
        stock.sim_env.step(action.astype(np.float64))
    np.testing.assert_allclose(fused.data.qpos, stock.data.qpos, atol=1e-9)
    np.testing.assert_allclose(fused.data.qvel, stock.data.qvel, atol=1e-7)
    fused.close()
    stock.close()


@pytest.mark.parametrize("controller", ["OSC_POSITION", pytest.param("JOINT_POSITION", marks=pytest.mark.slow)])
def test_other_controllers_fall_back_to_robosuite(controller):
    env = Environment(SimConfig(controller=controller))
    assert env.fingerprint["stepping"] == "stock"
    env.close()


def test_stock_stepper_is_bit_identical_to_robosuite():
    """The stock way leaves out only observations, which do not feed back into the physics."""
    ours = Environment(SimConfig(actions="pose", fast_step=False))
    reference = Environment(SimConfig(actions="pose", fast_step=False))
    ours.reset(1)
    reference.reset(1)
    for action in np.random.default_rng(0).uniform(-1, 1, (15, 7)).astype(np.float32):
        ours.step(action)
        reference.sim_env.step(action.astype(np.float64))
    assert np.array_equal(ours.data.qpos, reference.data.qpos)
    assert np.array_equal(ours.data.qvel, reference.data.qvel)
    ours.close()
    reference.close()


@pytest.mark.parametrize("task", ["Lift", "Wipe", "libero_goal/7"])
def test_compiled_substeps_are_bit_identical_to_mujoco_called_from_python(task):
    """``Wipe`` has no gripper, LIBERO's gripper gets a command in each substep."""
    compiled, plain = (Environment(SimConfig(task=task, actions="pose")) for _ in range(2))
    plain._stepper.run_substeps = partial(substeps_from_python, plain)
    for env in (compiled, plain):
        env.reset(3)
    for action in np.random.default_rng(0).uniform(-1, 1, (12, compiled.action_dim)).astype(np.float32):
        compiled.step(action)
        plain.step(action)
    assert np.array_equal(compiled.state(), plain.state())
    compiled.close()
    plain.close()


def substeps_from_python(env, count, model, data, inertia, mass, jac_position, jac_rotation, site, rows, places, velocities, positions,
                         biases, position, rotation, goal_position, goal_rotation, kp, kd, rest_angles, limits, controls, actuators,
                         fingers, ramp):
    """:func:`cosmos_ray.sim.osc.run_substeps` by MuJoCo's Python package."""
    mujoco, model, data = env.mujoco, env.sim_env.sim.model._model, env.data
    for substep in range(count):
        mujoco.mj_step1(model, data)
        controls[fingers] = ramp[substep]
        mujoco.mj_fullM(model, mass, data.qM)
        mujoco.mj_jacSite(model, data, jac_position, jac_rotation, site)
        controls[actuators] = arm_torques(mass, jac_position, jac_rotation, rows, velocities, positions[places], biases, position, rotation,
                                          goal_position, goal_rotation, kp, kd, rest_angles, limits)
        mujoco.mj_step2(model, data)


def test_first_substep_is_bit_identical_to_robosuite():
    """The fused way leaves out robosuite's records of poses and forces, which do not feed back."""
    ours, reference = (Environment(SimConfig(actions="pose")) for _ in range(2))
    for env in (ours, reference):
        env.reset(1)
    reference._stepper.first_substep = partial(StockStepper.first_substep, reference._stepper)
    for action in np.random.default_rng(0).uniform(-1, 1, (15, 7)).astype(np.float32):
        ours.step(action)
        reference.step(action)
    assert np.array_equal(ours.state(), reference.state())
    ours.close()
    reference.close()
