"""The tasks: checks that a configuration can run.

What the project knows about five of them is in :mod:`cosmos_ray.config.tasks`.
"""

from __future__ import annotations

import difflib

from cosmos_ray.config import SimConfig
from cosmos_ray.config.libero import libero_folder, libero_task
from cosmos_ray.config.tasks import SPECS, TaskSpec, task_spec
from cosmos_ray.errors import ConfigError
from cosmos_ray.sim import gl

CONTROLLERS = ("OSC_POSE", "OSC_POSITION", "IK_POSE", "JOINT_POSITION", "JOINT_TORQUE")
"""Arm controllers whose memory :mod:`cosmos_ray.sim.snapshot` knows, so that episodes can be restored exactly. robosuite 1.5.2 has one
more, JOINT_VELOCITY, and cannot build it."""

IK_ROBOTS = ("Panda", "Sawyer", "Baxter")
"""The fixed-base robots that robosuite's inverse kinematics knows."""

ARENA_CAMERAS = ("frontview", "birdview", "agentview", "sideview")
ARENA_CAMERAS_BY_TASK = {
    "PickPlace": ("frontview", "birdview", "agentview"),
    "TwoArmTransport": (*ARENA_CAMERAS, "shouldercamera0", "shouldercamera1"),
}
"""Cameras of robosuite 1.5.2's arenas, for tasks whose name starts with the key; the robots add their own."""


LIBERO_CAMERAS = (*ARENA_CAMERAS, "robot0_robotview", "robot0_eye_in_hand")
"""Cameras that every scene of LIBERO has."""


def spec(name: str) -> TaskSpec:
    """The :class:`TaskSpec` of a task; tasks without an entry get generic defaults.

    Raises:
        ConfigError: neither robosuite nor LIBERO has such a task, or LIBERO is not installed.
    """
    if libero_task(name):
        libero_folder()
        return task_spec(name)
    if name in SPECS:
        return SPECS[name]
    known = task_names()
    if name not in known:
        raise ConfigError(f"unknown task {name!r} (sim.task); {_suggestion(name, known)}")
    return task_spec(name)


def task_names() -> tuple[str, ...]:
    """Every task registered with robosuite."""
    gl.load()
    from robosuite.environments.base import REGISTERED_ENVS

    return tuple(name for name, made in REGISTERED_ENVS.items() if made.__module__.startswith("robosuite."))


def robot_names() -> tuple[str, ...]:
    """Every robot the project can drive: those on a fixed base."""
    gl.load()
    from robosuite.models.robots.robot_model import REGISTERED_ROBOTS
    from robosuite.robots import ROBOT_CLASS_MAPPING, FixedBaseRobot

    return tuple(name for name in REGISTERED_ROBOTS if ROBOT_CLASS_MAPPING.get(name) is FixedBaseRobot)


def validate(config: SimConfig) -> TaskSpec:
    """Check a configuration without building its environment; about two seconds, nearly all of it importing robosuite.

    Raises:
        ConfigError: one line that names the bad setting and what would work.
    """
    task = spec(config.task)
    if libero_task(config.task):
        config.check()
        check_cameras(config, LIBERO_CAMERAS)
        return task
    _check_robots(config)
    _check_controller(config)
    if not config.cameras:
        raise ConfigError("no camera is configured; name at least one in sim.wrist_cameras or sim.third_cameras")
    check_cameras(config, camera_names(config.task, config.robots))
    return task


def _check_controller(config: SimConfig) -> None:
    name = config.controller
    if name == "JOINT_VELOCITY":
        raise ConfigError("sim.controller JOINT_VELOCITY does not work in robosuite 1.5.2, which fails to build it; choose one of "
                          f"{', '.join(CONTROLLERS)}")
    if name not in CONTROLLERS:
        raise ConfigError(f"unsupported controller {name!r} (sim.controller); choose one of {', '.join(CONTROLLERS)}")
    if config.actions == "position" and name.startswith("JOINT_"):
        raise ConfigError(f"sim.actions 'position' needs a controller of the hand (sim.controller OSC_POSE, say), not {name}")
    strangers = [robot for robot in config.robots if robot not in IK_ROBOTS]
    if name == "IK_POSE" and strangers:
        raise ConfigError(f"sim.controller IK_POSE drives {', '.join(IK_ROBOTS)} only, not {strangers[0]} (sim.robots): robosuite has no "
                          "inverse kinematics of others; choose another controller, OSC_POSE say")


def check_cameras(config: SimConfig, available: tuple[str, ...]) -> None:
    """Raise a :class:`ConfigError` naming the cameras of the task if the configuration asks for another, or twice."""
    for camera in config.cameras:
        if camera not in available:
            raise ConfigError(f"task {config.task} has no camera {camera!r}; it has {', '.join(available)}")
        if config.cameras.count(camera) > 1:
            raise ConfigError(f"camera {camera!r} is configured twice (sim.wrist_cameras, sim.third_cameras)")


def camera_names(task: str, robots: tuple[str, ...]) -> tuple[str, ...]:
    """The cameras of a task with these robots, from the robots' own models and the table of arenas above."""
    gl.load()
    from robosuite.models.robots.robot_model import create_robot

    arena = next((cameras for key, cameras in ARENA_CAMERAS_BY_TASK.items() if task.startswith(key)), ARENA_CAMERAS)
    mounted = [camera for i, robot in enumerate(robots) for camera in create_robot(robot, idn=i).cameras]
    return (*arena, *mounted)


def _check_robots(config: SimConfig) -> None:
    known = robot_names()
    for robot in config.robots:
        if robot not in known:
            raise ConfigError(f"unknown or not fixed-base robot {robot!r} (sim.robots); {_suggestion(robot, known)}")
    from robosuite.environments.base import REGISTERED_ENVS
    from robosuite.environments.manipulation.two_arm_env import TwoArmEnv
    from robosuite.utils.robot_utils import check_bimanual

    arms = sum(2 if check_bimanual(robot) else 1 for robot in config.robots)
    wanted = 2 if issubclass(REGISTERED_ENVS[config.task], TwoArmEnv) else 1
    if arms != wanted:
        plural = "two single-arm robots or one bimanual robot" if wanted == 2 else "exactly one single-arm robot"
        raise ConfigError(f"task {config.task} needs {plural} (sim.robots), got {', '.join(config.robots) or 'none'}")


def _suggestion(name: str, known: tuple[str, ...]) -> str:
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    return f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(sorted(known))}"
