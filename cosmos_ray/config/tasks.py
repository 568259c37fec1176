"""What the project knows about tasks, as plain data. A line of :data:`SPECS`, robosuite tasks, needs an expert in ``sim.experts``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from cosmos_ray.config.libero import LIBERO_SUITES, libero_instruction, libero_task
from cosmos_ray.errors import ConfigError

ActionSpace = Literal["position", "pose"]
"""Numbers of an action: ``position`` (dx, dy, dz, gripper), or ``pose``, which also has a rotation."""

TaskSuite = Literal["", "robosuite", "libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]
"""Tasks that a run may hold together. A LIBERO task is called by its suite and its number there, such as ``libero_spatial/3``."""
GYM = "gym:"
"""What begins the name of a task that gymnasium runs: ``gym:ID``, or ``gym:MODULE:ID`` with the module that registers the ID."""
RENDER = "render"
"""The camera of a gymnasium environment that its own ``render`` shows."""

Quality = Literal["fast", "full"]
"""How frames are rendered: ``full`` as robosuite itself does, ``fast`` without shadows, reflections and multisampling."""


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
    """What the project knows about a task beyond what its simulator says. The defaults serve a task that has no entry."""

    name: str
    instruction: str  #: empty for a task of LIBERO, whose packages have the texts: :func:`task_instruction` finds it
    horizon: int = 200
    """Control steps before an episode times out."""
    actions: ActionSpace = "pose"
    """Default action space of an OSC controller; a joint controller always takes its full vector."""
    quality: Quality = "fast"
    """Default render quality: ``full`` where released policies look."""
    noise: NoiseMix = field(default_factory=NoiseMix)
    """Recommended disturbance of demonstrations."""
    robots: tuple[str, ...] = ("Panda",)
    wrist_cameras: tuple[str, ...] = ("robot0_eye_in_hand",)
    third_cameras: tuple[str, ...] = ("agentview",)


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


def task_spec(name: str) -> TaskSpec:
    """The entry of a task in :data:`SPECS`, or what LIBERO's suite says. Any other task gets the defaults, and the words of its name as
    instruction. ConfigError for a name of LIBERO's without a task."""
    if found := libero_task(name):
        return TaskSpec(name, "", LIBERO_SUITES[found[0]].horizon, quality="full")
    if name.startswith(GYM):
        plain = re.sub(r"-v\d+$", "", name.rpartition(":")[2].rpartition("/")[2])
        return TaskSpec(name, _words(plain), robots=(), wrist_cameras=(), third_cameras=(RENDER,))
    return SPECS.get(name) or TaskSpec(name, _words(name))


def task_instruction(name: str) -> str:
    """The instruction of a task. ConfigError where it is LIBERO's and LIBERO is not installed."""
    found = libero_task(name)
    return libero_instruction(*found) if found else task_spec(name).instruction


def suite_tasks(suite: str, chosen: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of the tasks of a :data:`TaskSuite`: of those that are ``chosen``, in their order, or of all. ConfigError, which names what
    there is, for another task, and for a task that is chosen twice. Another suite, which the check refuses, has none."""
    if suite == "robosuite":
        known = {name: name for name in SPECS}
    else:
        known = {str(number): f"{suite}/{number}" for number in range(LIBERO_SUITES[suite].tasks if suite in LIBERO_SUITES else 0)}
    if not known:
        return ()
    for task in chosen:
        if task not in known:
            there = ", ".join(known) if suite == "robosuite" else f"0 to {len(known) - 1}"
            raise ConfigError(f"sim.tasks has {task!r}, which suite {suite} has not: it has {there}")
        if chosen.count(task) > 1:
            raise ConfigError(f"sim.tasks has {task!r} twice")
    return tuple(known[task] for task in chosen or known)


def _words(name: str) -> str:
    return " ".join(re.findall(r"[A-Z][a-z]*|\d+", name)).lower() or name
