"""Saves the whole state of a running environment as one flat float64 vector, and restores it, bit for bit.

MuJoCo's integration state is not enough. robosuite keeps the gripper command, the controllers' goals and rest pose, clocks
and its random generator in Python objects, and some tasks edit the model: they place bodies, wipe markers off, light a burner.
The layout is fixed per configuration, so every environment of the same configuration can restore the vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cosmos_ray.errors import SimulationError
from cosmos_ray.sim import gl

CONTROLLER_ARRAYS = ("initial_joint", "goal_pos", "goal_ori", "goal_qpos")
"""What an arm controller remembers between control steps; the rest it recomputes from the simulator."""

WORD = 2**32


class Snapshot:
    """Saves and restores a robosuite environment. ``extra`` adds the caller's own scalars to the vector.

    Make it after the first reset. ``size`` is the length S of the vector.
    """

    def __init__(self, env: Any, extra: tuple[Callable[[], np.ndarray], Callable[[np.ndarray], None]]):
        self.mujoco, _ = gl.load()
        self.env = env
        self.model, self.data = env.sim.model._model, env.sim.data._data
        self.kind = self.mujoco.mjtState.mjSTATE_INTEGRATION
        self.physics = np.zeros(self.mujoco.mj_stateSize(self.model, self.kind))
        # Bodies welded to the world never move by physics, so these are the ones a task may place by editing the model.
        self.fixed_bodies = np.flatnonzero(self.model.body_weldid == 0)
        self.markers = getattr(getattr(env.model, "mujoco_arena", None), "markers", [])
        self.marker_geoms = [env.sim.model.geom_name2id(marker.visual_geoms[0]) for marker in self.markers]
        self.switched = _switched_sites(env)
        alpha = self.model.site_rgba[self.switched, 3]
        self.alpha_off = np.minimum(alpha, 1.0 - alpha)  # LIBERO switches between these two
        fields = [
            (self._read_physics, self._write_physics),
            (self._read_placement, lambda values: self._write_placement(values, self.model)),
            (self._read_markers, self._write_markers),
            (self._read_switched, lambda values: self._write_switched(values, self.model)),
            (self._read_clock, self._write_clock),
            (self._read_generator, self._write_generator),
            *self._robot_fields(),
            extra,
        ]
        self.fields: list[tuple[Callable, Callable, slice]] = []
        start = 0
        for read, write in fields:
            stop = start + np.size(read())
            self.fields.append((read, write, slice(start, stop)))
            start = stop
        self.size = start

    def save(self) -> np.ndarray:
        """The current state, (S,) float64."""
        state = np.empty(self.size)
        for read, _, place in self.fields:
            state[place] = np.ravel(read())
        return state

    def restore(self, state: np.ndarray) -> None:
        """Return to a saved ``state`` (S,). The same actions then give the same future, bit for bit.

        Raises:
            SimulationError: the vector has another length than this environment's.
        """
        state = self._checked(state)
        for _, write, place in self.fields:
            write(state[place])
        for robot in self.env.robots:
            for controller in robot.part_controllers.values():
                controller.new_update = True
        self.mujoco.mj_kinematics(self.model, self.data)

    def show(self, state: np.ndarray, model: Any, data: Any) -> None:
        """Write the visible part of ``state`` into a render ``model`` and ``data`` of the same structure."""
        state = self._checked(state)
        physics, placement, markers, switched = (state[place] for _, _, place in self.fields[:4])
        self.mujoco.mj_setState(model, data, physics, self.kind)
        self._write_placement(placement, model)
        model.site_rgba[:] = self.model.site_rgba
        model.geom_rgba[:] = self.model.geom_rgba
        model.geom_rgba[self.marker_geoms, 3] = 1.0 - markers
        self._write_switched(switched, model)

    def _checked(self, state: np.ndarray) -> np.ndarray:
        state = np.asarray(state, np.float64)
        if state.shape != (self.size,):
            raise SimulationError(
                f"simulator state has shape {state.shape}, this environment's is ({self.size},); "
                "it was saved by another task, robot or version"
            )
        return state

    def _read_physics(self) -> np.ndarray:
        self.mujoco.mj_getState(self.model, self.data, self.physics, self.kind)
        return self.physics

    def _write_physics(self, values: np.ndarray) -> None:
        self.mujoco.mj_setState(self.model, self.data, values, self.kind)

    def _read_placement(self) -> np.ndarray:
        return np.hstack([self.model.body_pos[self.fixed_bodies], self.model.body_quat[self.fixed_bodies]])

    def _write_placement(self, values: np.ndarray, model: Any) -> None:
        poses = values.reshape(-1, 7)
        model.body_pos[self.fixed_bodies] = poses[:, :3]
        model.body_quat[self.fixed_bodies] = poses[:, 3:]

    def _read_markers(self) -> np.ndarray:
        """Wipe only: 1.0 for each dirt marker already wiped."""
        wiped = getattr(self.env, "wiped_markers", [])
        return np.array([any(marker is other for other in wiped) for marker in self.markers], np.float64)

    def _write_markers(self, values: np.ndarray) -> None:
        if self.markers:
            self.env.wiped_markers = [marker for marker, wiped in zip(self.markers, values, strict=True) if wiped]
            self.model.geom_rgba[self.marker_geoms, 3] = 1.0 - values

    def _read_switched(self) -> np.ndarray:
        """LIBERO only: 1.0 for each site that is seen while something is on, such as the burner of a stove."""
        return (self.model.site_rgba[self.switched, 3] > 0).astype(np.float64)

    def _write_switched(self, values: np.ndarray, model: Any) -> None:
        model.site_rgba[self.switched, 3] = np.where(values > 0, 1.0 - self.alpha_off, self.alpha_off)

    def _read_clock(self) -> np.ndarray:
        return np.array([self.env.timestep, self.env.cur_time, self.env.done], np.float64)

    def _write_clock(self, values: np.ndarray) -> None:
        self.env.timestep, self.env.cur_time, self.env.done = int(values[0]), float(values[1]), bool(values[2])

    def _read_generator(self) -> np.ndarray:
        """The PCG64 state as 32-bit words, which float64 holds exactly."""
        generator = self.env.rng.bit_generator.state
        words = []
        for number in (generator["state"]["state"], generator["state"]["inc"]):
            words += [(number >> shift) % WORD for shift in (0, 32, 64, 96)]
        return np.array([*words, generator["has_uint32"], generator["uinteger"]], np.float64)

    def _write_generator(self, values: np.ndarray) -> None:
        words = [int(value) for value in values]
        state, increment = (sum(word << (32 * i) for i, word in enumerate(part)) for part in (words[:4], words[4:8]))
        # In place: the placement samplers hold the same generator object.
        self.env.rng.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {"state": state, "inc": increment},
            "has_uint32": words[8],
            "uinteger": words[9],
        }

    def _robot_fields(self) -> list[tuple[Callable, Callable]]:
        """One (read, write) pair per remembered array of every robot's grippers and arm controllers."""
        fields = []
        for robot in self.env.robots:
            for arm in robot.arms:
                gripper = robot.gripper[arm]
                if gripper.dof:
                    fields.append(_gripper_field(gripper))
                for name in CONTROLLER_ARRAYS:
                    if isinstance(getattr(robot.part_controllers[arm], name, None), np.ndarray):
                        fields.append(_controller_field(robot, arm, name))
        return fields


def _switched_sites(env: Any) -> list[int]:
    """The sites whose alpha a LIBERO task sets while it runs; empty for every other task. In their order in the model."""
    objects = [env.get_object(name) for name in getattr(env, "visualization_sites_list", ())]
    return sorted(env.sim.model.site_name2id(site) for body in objects for site, _ in body.object_properties["vis_site_names"].values())


def _gripper_field(gripper: Any) -> tuple[Callable, Callable]:
    """The integrated gripper command. It has one entry at first, and one per actuator from the first action on."""
    before = gripper.current_action
    gripper.format_action(np.zeros(gripper.dof))
    shape = np.shape(gripper.current_action)
    gripper.current_action = before

    def read() -> np.ndarray:
        return np.broadcast_to(gripper.current_action, shape)

    def write(values: np.ndarray) -> None:
        gripper.current_action = values.reshape(shape).copy()

    return read, write


def _controller_field(robot: Any, arm: str, name: str) -> tuple[Callable, Callable]:
    """One array of an arm controller. Reads it through the robot, because every reset makes a new controller."""
    shape = getattr(robot.part_controllers[arm], name).shape

    def read() -> np.ndarray:
        return getattr(robot.part_controllers[arm], name)

    def write(values: np.ndarray) -> None:
        setattr(robot.part_controllers[arm], name, values.reshape(shape).copy())

    return read, write
