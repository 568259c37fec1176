"""Scripted experts for LIBERO's tasks that put one object on or into another: grasp from above, carry over everything, release.

The experts read shapes from the model's collision geometry, so one expert serves all objects. Registered in :data:`LIBERO_EXPERTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cosmos_ray.sim.libero.shapes import Scene
from cosmos_ray.sim.servo import CLOSE, OPEN, Actions, Servo, downward, nearest, up

if TYPE_CHECKING:
    from cosmos_ray.sim.environment import Environment

DIRECTIONS = 24  #: of the finger axis, of which the expert takes the best
APART = 0.04  #: metres from the grip site to each open finger
TIP = 0.013  #: metres that the fingers reach below the grip site
PALM = 0.035  #: metres from the grip site up to the palm, which must stay above the object
RIM = 0.015  #: metres from an object's rim down to the grip site
ABOVE = 0.05  #: metres of air below the hand and what the hand holds, over all that a path crosses
AGAIN = 2.0  #: what it costs to take an object as in an attempt before, radians
LIFTED = 0.03  #: metres that an object must have risen to count as held


class Grasp(NamedTuple):
    """One way to take an object."""

    position: np.ndarray  #: of the grip site, (3,) metres
    yaw: float  #: of the finger axis, radians
    cost: float  #: of the grasp by itself, radians of turning that it is worth to avoid the grasp


def by_rim(points: np.ndarray) -> list[Grasp]:
    """Pinch the upper edge of an object that is too wide to take whole, one finger inside. ``points`` (n, 3) are on its surface."""
    top = float(points[:, 2].max())
    rim = points[points[:, 2] > top - 0.01, :2]
    middle = (rim.min(axis=0) + rim.max(axis=0)) / 2
    radius = float(np.linalg.norm(rim - middle, axis=1).max()) - 0.004
    angles = np.arange(DIRECTIONS) * 2 * np.pi / DIRECTIONS
    return [Grasp(np.array([*(middle + radius * np.array([np.cos(angle), np.sin(angle)])), top - RIM]), angle, 0.0) for angle in angles]


def across(points: np.ndarray) -> list[Grasp]:
    """Both fingers outside, across the object. ``points`` (n, 3) are on the object's surface. Wide directions cost more, and those that
    the open hand does not fit over are left out."""
    low, high = float(points[:, 2].min()), float(points[:, 2].max())
    height = max((low + high) / 2, high - PALM + 0.01, low + 0.005)  # lower, and a carton sticks to a finger
    held = points[np.abs(points[:, 2] - height) < 0.012]
    found = []
    for angle in np.arange(DIRECTIONS) * np.pi / DIRECTIONS:
        fingers = np.array([np.cos(angle), np.sin(angle)])
        along, aside = held[:, :2] @ fingers, held[:, :2] @ np.array([-fingers[1], fingers[0]])
        width = float(np.ptp(along))
        if width < 2 * APART - 0.004:
            middle = np.array([(along.min() + along.max()) / 2, (aside.min() + aside.max()) / 2])
            place = middle[0] * fingers + middle[1] * np.array([-fingers[1], fingers[0]])
            found.append(Grasp(np.array([*place, height]), angle, 40 * width))
    return found


def choose(grasps: list[Grasp], obstacles: np.ndarray, yaw: float) -> Grasp:
    """The grasp that touches the fewest points of ``obstacles`` (n, 3); among equals the cheapest, with the turn from ``yaw``."""
    def score(grasp: Grasp) -> tuple[int, float]:
        relative = obstacles - grasp.position
        along = np.abs(relative[:, :2] @ np.array([np.cos(grasp.yaw), np.sin(grasp.yaw)]))
        aside = np.abs(relative[:, :2] @ np.array([-np.sin(grasp.yaw), np.cos(grasp.yaw)]))
        height = relative[:, 2]
        fingers = (np.abs(along - APART - 0.008) < 0.018) & (aside < 0.017) & (height > 0.003 - TIP) & (height <= PALM)
        palm = (along < 0.11) & (aside < 0.04) & (height > PALM) & (height < 0.2)
        return int((fingers | palm).sum()), grasp.cost + abs(nearest(grasp.yaw, yaw, np.pi) - yaw)

    return min(grasps, key=score)


def _place(env: Environment) -> Actions:
    """Put the one object of the task's goal on or into the other, again and again until the episode ends."""
    servo, scene = Servo(env), Scene(env)
    relation, name, target = env.sim_env.parsed_problem["goal_state"][0]
    body, into, home = scene.body(name), relation == "in", servo.yaw
    tried: list[float] = []
    while True:
        servo.gripper = OPEN
        points = scene.points(body)
        # What slipped, or stuck to a finger, is taken otherwise the next time.
        ways = [way._replace(cost=way.cost + sum(abs(nearest(way.yaw, yaw, np.pi) - yaw) < 0.6 for yaw in tried) * AGAIN)
                for way in across(points) or by_rim(points)]
        grasp = choose(ways, scene.obstacles(body), home)
        tried.append(grasp.yaw)
        turned = downward(nearest(grasp.yaw, home, np.pi))
        yield from _travel(servo, scene, grasp.position, turned, body, below=TIP)
        yield from servo.move(grasp.position, turned, tolerance=0.006, angle=0.05, speed=0.6, limit=30)
        yield from servo.grip(CLOSE, turned)
        before = scene.data.xpos[body][2]
        yield from servo.move(servo.position + up(LIFTED + 0.03), turned, tolerance=0.015, limit=20)
        if scene.data.xpos[body][2] < before + LIFTED:
            yield from _release(servo, turned)
            continue

        offset = scene.data.xpos[body] - servo.position

        def dropped(offset: np.ndarray = offset) -> bool:
            return bool(np.linalg.norm(scene.data.xpos[body] - servo.position - offset) > 0.04)

        below = servo.position[2] - scene.points(body)[:, 2].min()
        goal = scene.place(target, into)
        yield from _travel(servo, scene, goal + up(below), turned, body, below, held=body, until=dropped)

        def over(height: float, goal: np.ndarray = goal, below: float = below) -> np.ndarray:
            shift = servo.position[:2] - scene.middle(body)
            return np.append(goal[:2] + shift, goal[2] + below + height)

        yield from servo.move(lambda: over(0.06), turned, tolerance=0.015, until=dropped, limit=40)
        yield from servo.move(lambda: over(0.005), turned, tolerance=0.008, speed=0.5, limit=25, until=dropped)
        yield from _release(servo, turned)


def _travel(
    servo: Servo, scene: Scene, goal: np.ndarray, turned: np.ndarray, body: int, below: float, held: int | None = None,
    until: Callable[[], bool] | None = None,
) -> Actions:  # fmt: skip
    """Move to above ``goal``, over everything on the way with ``below`` metres hanging under the grip site: up, across, down."""
    shift = np.zeros(2) if held is None else servo.position[:2] - scene.middle(held)
    end = goal[:2] + shift
    height = max(scene.tallest(servo.position[:2], end, body) + below + ABOVE, goal[2] + 0.08)
    yield from servo.move(np.append(servo.position[:2], max(height, servo.position[2])), turned, tolerance=0.03, angle=9.0, until=until)
    yield from servo.move(np.append(end, height), turned, tolerance=0.02, until=until)


def _release(servo: Servo, turned: np.ndarray) -> Actions:
    yield from servo.grip(OPEN, turned)
    yield from servo.move(servo.position + up(0.12), turned, tolerance=0.02, limit=30)


LIBERO_EXPERTS: dict[str, Callable[[Any], Actions]] = {
    **{f"libero_spatial/{number}": _place for number in range(10)},
    **{f"libero_object/{number}": _place for number in range(10)},
    **{f"libero_goal/{number}": _place for number in (1, 2, 4, 6, 8, 9)},
}
"""The expert of each task of LIBERO that has one. docs/libero.md has the counts."""


def libero_tasks() -> str:
    """The tasks of :data:`LIBERO_EXPERTS` in words, for messages: ``libero_object/0,1,2 and libero_spatial/4``."""
    numbers: dict[str, list[str]] = {}
    for task in LIBERO_EXPERTS:
        suite, _, number = task.partition("/")
        numbers.setdefault(suite, []).append(number)
    return " and ".join(f"{suite}/{','.join(found)}" for suite, found in numbers.items())
