"""Scripted experts and the disturbed demonstrations made from them."""

from __future__ import annotations

import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.config.tasks import SPECS, NoiseMix
from cosmos_ray.errors import ConfigError
from cosmos_ray.sim.demonstration import CLEAN, demonstrate
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.experts import ARMS, EXPERTS, check_expert, expert


@pytest.fixture(scope="module")
def lift():
    env = Environment(SimConfig())
    yield env
    env.close()


@pytest.mark.parametrize("task", [t if t in ("Lift", "Stack") else pytest.param(t, marks=pytest.mark.slow) for t in SPECS])
def test_clean_expert_succeeds(task):
    env = Environment(SimConfig(task=task))
    for seed in (1000, 1001):
        trajectory = demonstrate(env, seed, CLEAN, render_every=0)
        assert trajectory.success, f"{task}, seed {seed}: not solved within {trajectory.length} steps"
        rest = longest_rest(trajectory)
        assert rest < 15, f"{task}, seed {seed}: the hand rests for {rest} steps, as if it waited for what the arm does not reach"
        assert trajectory.rewards[-1] == 1.0
        assert sorted(trajectory.frames) == [0, trajectory.length]
        assert np.array_equal(trajectory.actions, trajectory.labels)
    env.close()


def longest_rest(trajectory) -> int:
    """Most control steps in a row in which the hand moves by less than 2 mm."""
    moved = np.linalg.norm(np.diff(np.array(trajectory.proprio)[:, 2:5], axis=0), axis=1) > 0.002
    return int(np.diff(np.flatnonzero(np.concatenate([[True], moved, [True]]))).max()) - 1


@pytest.mark.slow
@pytest.mark.parametrize("task", SPECS)
def test_disturbed_expert_mostly_succeeds(task):
    env = Environment(SimConfig(task=task))
    successes = sum(demonstrate(env, seed, render_every=0).success for seed in range(20))
    assert successes >= 14
    env.close()


@pytest.mark.parametrize("task, space, robot", [
    pytest.param(task, space, robot, marks=() if (task, space, robot) == ("Lift", "position", "UR5e") else pytest.mark.slow)
    for task, spaces in ARMS.items() for space, robots in spaces.items() for robot in robots if robot != "Panda"
])  # fmt: skip
def test_the_expert_drives_every_arm_that_it_claims(task, space, robot):
    """docs/running.md has the counts of 20 episodes."""
    config = SimConfig(task=task, robots=(robot,), actions=space)
    check_expert(config)
    env = Environment(config)
    assert all(demonstrate(env, seed, CLEAN, render_every=0).success for seed in (0, 1))
    assert sum(demonstrate(env, seed, render_every=0).success for seed in range(8)) >= 4
    env.close()


def test_lift_expert_also_turns_the_hand_in_the_pose_action_space():
    env = Environment(SimConfig(actions="pose", placement=0.1))
    trajectory = demonstrate(env, 1000, CLEAN, render_every=0)
    assert trajectory.success
    assert np.abs(np.array(trajectory.actions)[:, 5]).max() > 0.1
    env.close()


def test_demonstration_is_a_function_of_the_seed(lift):
    first = demonstrate(lift, 4, render_every=0)
    other = demonstrate(lift, 5, render_every=0)
    again = demonstrate(lift, 4, render_every=0)
    assert np.array_equal(first.actions, again.actions) and np.array_equal(first.states, again.states)
    assert not np.array_equal(first.actions[0], other.actions[0])


def test_label_is_the_clean_action_in_the_disturbed_state(lift):
    """What a policy imitates must be the expert's own answer to the state that the noise led to."""
    noisy = demonstrate(lift, 6, NoiseMix(level=0.3, scale=(1, 1)), render_every=0)
    executed, labels = np.array(noisy.actions), np.array(noisy.labels)
    assert np.abs(executed - labels)[:, :3].mean() > 0.05
    assert np.array_equal(executed[:, 3], labels[:, 3])
    policy = expert(lift)
    lift.reset(6)
    for action, label in zip(executed, labels, strict=True):
        assert np.array_equal(next(policy), label)
        lift.step(action)


def test_share_of_kicked_episodes(lift):
    kicked = NoiseMix(level=0.0, kick_share=1.0)
    trajectory = demonstrate(lift, 0, kicked, render_every=0)
    pushed = np.flatnonzero(np.abs(np.array(trajectory.actions) - trajectory.labels).max(axis=1))
    assert 0 < len(pushed) <= kicked.kick_steps


def test_frames_at_every_second_step_and_the_last(lift):
    trajectory = demonstrate(lift, 0, CLEAN, render_every=2)
    assert sorted(trajectory.frames) == sorted({*range(0, trajectory.length + 1, 2), trajectory.length})


def test_every_expert_names_its_arms_the_panda_first():
    assert set(ARMS) == set(EXPERTS) == set(SPECS)
    assert all(robots[0] == "Panda" for spaces in ARMS.values() for robots in spaces.values())
    assert all(SPECS[task].actions in spaces for task, spaces in ARMS.items())


@pytest.mark.parametrize("settings, said", [
    ({"task": "Wipe"}, "no scripted expert for task Wipe"),
    ({"task": "Stack", "actions": "position"}, "turns the hand; set sim.actions to pose"),
    ({"controller": "JOINT_POSITION"}, "under OSC_POSE only, not JOINT_POSITION"),
    ({"robots": ("Jaco",)}, "drives one Panda or IIWA or Kinova3 or Sawyer or UR5e or XArm7 with sim.actions position, not Jaco"),
    ({"robots": ("Sawyer",), "actions": "pose"}, "with sim.actions pose, not Sawyer"),
    ({"task": "Door", "robots": ("UR5e",)}, "not UR5e"),
])  # fmt: skip
def test_task_robot_controller_or_action_space_without_an_expert_is_refused(settings, said):
    with pytest.raises(ConfigError, match="expert") as caught:
        check_expert(SimConfig(**settings))
    assert said in str(caught.value) and "\n" not in str(caught.value)
