"""The robosuite tasks: what the project knows about five of them, and checks that a configuration can run."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field

from cosmos_ray.config import SimConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.sim import gl

CONTROLLERS = ("OSC_POSE", "OSC_POSITION", "JOINT_POSITION")
"""Arm controllers whose memory :mod:`cosmos_ray.sim.snapshot` knows, so that episodes can be restored exactly."""

ARENA_CAMERAS = ("frontview", "birdview", "agentview", "sideview")
ARENA_CAMERAS_BY_TASK = {
    "PickPlace": ("frontview", "birdview", "agentview"),
    "TwoArmTransport": (*ARENA_CAMERAS, "shouldercamera0", "shouldercamera1"),
}
"""Cameras of robosuite 1.5.2's arenas, for tasks whose name starts with the key; the robots add their own."""


@dataclass(frozen=True)
class NoiseMix:
    """How demonstrations are disturbed so that a policy also sees how to recover (DART, arXiv 1703.09327).

    The executed action is the expert's plus an Ornstein-Uhlenbeck process on all but the gripper; the label stays clean.
    Each episode draws its own noise level.
    """

    level: float = 0.1
    """Stationary standard deviation at scale 1, in action units."""
    scale: tuple[float, float] = (0.0, 1.5)
    """Range of the per-episode multiplier of ``level``."""
    correlation: float = 0.85
    """Autocorrelation from one control step to the next."""
    kick_share: float = 0.35
    """Share of episodes that are pushed once."""
    kick_steps: int = 5
    kick_level: float = 0.4
    """Standard deviation of the push, constant over ``kick_steps`` control steps, in action units."""


@dataclass(frozen=True)
class TaskSpec:
    """What the project knows about a task beyond what robosuite says."""

    name: str
    instruction: str
    horizon: int = 200
    """Control steps before an episode times out."""
    actions: str = "pose"
    """Default action space: ``position`` (dx, dy, dz, gripper) or ``pose`` (with rotation)."""
    noise: NoiseMix = field(default_factory=NoiseMix)
    """Recommended disturbance of demonstrations."""


SPECS = {
    spec.name: spec
    for spec in (
        TaskSpec("Lift", "lift the red cube", horizon=96, actions="position", noise=NoiseMix(level=0.2)),
        TaskSpec("Stack", "stack the red cube on the green cube", horizon=200),
        TaskSpec("PickPlaceCan", "put the can into its bin", horizon=400),
        TaskSpec("NutAssemblySquare", "put the square nut on the square peg", horizon=300),
        TaskSpec("Door", "turn the handle and open the door", horizon=200),
    )
}


def spec(name: str) -> TaskSpec:
    """The :class:`TaskSpec` of a robosuite task; tasks without an entry get generic defaults.

    Raises:
        ConfigError: robosuite has no such task.
    """
    if name in SPECS:
        return SPECS[name]
    known = task_names()
    if name not in known:
        raise ConfigError(f"unknown task {name!r} (sim.task); {_suggestion(name, known)}")
    words = re.findall(r"[A-Z][a-z]*|\d+", name)
    return TaskSpec(name, " ".join(words).lower() or name)


def task_names() -> tuple[str, ...]:
    """Every task registered with robosuite."""
    gl.load()
    from robosuite.environments.base import REGISTERED_ENVS

    return tuple(REGISTERED_ENVS)


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
    _check_robots(config)
    if config.controller not in CONTROLLERS:
        raise ConfigError(
            f"unsupported controller {config.controller!r} (sim.controller); choose one of {', '.join(CONTROLLERS)}"
        )
    actions = action_space(config, task)
    if actions == "position" and config.controller == "JOINT_POSITION":
        raise ConfigError("sim.actions 'position' needs an OSC controller (sim.controller), not JOINT_POSITION")
    if not config.cameras:
        raise ConfigError("no camera is configured; name at least one in sim.wrist_cameras or sim.third_cameras")
    check_cameras(config, camera_names(config.task, config.robots))
    return task


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


def action_space(config: SimConfig, task: TaskSpec) -> str:
    """``position`` or ``pose``, resolving ``auto`` by task; joint controllers always take their full vector."""
    if config.actions != "auto":
        return config.actions
    return "pose" if config.controller == "JOINT_POSITION" else task.actions


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
