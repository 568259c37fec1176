"""A task of robosuite or LIBERO as a deterministic, restorable, lazily rendered environment."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import numba
import numpy as np

from cosmos_ray.config import SimConfig
from cosmos_ray.config.libero import libero_task
from cosmos_ray.errors import SimulationError
from cosmos_ray.sim import gl, tasks
from cosmos_ray.sim.libero.task import LiberoTask
from cosmos_ray.sim.machine import machine
from cosmos_ray.sim.robosuite_task import RobosuiteTask
from cosmos_ray.sim.shared_renderer import SharedRenderer, shared_renderer
from cosmos_ray.sim.simulation import Simulation, StepResult
from cosmos_ray.sim.slimming import full_xml, slim
from cosmos_ray.sim.snapshot import Snapshot
from cosmos_ray.sim.stepping import stepper

RENDERED = {"fast": "no-shadow no-reflection no-msaa", "full": "full"}
"""Render qualities as fingerprints have them."""


class Environment(Simulation):
    """One robosuite environment, stepped in the calling thread.

    The environments of one process share a renderer, so step them one after another. The environment renders only on request.

    Args:
        config: the task, robots, controller, cameras and picture size.
        make_seed: seed of the random choices while robosuite builds the model (Lift: the size of the cube). Environments
            that share data must share this seed.

    Raises:
        ConfigError: the configuration cannot work.
        SimulationError: no usable OpenGL backend (raised at the first picture).
    """

    def __init__(self, config: SimConfig, make_seed: int = 0):
        tasks.validate(config)
        self.mujoco, robosuite = gl.load()
        self.config = config
        self.task = config.task
        self.instruction = config.instruction
        self.horizon = config.horizon
        self.actions = config.actions
        self.cameras = config.cameras
        self.control_freq = config.control_freq
        self._task = LiberoTask(config, make_seed) if libero_task(config.task) else RobosuiteTask(config, make_seed)
        self.sim_env = self._task.env
        for observable in self.sim_env._observables.values():
            observable.set_enabled(False)
        slim(self.sim_env)
        self.model, self.data = self.sim_env.sim.model._model, self.sim_env.sim.data._data
        tasks.check_cameras(config, self.sim_env.sim.model.camera_names)
        self._camera_ids = [self.sim_env.sim.model.camera_name2id(name) for name in self.cameras]

        self.step_index = 0
        self.success = False
        self.done = False
        self._held = 0
        self._warnings = 0
        self._task.reset(0)
        self._stepper = stepper(self.sim_env, config.fast_step)
        self._entries, self.moving = self._action_entries()
        self.action_dim = len(self._entries)
        self.proprio_dim = len(self.proprio())
        self._snapshot = Snapshot(self.sim_env, (self._read_counters, self._write_counters))
        self.state_dim = self._snapshot.size
        self.fingerprint = self._fingerprint(robosuite, make_seed)
        self._shared: SharedRenderer | None = None
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Start a new episode. The same seed gives a bit-identical initial state in every process."""
        self._task.begin(seed, self._stepper)
        # robosuite's controllers were filled before the objects were placed; make the first step read the final state,
        # so that an episode does not differ from one restored at step 0.
        for robot in self.sim_env.robots:
            for controller in robot.part_controllers.values():
                controller.new_update = True
        self.step_index = 0
        self.success = self.done = False
        self._held = 0
        self._warnings = self._warning_count()

    def proprio(self) -> np.ndarray:
        """Proprioception: (p,) float32, per arm [gripper joint positions, hand position in metres, hand quaternion (x, y, z, w)].

        World frame, as robosuite's ``gripper_qpos``, ``eef_pos`` and ``eef_quat``.
        """
        parts = []
        for robot in self.sim_env.robots:
            for arm in robot.arms:
                if robot.has_gripper[arm]:
                    parts.append(self.data.qpos[robot._ref_gripper_joint_pos_indexes[arm]])
                parts.append(self.data.site_xpos[robot.eef_site_id[arm]])
                quaternion = self.sim_env.sim.data.get_body_xquat(robot.robot_model.eef_name[arm])
                parts.append(np.roll(quaternion, -1))
        return np.concatenate(parts).astype(np.float32)

    def render(self) -> np.ndarray:
        """Render the current state from every camera: (n_cam, H, W, 3) uint8, upright."""
        return self.render_state(self.state())

    def render_state(self, state: np.ndarray) -> np.ndarray:
        """Render a stored state (S,) as :meth:`render` would have rendered it live. The running episode does not change."""
        if self._shared is None:
            self._shared = shared_renderer(self.fingerprint["model"], lambda: full_xml(self.sim_env), self.config)
        renderer = self._shared.get()
        self._snapshot.show(state, renderer.model, renderer.data)
        return renderer.draw(self._camera_ids)

    def state(self) -> np.ndarray:
        """The whole simulator state, (S,) float64: enough to continue this episode bit for bit."""
        return self._snapshot.save()

    def restore(self, state: np.ndarray) -> None:
        """Continue from a saved state (S,). The state must be from an environment of the same configuration.

        Raises:
            SimulationError: the vector has another length.
        """
        self._snapshot.restore(state)
        self._warnings = self._warning_count()

    def step(self, action: np.ndarray) -> StepResult:
        """Run one control step.

        Args:
            action: (d,); the environment clips it to [-1, 1].

        Raises:
            SimulationError: the action is not finite or has another shape, the episode is over, or the simulation broke.
                After a broken step, reset or restore before the next step.
        """
        action = self._checked(action)
        full = np.zeros(self.sim_env.action_dim)
        full[self._entries] = np.clip(action, -1.0, 1.0)

        try:
            self._stepper.advance(full)
        except (ZeroDivisionError, np.linalg.LinAlgError) as error:
            raise SimulationError(f"singular arm configuration at step {self.step_index} of {self.task}") from error
        self.step_index += 1
        self.sim_env.timestep += 1
        self.sim_env.cur_time += self.sim_env.control_timestep
        self._check_physics()
        self._held = self._held + 1 if self._task.judge(full) else 0
        self.success = self._held >= self._task.hold
        self.done = self.success or self.step_index >= self.horizon
        return StepResult(float(self.success), self.success, self.done)

    def close(self) -> None:
        """Release the simulator and the shared renderer."""
        self._shared = None
        self.sim_env.close()

    def _action_entries(self) -> tuple[np.ndarray, tuple[int, ...]]:
        """Indices of robosuite's action vector that this environment's actions fill (the other entries stay zero), and the places in an
        action (d,) that move a hand: translations, or all joints of an arm; neither rotations nor grippers."""
        entries: list[int] = []
        moving: list[int] = []
        start = 0
        for robot in self.sim_env.robots:
            for part, (first, last) in robot._action_split_indexes.items():
                if part in robot.arms:
                    if self.actions == "position":
                        last = first + 3
                    moves = last - first if self.config.controller.startswith("JOINT_") else 3
                    moving += range(len(entries), len(entries) + moves)
                entries += range(start + first, start + last)
            start += robot.action_dim
        return np.array(entries), tuple(moving)

    def _read_counters(self) -> np.ndarray:
        return np.array([self.step_index, self._held, self.success, self.done], np.float64)

    def _write_counters(self, values: np.ndarray) -> None:
        self.step_index, self._held = int(values[0]), int(values[1])
        self.success, self.done = bool(values[2]), bool(values[3])

    def _warning_count(self) -> int:
        return int(self.data.warning.number.sum())

    def _check_physics(self) -> None:
        """Raise SimulationError for a broken state. MuJoCo itself only counts a warning and continues from a reset state."""
        if self._warning_count() != self._warnings or not np.isfinite(self.data.qpos).all():
            names = [
                str(self.mujoco.mjtWarning(i)).rsplit("_", 1)[-1]
                for i, warning in enumerate(self.data.warning)
                if warning.number
            ]
            raise SimulationError(f"unstable physics at step {self.step_index} of {self.task} ({', '.join(names)})")

    def _fingerprint(self, robosuite: Any, make_seed: int) -> dict[str, str]:
        """Everything that a repeated episode depends on. Equal fingerprints give equal episodes and pictures.

        Episodes of earlier versions lack the entries ``robots``, ``numba``, ``gl``, ``cpu``, ``simd`` and ``platform``.
        """
        xml = re.sub(r'file="[^"]*/', 'file="', self.sim_env.model.get_xml())  # asset paths differ between machines
        return {
            "task": self.task,
            "robots": ",".join(self.config.robots),
            "robosuite": robosuite.__version__,
            "mujoco": self.mujoco.__version__,
            "numpy": np.__version__,
            "numba": numba.__version__,
            "model": hashlib.sha256(xml.encode()).hexdigest()[:16],
            "make_seed": str(make_seed),
            "stepping": self._stepper.name,
            "actions": f"{self.config.controller}/{self.actions}",
            "control_freq": str(self.config.control_freq),
            "placement": str(self.config.placement),
            "cameras": ",".join(self.cameras),
            "render": f"{self.config.image_size}px cell {self.config.mesh_cell} {RENDERED[self.config.quality]}",
            "gl": gl.choose_backend(),
            **self._task.fingerprint,
            **machine(),
        }
