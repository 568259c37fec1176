"""Scripted experts, one per known task of robosuite; those of LIBERO are in ``sim.libero.experts``. They read the simulator's privileged
state.

An expert is a generator. Before each control step, ``next`` gives the clean action for the environment's current state. An
expert never ends: after its last move it holds still.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial.transform import Rotation

from cosmos_ray.config import SimConfig
from cosmos_ray.config.libero import libero_task
from cosmos_ray.errors import ConfigError
from cosmos_ray.sim.libero.experts import LIBERO_EXPERTS, libero_tasks
from cosmos_ray.sim.servo import CLOSE, OPEN, Actions, Servo, downward, nearest, up

if TYPE_CHECKING:
    from cosmos_ray.sim.environment import Environment
    from cosmos_ray.sim.simulation import Simulation

GRASPED = 0.04
"""An object this close (metres) to the grip site while the gripper is closed counts as held."""
NEARER = 0.05
"""How much nearer to the robot than the middle of its bin (metres) the can is dropped: the arm does not reach the middle at that height."""


ARMS: dict[str, dict[str, tuple[str, ...]]] = {
    "Lift": {"position": ("Panda", "IIWA", "Kinova3", "Sawyer", "UR5e", "XArm7"), "pose": ("Panda", "IIWA", "Kinova3", "UR5e", "XArm7")},
    "Stack": {"pose": ("Panda", "IIWA", "Kinova3", "UR5e", "XArm7")},
    "PickPlaceCan": {"pose": ("Panda",)},
    "NutAssemblySquare": {"pose": ("Panda",)},
    "Door": {"pose": ("Panda", "IIWA", "Kinova3", "Sawyer")},
}
"""The arms that each expert drives, by action space: those with which at least half of 20 disturbed episodes succeed (docs/running.md)."""
LIBERO_ARMS = {"pose": ("Panda",)}  #: the arm of all of LIBERO's tasks


def check_expert(config: SimConfig) -> None:
    """Raise a ConfigError when this task, robot, controller or action space has no expert."""
    if config.expert:
        _named(config.expert)
        return
    if config.task not in EXPERTS and config.task not in LIBERO_EXPERTS:
        raise ConfigError(f"no scripted expert for task {config.task}; there is one for {', '.join(EXPERTS)}, {libero_tasks()}; import "
                          "demonstrations (`replay import`), or name an expert of your own (sim.expert MODULE:FUNCTION)")
    if config.controller != "OSC_POSE":
        raise ConfigError(f"the scripted expert for {config.task} acts under OSC_POSE only, not {config.controller} (sim.controller)")
    spaces = LIBERO_ARMS if libero_task(config.task) else ARMS[config.task]
    if config.actions not in spaces:
        raise ConfigError(f"the scripted expert for {config.task} turns the hand; set sim.actions to pose")
    if len(config.robots) != 1 or config.robots[0] not in spaces[config.actions]:
        raise ConfigError(f"the scripted expert for {config.task} drives one {' or '.join(spaces[config.actions])} with sim.actions "
                          f"{config.actions}, not {', '.join(config.robots)} (sim.robots); import demonstrations instead (`replay import`)")


def expert(env: Simulation) -> Actions:
    """The expert of the environment's task. Make a new one after every reset.

    Raises:
        ConfigError: see :func:`check_expert`.
    """
    check_expert(env.config)
    return _lasting(env) if env.config.expert else (EXPERTS | LIBERO_EXPERTS)[env.task](env)


def _named(name: str) -> Callable[[Any], Actions]:
    """The expert ``MODULE:FUNCTION``. ConfigError when there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"sim.expert = {name!r}: {error}; give MODULE:FUNCTION, of a module that Python finds (PYTHONPATH)") from error
    if not callable(found):
        raise ConfigError(f"sim.expert = {name!r}: module {module} has no function {function!r}; give MODULE:FUNCTION")
    return found


def _lasting(env: Simulation) -> Actions:
    """The actions of ``sim.expert``, (d,) float32. ConfigError when it gives fewer than the episode has control steps."""
    for action in _named(env.config.expert)(env):
        yield np.array(action, np.float32)
    raise ConfigError(f"sim.expert = {env.config.expert!r} ended at step {env.step_index} of {env.task}: it must yield an action for every "
                      "control step, so let its last one go on")


def _lift(env: Environment) -> Actions:
    servo = Servo(env)
    body = env.sim_env.cube_body_id
    yield from _grasp(servo, body, hover=0.08, rise=0.12)
    yield from servo.rest()


def _stack(env: Environment) -> Actions:
    servo, data = Servo(env), env.data
    cube, base = env.sim_env.cubeA_body_id, env.sim_env.cubeB_body_id
    while True:
        yield from _grasp(servo, cube, hover=0.08, rise=0.15, beside=base)

        def over(height: float) -> np.ndarray:
            # Where the hand must be for the held cube (not the hand) to be over the base.
            return data.xpos[base] + servo.position - data.xpos[cube] + up(height)

        turned = servo.rotation
        yield from servo.move(lambda: over(0.12), turned)
        yield from servo.move(lambda: over(0.0475), turned, tolerance=0.004, speed=0.4)
        yield from servo.grip(OPEN, turned)
        clear = servo.position + up(0.1)
        yield from servo.move(clear, turned)


def _pick_place_can(env: Environment) -> Actions:
    servo, data = Servo(env), env.data
    can = env.sim_env.obj_body_id["Can"]
    goal = env.sim_env.target_bin_placements[env.sim_env.object_to_id["can"]].copy()
    away = goal[:2] - servo.arm.origin_pos[:2]
    goal[:2] -= NEARER * away / np.linalg.norm(away)
    while True:
        yield from _grasp(servo, can, hover=0.12, rise=0.25, period=None)
        turned = servo.rotation

        def over(height: float) -> np.ndarray:
            return np.append(goal[:2] + (servo.position - data.xpos[can])[:2], goal[2] + height)

        def dropped() -> bool:
            return not _held(servo, can)

        yield from servo.move(lambda: over(0.25), turned, until=dropped)
        yield from servo.move(lambda: over(0.12), turned, until=dropped)
        yield from servo.grip(OPEN, turned)
        clear = servo.position + up(0.12)
        yield from servo.move(clear, turned)


def _nut_assembly_square(env: Environment) -> Actions:
    servo, data = Servo(env), env.data
    nut = env.sim_env.obj_body_id["SquareNut"]
    handle = env.sim_env.object_site_ids[0]
    peg = env.sim_env.peg1_body_id

    def handle_angle() -> float:
        along = data.site_xpos[handle] - data.xpos[nut]
        return float(np.arctan2(along[1], along[0]))

    def pinch() -> np.ndarray:
        return downward(nearest(handle_angle() + np.pi / 2, servo.yaw, np.pi))

    def over_peg(height: float) -> np.ndarray:
        offset = servo.position - data.xpos[nut]
        return np.append(data.xpos[peg][:2] + offset[:2], env.sim_env.table_offset[2] + height + offset[2])

    def aligned() -> np.ndarray:
        angle = handle_angle()
        # Any quarter turn fits the peg, except the handle pointing away from the robot, which is out of the arm's reach.
        quarters = round(angle / (np.pi / 2)) or (1 if angle >= 0 else -1)
        return downward(servo.yaw + quarters * np.pi / 2 - angle)

    def dropped() -> bool:
        return bool(np.linalg.norm(data.site_xpos[handle] - servo.position) > GRASPED)

    while True:
        servo.gripper = OPEN
        yield from servo.move(lambda: data.site_xpos[handle] + up(0.1), pinch, tolerance=0.015)
        yield from servo.move(lambda: data.site_xpos[handle], pinch, tolerance=0.006, limit=40)
        yield from servo.grip(CLOSE, pinch())
        turned, raised = servo.rotation, servo.position + up(0.2)
        yield from servo.move(raised, turned, tolerance=0.02, until=dropped)
        yield from servo.move(lambda: over_peg(0.17), aligned, tolerance=0.005, angle=0.03, until=dropped)
        yield from servo.move(lambda: over_peg(0.02), aligned, tolerance=0.01, limit=40, until=dropped)
        turned = servo.rotation
        yield from servo.grip(OPEN, turned)
        clear = servo.position + up(0.12)
        yield from servo.move(clear, turned)


def _door(env: Environment) -> Actions:
    servo, data, sim = Servo(env), env.data, env.sim_env
    handle, latch_angle, hinge_angle = sim.door_handle_site_id, sim.handle_qpos_addr, sim.hinge_qpos_addr
    hinge, latch = (sim.sim.model.joint_name2id(name) for name in sim.door.joints[:2])

    def handle_position() -> np.ndarray:
        return data.site_xpos[handle].copy()

    # The latch turns about the door's normal; take its direction that points away from the robot, into the door.
    normal = data.xaxis[latch].copy()
    normal *= np.sign(normal @ (handle_position() - servo.arm.origin_pos))
    fingers = np.array([0.0, 0.0, 1.0])
    level = np.stack([fingers, np.cross(normal, fingers), normal], axis=1)
    if np.dot(level[:, 1], servo.rotation[:, 1]) < 0:
        level[:, :2] *= -1  # the same grasp with the fingers exchanged, reached by a smaller turn

    def turned(joint: int, angle: float) -> np.ndarray:
        """Where the handle is after turning a joint by ``angle`` radians."""
        anchor = data.xanchor[joint]
        return anchor + Rotation.from_rotvec(angle * data.xaxis[joint]).apply(handle_position() - anchor)

    while True:
        servo.gripper = OPEN
        yield from servo.move(lambda: handle_position() - 0.1 * normal, level, tolerance=0.015, limit=120)
        yield from servo.move(lambda: handle_position() + 0.01 * normal, level, tolerance=0.008, limit=60)
        yield from servo.grip(CLOSE, level)
        slip = servo.position - handle_position()
        start = data.qpos[latch_angle]

        def turning(slip: np.ndarray = slip) -> np.ndarray:
            return turned(latch, 0.3) + slip

        def tilted(start: float = start) -> np.ndarray:
            return Rotation.from_rotvec((data.qpos[latch_angle] - start) * data.xaxis[latch]).as_matrix() @ level

        yield from servo.move(
            turning, tilted, tolerance=0.0, limit=60,
            until=lambda: data.qpos[latch_angle] > 1.4,
        )  # fmt: skip
        fixed = servo.rotation
        yield from servo.move(
            lambda: servo.position + turned(hinge, 0.1) - handle_position(), fixed, tolerance=0.0,
            speed=0.8, limit=120, until=lambda: data.qpos[latch_angle] < 0.3 and data.qpos[hinge_angle] < 0.05,
        )  # fmt: skip


def _grasp(
    servo: Servo, body: int, hover: float, rise: float, beside: int | None = None, period: float | None = np.pi / 2
) -> Actions:
    """Grasp a body from above and lift it by ``rise`` metres, again and again until it is held.

    Args:
        hover: height in metres from which the hand descends.
        beside: a body that the open fingers must not hit.
        period: symmetry of the body about its vertical axis in radians; None keeps the yaw of the hand (round bodies).
    """
    data = servo.data
    while True:
        servo.gripper = OPEN
        turned = servo.rotation if period is None else downward(_grasp_yaw(servo, body, beside, period))
        yield from servo.move(lambda: data.xpos[body] + up(hover), turned, tolerance=0.02)
        if period is not None:
            turned = downward(_grasp_yaw(servo, body, beside, period))
        yield from servo.move(lambda: data.xpos[body].copy(), turned, tolerance=0.008, limit=40)
        yield from servo.grip(CLOSE, turned)
        raised = servo.position + up(rise)
        yield from servo.move(
            raised, turned, tolerance=0.02,
            until=lambda: not _held(servo, body),
        )  # fmt: skip
        if _held(servo, body):
            return


def _held(servo: Servo, body: int) -> bool:
    return bool(np.linalg.norm(servo.data.xpos[body] - servo.position) < GRASPED)


def _grasp_yaw(servo: Servo, body: int, beside: int | None, period: float) -> float:
    """The finger yaw that fits the body: nearest to the present one, or across the line to a close neighbour."""
    axis = servo.data.xmat[body].reshape(3, 3)[:, 0]
    yaw = nearest(np.arctan2(axis[1], axis[0]), servo.yaw, period)
    if beside is not None:
        to_neighbour = (servo.data.xpos[beside] - servo.data.xpos[body])[:2]
        if np.linalg.norm(to_neighbour) < 0.1:
            across = np.arctan2(to_neighbour[1], to_neighbour[0]) + np.pi / 2
            yaw = nearest(yaw, nearest(across, servo.yaw, np.pi), period)
    return float(yaw)


EXPERTS: dict[str, Callable[[Any], Actions]] = {
    "Lift": _lift,
    "Stack": _stack,
    "PickPlaceCan": _pick_place_can,
    "NutAssemblySquare": _nut_assembly_square,
    "Door": _door,
}
