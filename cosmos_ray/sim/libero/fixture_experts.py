"""Scripted experts for LIBERO's tasks with drawers, knobs and plates: pull at a handle, turn a knob, push a plate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from cosmos_ray.sim.libero.grasp import TIP, across, choose
from cosmos_ray.sim.libero.shapes import Scene
from cosmos_ray.sim.servo import CLOSE, OPEN, Actions, Servo, downward, nearest, up

if TYPE_CHECKING:
    from cosmos_ray.sim.environment import Environment

AWAY = 0.12  #: metres in front of a handle from where the hand goes straight to it
RIDGE = 0.025  #: metres from a knob's top down to where its ridge ends
BEYOND = 0.1  #: radians that a knob is turned further than it needs
HINGE = 3  #: MuJoCo's number of a joint that turns
CLEAR = 0.012  #: metres behind a plate where the fingers go down
LEAN = 0.6  #: radians that the hand leans over what it pushes
SLOW = 0.4  #: share of the largest move in a step, while a plate is pushed
OVER = 0.14  #: metres above a handle where the hand turns, over what stands on the table
NOD = 0.2  #: radians that the hand points down at a handle, so that the hand's lower edge stays above plates
BAR = 0.02  #: metres from a handle's foremost point that belong to its bar


def towards(direction: np.ndarray, fingers: np.ndarray) -> np.ndarray:
    """The rotation of a gripper that points along ``direction`` with its finger axis along ``fingers``, unit vectors (3,)."""
    return np.stack([fingers, np.cross(direction, fingers), direction], axis=1)


def opening(scene: Scene, drawer: int) -> np.ndarray:
    """The direction in which a drawer, a body, opens: a unit vector (3,)."""
    joint = int(scene.model.body_jntadr[drawer])
    return np.array(scene.data.xaxis[joint] * np.sign(_far(scene, joint)))


def _far(scene: Scene, joint: int) -> float:
    """The end of a drawer's way, where the drawer is open, in metres from where the drawer is shut."""
    span = scene.model.jnt_range[joint]
    return float(span[int(np.argmax(np.abs(span)))])


def open_drawer(servo: Servo, scene: Scene, region: str, share: float) -> Actions:
    """Pull the drawer of ``region`` out by ``share`` of its way: take its bar from the front, one finger above and one below."""
    body = int(scene.model.site_bodyid[scene.model.site(region).id])
    joint = int(scene.model.body_jntadr[body])
    far, outwards = _far(scene, joint), opening(scene, body)
    turned = nearer(servo, -np.cos(NOD) * outwards - up(np.sin(NOD)), up(np.cos(NOD)) - np.sin(NOD) * outwards)

    def pulled() -> float:
        return float(scene.data.qpos[scene.model.jnt_qposadr[joint]] / far)

    def bar() -> np.ndarray:
        points = scene.part(body)
        ahead = points @ outwards
        found = points[ahead > ahead.max() - BAR]
        return (found.min(axis=0) + found.max(axis=0)) / 2

    while pulled() < share:
        servo.gripper = OPEN
        yield from servo.move(lambda: bar() + AWAY * outwards + up(OVER), turned, tolerance=0.03, angle=0.15, limit=60)
        yield from servo.move(lambda: bar() + AWAY * outwards, turned, tolerance=0.02, angle=0.1, limit=40)
        yield from servo.move(bar, turned, tolerance=0.006, angle=0.1, speed=0.6, limit=40)
        yield from servo.grip(CLOSE, turned)
        line = servo.position + (share + 0.1 - pulled()) * abs(far) * outwards
        yield from servo.move(line, turned, tolerance=0.005, limit=50, until=lambda: pulled() >= share)
        yield from servo.grip(OPEN, turned)
        yield from servo.move(servo.position + AWAY * outwards, turned, tolerance=0.02, limit=30)


def turn_knob(env: Environment, servo: Servo, scene: Scene, fixture: str) -> Actions:
    """Turn the fixture's knob on: take its ridge from above, and turn the hand."""
    (joint,) = (joint for joint in range(scene.model.njnt) if scene.model.body_rootid[scene.model.jnt_bodyid[joint]] == scene.body(fixture)
                and scene.model.jnt_type[joint] == HINGE)  # fmt: skip
    body, address = int(scene.model.jnt_bodyid[joint]), scene.model.jnt_qposadr[joint]
    on = min(env.sim_env.get_object(fixture).object_properties["articulation"]["default_turnon_ranges"])
    home = servo.yaw

    def missing() -> float:
        return float(on + BEYOND - scene.data.qpos[address])

    while True:
        servo.gripper = OPEN
        points = scene.part(body)
        ridge = points[points[:, 2] > points[:, 2].max() - RIDGE]
        grasp = choose(across(ridge), scene.obstacles(body), home)
        yaw = nearest(grasp.yaw, home, np.pi)
        yield from servo.move(grasp.position + up(0.1), downward(yaw), tolerance=0.02)
        yield from servo.move(grasp.position, downward(yaw), tolerance=0.006, angle=0.05, speed=0.6, limit=40)
        yield from servo.grip(CLOSE, downward(yaw))
        turn = downward(yaw + missing() * float(np.sign(scene.data.xaxis[joint][2])))
        yield from servo.move(grasp.position, turn, tolerance=0.01, angle=0.02, limit=30, until=lambda: missing() <= 0)
        yield from servo.grip(OPEN, turn)
        yield from servo.move(servo.position + up(0.1), turn, tolerance=0.02, limit=30)


def push(servo: Servo, scene: Scene, name: str, region: str) -> Actions:
    """Push a flat round object over the table into a region, as with a rake: both fingers behind the object, the hand leaning over it.
    Each push is along one axis of the table, the longer way first."""
    body, goal = scene.body(name), scene.data.site_xpos[scene.model.site(region).id][:2].copy()

    def away() -> np.ndarray:
        return np.append(goal - scene.middle(body), 0.0)

    while True:
        servo.gripper = OPEN
        points, axis, ahead = scene.points(body), int(np.argmax(np.abs(away()))), np.zeros(3)
        ahead[axis] = np.sign(away()[axis])
        approach = -np.sin(LEAN) * ahead - up(np.cos(LEAN))
        turned = nearer(servo, approach, np.cross(ahead, up(1.0)))
        height, behind = float(points[:, 2].min()) + 0.004, float(np.ptp(points[:, axis])) / 2 + CLEAR
        fixed = up(height) - TIP * approach

        def hand(distance: float, ahead: np.ndarray = ahead, fixed: np.ndarray = fixed) -> np.ndarray:
            return np.append(scene.middle(body), 0.0) + distance * ahead + fixed

        def on(hand: Callable[[float], np.ndarray] = hand, ahead: np.ndarray = ahead, axis: int = axis) -> np.ndarray:
            place = hand(0.0)
            place[axis] = servo.position[axis] + away()[axis]
            return place

        def there(ahead: np.ndarray = ahead) -> bool:
            return bool(away() @ ahead < 0.005)

        yield from servo.move(hand(-behind) + up(0.2), turned, tolerance=0.03, angle=0.2)
        yield from servo.move(hand(-behind), turned, tolerance=0.008, angle=0.1, speed=0.6, limit=40)
        yield from servo.move(on, turned, tolerance=0.001, speed=SLOW, limit=80, until=there)
        yield from servo.move(servo.position + up(0.2) - 0.03 * ahead, turned, tolerance=0.03, limit=30)


def nearer(servo: Servo, direction: np.ndarray, fingers: np.ndarray) -> np.ndarray:
    """The rotation that points along ``direction`` with the finger axis along ``fingers`` or against it, whichever is the smaller turn."""
    return min((towards(direction, fingers), towards(direction, -fingers)), key=lambda way: -float(np.trace(way @ servo.rotation.T)))
