"""Every robot, task and controller that the simulation offers: true sizes, restoring, rendering. Each appears once, not all combinations.

The rows with ``quick`` run always; the others are slow only because each compiles the full meshes of another robot.
"""

from __future__ import annotations

import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.sim import tasks
from cosmos_ray.sim.embodiment import simulated
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.simulation import start

ONE, TWO = ("Panda",), ("Panda", "Panda")
HAND, ARM = (0, 1, 2), tuple(range(7))

# robots, task, controller, action space -> numbers per action, of proprioception, and those of an action that move a hand.
# The numbers of a two-armed robot are both arms', then both grippers'; those of two robots are each arm's with its gripper's.
TABLE = [
    (("UR5e",), "Lift", "OSC_POSE", "pose", 7, 13, HAND, "quick"),
    (("IIWA",), "Lift", "OSC_POSE", "position", 4, 13, HAND, ""),
    (("Kinova3",), "Lift", "OSC_POSE", "pose", 7, 13, HAND, ""),
    (("Jaco",), "Lift", "OSC_POSE", "pose", 7, 13, HAND, ""),
    (("XArm7",), "Lift", "OSC_POSITION", "position", 4, 13, HAND, ""),
    (("Sawyer",), "NutAssemblyRound", "OSC_POSE", "pose", 7, 9, HAND, ""),
    (("PandaDexRH",), "Lift", "OSC_POSE", "pose", 12, 19, HAND, "quick"),
    (("PandaDexLH",), "Lift", "OSC_POSE", "position", 9, 19, HAND, ""),
    (("Baxter",), "TwoArmLift", "OSC_POSE", "pose", 14, 18, (0, 1, 2, 6, 7, 8), ""),
    (("Baxter",), "TwoArmLift", "JOINT_POSITION", "pose", 16, 18, tuple(range(14)), "quick"),
    (("Baxter",), "TwoArmLift", "IK_POSE", "position", 8, 18, tuple(range(6)), ""),
    (TWO, "TwoArmLift", "OSC_POSE", "pose", 14, 18, (0, 1, 2, 7, 8, 9), ""),
    (("UR5e", "Panda"), "TwoArmPegInHole", "OSC_POSE", "pose", 12, 14, (0, 1, 2, 6, 7, 8), "quick"),
    (("Panda", "UR5e"), "TwoArmHandover", "OSC_POSE", "pose", 14, 22, (0, 1, 2, 7, 8, 9), ""),
    (TWO, "TwoArmTransport", "OSC_POSITION", "pose", 8, 18, (0, 1, 2, 4, 5, 6), ""),
    (ONE, "Wipe", "OSC_POSE", "pose", 6, 7, HAND, "quick"),
    (ONE, "Wipe", "OSC_POSE", "position", 3, 7, HAND, ""),
    (ONE, "Lift", "JOINT_POSITION", "pose", 8, 9, ARM, "quick"),
    (("UR5e",), "Lift", "JOINT_POSITION", "pose", 7, 13, ARM[:6], ""),
    (ONE, "Lift", "JOINT_TORQUE", "pose", 8, 9, ARM, "quick"),
    (ONE, "Door", "IK_POSE", "pose", 7, 9, HAND, "quick"),
    (("Sawyer",), "Lift", "IK_POSE", "pose", 7, 9, HAND, ""),
    *((ONE, task, "OSC_POSE", "pose", 7, 9, HAND, "")
      for task in ("Stack", "NutAssembly", "NutAssemblySingle", "NutAssemblySquare", "PickPlace", "PickPlaceSingle", "PickPlaceMilk",
                   "PickPlaceBread", "PickPlaceCereal", "PickPlaceCan", "ToolHang")),
]  # fmt: skip


def of(robots: tuple[str, ...], task: str, controller: str = "OSC_POSE", actions: str = "pose") -> SimConfig:
    wrist = "robot0_right_eye_in_hand" if robots == ("Baxter",) else "robot0_eye_in_hand"
    return SimConfig(task=task, robots=robots, controller=controller, actions=actions, wrist_cameras=(wrist,), horizon=50)


@pytest.mark.parametrize("robots, task, controller, actions, numbers, proprio, moving", [
    pytest.param(*row, marks=() if quick else pytest.mark.slow, id="-".join((*row[0], *row[1:4]))) for *row, quick in TABLE
])  # fmt: skip
def test_sizes_are_the_simulators_and_an_episode_restores_and_renders(robots, task, controller, actions, numbers, proprio, moving):
    config = of(robots, task, controller, actions)
    body = simulated(config)
    assert (body.action_dim, body.proprio_dim, body.moving) == (numbers, proprio, moving)
    assert (body.cameras, body.control_freq) == (config.cameras, 20)
    env = Environment(config)
    try:
        assert (env.action_dim, len(env.proprio()), env.moving) == (numbers, proprio, moving)
        drawn = np.random.default_rng(0).uniform(-1, 1, (12, numbers)).astype(np.float32)
        trajectory = start(env, 1)
        env.execute(drawn, trajectory)
        assert trajectory.length == 12 and not trajectory.invalid
        for begin in (0, 5):
            env.reset(9)
            env.restore(trajectory.states[begin])
            for step in range(begin, 12):
                env.step(drawn[step])
                assert np.array_equal(env.state(), trajectory.states[step + 1]), f"differs at step {step + 1}, restored at {begin}"
        assert trajectory.frames[12].shape == (2, 64, 64, 3) and trajectory.frames[12].std() > 10
        assert np.array_equal(env.render(), trajectory.frames[12])
    finally:
        env.close()


def test_the_table_has_every_robot_task_and_controller():
    assert {robot for row in TABLE for robot in row[0]} == set(tasks.robot_names())
    assert {row[1] for row in TABLE} == set(tasks.task_names())
    assert {row[2] for row in TABLE} == set(tasks.CONTROLLERS)


def test_the_numbers_in_moving_push_the_hands_of_a_two_armed_robot_along_their_axes():
    env = Environment(of(("Baxter",), "TwoArmLift"))
    for place, number in enumerate(env.moving):
        arm, axis = divmod(place, 3)
        env.reset(0)
        before = env.proprio().reshape(2, 9)[:, 2:5]
        for _ in range(6):
            env.step(np.eye(env.action_dim, dtype=np.float32)[number])
        along = (env.proprio().reshape(2, 9)[:, 2:5] - before)[:, axis]
        assert along[arm] > 0.02 and abs(along[1 - arm]) < along[arm] / 2, (number, along)
    env.close()


@pytest.mark.parametrize("settings, said", [
    ({"controller": "JOINT_VELOCITY"}, "JOINT_VELOCITY does not work in robosuite 1.5.2"),
    ({"controller": "IK_POSE", "robots": ("UR5e",)}, "IK_POSE drives Panda, Sawyer, Baxter only, not UR5e"),
    ({"controller": "JOINT_TORQUE", "actions": "position"}, "needs a controller of the hand"),
])  # fmt: skip
def test_a_controller_that_cannot_work_is_refused_in_one_line(settings, said):
    with pytest.raises(ConfigError) as caught:
        simulated(SimConfig(**settings))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_are_read_once_and_cameras_and_rate_are_the_configs(monkeypatch):
    simulated(SimConfig())
    monkeypatch.setattr("cosmos_ray.sim.embodiment.make", None)  # may not be built again
    body = simulated(SimConfig(horizon=3, image_size=128, placement=0.1, control_freq=10, instruction="lift"))
    assert (body.action_dim, body.proprio_dim, body.control_freq) == (4, 9, 10)
