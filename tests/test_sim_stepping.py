"""The fused control step against robosuite's own."""

from __future__ import annotations

import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.sim.environment import Environment


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
