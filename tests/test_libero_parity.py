"""LIBERO's tasks move as where LIBERO's published results were made: robosuite 1.4.0 with MuJoCo 3.3.2.

``tests/data/libero/parity.npz`` was recorded there: published state 0, ten steps that do nothing, then random actions. The pictures
beside it are of the state before these steps: the wrist camera on the left, agentview on the right, turned upright.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.seeds import state_seed
from cosmos_ray.sim.environment import Environment

DATA = Path(__file__).parent / "data" / "libero"
#: Where a contact makes two versions of MuJoCo differ, the control step before; None where they agree to the end.
TASKS = {"libero_spatial/0": None, "libero_object/0": None, "libero_goal/3": None, "libero_10/0": None, "libero_10/4": None,
         "libero_10/9": 60, "libero_object/3": None}
SLOW = ("libero_10/0", "libero_10/4", "libero_object/3")


@pytest.mark.parametrize("task", [pytest.param(task, marks=pytest.mark.slow) if task in SLOW else task for task in TASKS])
def test_positions_are_those_of_the_reference(task):
    with np.load(DATA / "parity.npz") as recorded:
        actions, expected = recorded[f"{task}/actions"][10:], recorded[f"{task}/qpos"][10:]
    picture = DATA / f"{task.replace('/', '_')}.png"
    env = Environment(SimConfig(task=task))
    try:
        if picture.exists():
            env._task.reset(state_seed("eval", 7, 0))
            difference = np.abs(np.hstack(list(env.render())).astype(int) - cv2.imread(str(picture))[..., ::-1])
            assert difference.mean() < 0.01
        env.reset(state_seed("eval", 7, 0))
        found = [env.data.qpos.copy()]
        for action in actions[: TASKS[task]]:
            env.step(action)
            found.append(env.data.qpos.copy())
    finally:
        env.close()
    assert env._stepper.name == "fused"
    np.testing.assert_allclose([q[:9] for q in found], [q[:9] for q in expected[: len(found)]], rtol=0, atol=1e-6)  # arm and fingers
    np.testing.assert_allclose(found, expected[: len(found)], rtol=0, atol=1e-5)  # objects too, which lie in contact
