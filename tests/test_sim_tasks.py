"""Task table and configuration checks, all without building an environment."""

from __future__ import annotations

import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.config.tasks import SPECS
from cosmos_ray.errors import ConfigError
from cosmos_ray.sim import gl, tasks


def refuse(**settings) -> str:
    """The error of a bad configuration, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        tasks.validate(SimConfig(**settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_task_of_the_table_is_valid():
    for name, spec in SPECS.items():
        assert tasks.validate(SimConfig(task=name)) == spec


def test_unknown_task_names_close_matches():
    assert "did you mean Lift" in refuse(task="lift")
    assert "PickPlaceCan" in refuse(task="PickPlaceCann")


def test_task_unlike_any_other_lists_all():
    assert "Door, Lift" in refuse(task="qqqq")


def test_task_without_an_entry_gets_defaults():
    spec = tasks.spec("NutAssemblyRound")
    assert (spec.instruction, spec.horizon, spec.actions) == ("nut assembly round", 200, "pose")


def test_unknown_robot_names_close_matches():
    assert "did you mean Panda" in refuse(robots=("panda",))


def test_robot_on_a_mobile_base_is_refused():
    assert "not fixed-base robot 'PandaOmron'" in refuse(robots=("PandaOmron",))


def test_number_of_arms_must_fit_the_task():
    assert "exactly one" in refuse(task="Lift", robots=("Panda", "Panda"))
    assert "two single-arm robots or one bimanual" in refuse(task="TwoArmLift")
    assert tasks.validate(SimConfig(task="TwoArmLift", robots=("Panda", "Panda")))


def test_unknown_camera_names_those_of_the_task():
    message = refuse(third_cameras=("sideviev",))
    assert "no camera 'sideviev'" in message and "robot0_eye_in_hand" in message and "agentview" in message
    assert "sideview" not in refuse(task="PickPlaceCan", third_cameras=("sideviev",)).split("it has")[1]


def test_camera_configured_twice_is_refused():
    assert "twice" in refuse(third_cameras=("agentview", "agentview"))


def test_no_camera_is_refused():
    assert "no camera is configured" in refuse(third_cameras=(), wrist_cameras=())


def test_unknown_controller_is_refused():
    assert "OSC_POSE" in refuse(controller="PID")


def test_position_actions_need_a_cartesian_controller():
    assert "position" in refuse(controller="JOINT_POSITION", actions="position")


def test_action_space_and_horizon_follow_the_task_and_controller_unless_given():
    assert (SimConfig().actions, SimConfig().horizon) == ("position", 96)
    assert (SimConfig(actions="pose").actions, SimConfig(horizon=7).horizon) == ("pose", 7)
    assert SimConfig(controller="JOINT_POSITION").actions == "pose"
    assert (SimConfig(task="Door").actions, SimConfig(task="Door").horizon) == ("pose", 200)
    assert (SimConfig(task="NutAssemblyRound").actions, SimConfig(task="NutAssemblyRound").horizon) == ("pose", 200)


@pytest.mark.slow
def test_camera_table_agrees_with_every_built_task():
    _, robosuite = gl.load()
    for task in tasks.task_names():
        robots = ("Panda", "Panda") if task.startswith("TwoArm") else ("Panda",)
        env = robosuite.make(
            task, robots=list(robots), has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False
        )
        assert sorted(tasks.camera_names(task, robots)) == sorted(env.sim.model.camera_names), task
        env.close()
