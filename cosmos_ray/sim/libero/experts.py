"""Scripted experts for LIBERO's tasks. Those that put one object on or into another grasp from above, carry over everything, and release.

The experts read shapes from the model's collision geometry, so one expert serves all objects. Registered in :data:`LIBERO_EXPERTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_ray.config.libero import LIBERO_SUITES
from cosmos_ray.sim.libero.fixture_experts import open_drawer, opening, push, towards, turn_knob
from cosmos_ray.sim.libero.grasp import TIP, across, by_rim, choose
from cosmos_ray.sim.libero.shapes import Scene
from cosmos_ray.sim.servo import CLOSE, OPEN, Actions, Servo, downward, nearest, up

if TYPE_CHECKING:
    from cosmos_ray.sim.environment import Environment

ABOVE = 0.05  #: metres of air below the hand and what the hand holds, over all that a path crosses
AGAIN = 2.0  #: what it costs to take an object as in an attempt before, radians
WIDE = 0.97  #: share of a drawer's way that counts as open
HALF = 0.75  #: share that leaves room for a bowl, in the drawer and on the table beside the drawer
ASLANT = 0.5  #: radians that the hand leans away from an open drawer
LIFTED = 0.03  #: metres that an object must have risen to count as held


def _place(env: Environment) -> Actions:
    """Put the one object of the task's goal on or into the other."""
    relation, name, target = _goal(env)
    servo = Servo(env)
    yield from place(servo, Scene(env), name, target, relation == "in", servo.yaw)


def _open(env: Environment) -> Actions:
    """Open the drawer of the task's goal."""
    servo = Servo(env)
    yield from open_drawer(servo, Scene(env), _goal(env)[1], WIDE)
    yield from servo.rest()


def _open_and_place(env: Environment) -> Actions:
    """Open the drawer of the task's goal, and put the goal's object into it. The open drawer is over a part of the object, so the hand
    comes from the side, leaning away from the drawer."""
    servo, scene = Servo(env), Scene(env)
    (_, name, region), home, beginning = _goal(env), servo.yaw, servo.position
    body, drawer = scene.body(name), int(scene.model.site_bodyid[scene.model.site(region).id])
    outwards = opening(scene, drawer)
    yield from open_drawer(servo, scene, region, HALF)
    yield from servo.move(beginning, downward(home), tolerance=0.08, angle=0.3)  # from elsewhere the arm's joints come to their limits
    while True:
        servo.gripper = OPEN
        ways = [way._replace(cost=5 * abs(float(outwards[:2] @ [np.cos(way.yaw), np.sin(way.yaw)]))) for way in by_rim(scene.points(body))]
        others = scene.obstacles(body)
        grasp = choose(ways, others[others[:, 2] < scene.part(drawer)[:, 2].min()], home)
        yaw = nearest(grasp.yaw, home, np.pi)
        fingers = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        aside = np.cross(up(1.0), fingers)
        approach = -np.sin(ASLANT) * np.sign(aside @ outwards) * aside - up(np.cos(ASLANT))
        turned = towards(approach, fingers)
        yield from servo.move(grasp.position - 0.2 * approach, turned, tolerance=0.02)
        yield from servo.move(grasp.position, turned, tolerance=0.006, angle=0.05, speed=0.6, limit=40)
        yield from servo.grip(CLOSE, turned)
        yield from servo.move(grasp.position - 0.2 * approach, turned, tolerance=0.02, limit=30)
        yield from carry(servo, scene, body, region, True, turned)


def _turn_on(env: Environment) -> Actions:
    """Turn on the fixture of the task's goal."""
    yield from turn_knob(env, Servo(env), Scene(env), _goal(env)[1])


def _push(env: Environment) -> Actions:
    """Push the object of the task's goal into the goal's region of the table."""
    yield from push(Servo(env), Scene(env), *_goal(env)[1:])


def _goal(env: Environment) -> list[str]:
    """What must hold at the end: a relation, and the names of which it must hold."""
    return env.sim_env.parsed_problem["goal_state"][0]


def place(servo: Servo, scene: Scene, name: str, target: str, into: bool, home: float) -> Actions:
    """Put an object on or into another, again and again until the episode ends. ``home`` is the finger axis that the hand turns least
    from, radians."""
    body = scene.body(name)
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
        yield from carry(servo, scene, body, target, into, turned)


def carry(servo: Servo, scene: Scene, body: int, target: str, into: bool, turned: np.ndarray) -> Actions:
    """Bring the object in the hand to where it goes, and release it; release it at once when it slips."""
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
    **{f"libero_goal/{number}": {0: _open, 3: _open_and_place, 5: _push, 7: _turn_on}.get(number, _place) for number in range(10)},
}
"""The expert of each task of LIBERO that has one. docs/libero.md has the counts."""


def libero_tasks() -> str:
    """The tasks of :data:`LIBERO_EXPERTS` in words, for messages: ``libero_object/0 to 9 and libero_10/3,4``."""
    numbers: dict[str, list[int]] = {}
    for task in LIBERO_EXPERTS:
        suite, _, number = task.partition("/")
        numbers.setdefault(suite, []).append(int(number))
    return " and ".join(f"{suite}/" + (f"0 to {len(found) - 1}" if len(found) == LIBERO_SUITES[suite].tasks else ",".join(map(str, found)))
                        for suite, found in numbers.items())
