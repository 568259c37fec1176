"""A registered gymnasium environment as one of our simulations: ``sim.task = "gym:ID"``."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from cosmos_ray.config import SimConfig
from cosmos_ray.config.tasks import GYM, RENDER
from cosmos_ray.errors import ConfigError, SimulationError
from cosmos_ray.sim import gl
from cosmos_ray.sim.gym.mujoco_state import MujocoState, numbers, runs_on_mujoco
from cosmos_ray.sim.machine import machine
from cosmos_ray.sim.simulation import Simulation, StepResult

log = logging.getLogger(__name__)

SUCCESS = ("is_success", "success")
"""What an environment's ``info`` calls success. Where it has neither, an episode succeeds that terminates with a positive reward."""
COUNTERS = 3
"""Numbers that begin every state: control steps, success, done."""
PROBED = 3
"""Control steps of the trial that shows whether a saved state continues bit for bit."""


class GymSimulation(Simulation):
    """One gymnasium environment with continuous actions, which shows pictures.

    Cameras are, by name: a picture of the observation (its key, or "observation" where the observation is one picture), a camera of
    MuJoCo's model, or "render", which is what the environment's own ``render`` shows. A picture of another size is resized.
    Proprioception is every other entry of the observation but texts, flattened, in the order of the observation space. An action is the
    flattened action space, a box or a dictionary of boxes.

    States are restorable where the environment runs on MuJoCo and a trial of some steps continues bit for bit; else :attr:`restorable` is
    False and the state is three counters. The environment's own time limit holds, and :attr:`horizon` where that is shorter.

    Args:
        config: the task ``gym:ID`` or ``gym:MODULE:ID``, cameras and picture size. Settings of robosuite do not act.

    Raises:
        ConfigError: the environment cannot be built, or has no continuous actions or no such camera.
    """

    def __init__(self, config: SimConfig):
        gymnasium = load(config.task)
        self.config, self.task, self.instruction = config, config.task, config.instruction
        self.horizon, self.cameras = config.horizon, config.cameras
        self.gym_env = _make(gymnasium, config)
        self.moving = ()
        self.control_freq = round(float(self.gym_env.metadata.get("render_fps") or config.control_freq))
        self._spaces = gymnasium.spaces
        self._limit = gymnasium.spec(_id(config.task)).max_episode_steps or sys.maxsize
        self._low, self._high = _action_bounds(self.gym_env.action_space, gymnasium, self.task)
        self.action_dim = self._low.size
        self._parts = _parts(self.gym_env.observation_space, gymnasium)
        self._pictures = {name for name, space in self._parts.items() if _is_picture(space)}
        self._felt_parts = {name: space for name, space in self._parts.items()
                            if name not in self._pictures and not isinstance(space, gymnasium.spaces.Text)}
        self._model_cameras = _check_cameras(config, self._pictures, self.gym_env)
        self.observation: Any = None  #: the last one, as the environment gave it
        self.step_index, self.success, self.done = 0, False, False
        self._physics: MujocoState | None = None
        self.reset(0)
        self.proprio_dim = len(self.proprio())
        self._physics = self._tried()
        self.restorable = self._physics is not None
        self.reset(0)
        self.state_dim = len(self.state())
        self.fingerprint = self._fingerprint(gymnasium)

    def reset(self, seed: int) -> None:
        self.observation, _ = self.gym_env.reset(seed=seed)
        self._felt = self._proprio()
        self.step_index, self.success, self.done = 0, False, False

    def proprio(self) -> np.ndarray:
        return self._felt.copy()

    def render(self) -> np.ndarray:
        # Drawing may move what an environment reads in its next step, and what it shows may lag behind: a picture is of a restored state.
        return self.render_state(self.state()) if self.restorable else self._draw()

    def render_state(self, state: np.ndarray) -> np.ndarray:
        now = self.state()
        self.restore(state)
        try:
            return self._draw()
        finally:
            self.restore(now)

    def state(self) -> np.ndarray:
        counters = np.array([self.step_index, self.success, self.done], np.float64)
        return np.concatenate([counters, self._felt, self._physics.save()]) if self._physics else counters

    def restore(self, state: np.ndarray) -> None:
        if self._physics is None:
            raise SimulationError(f"{self.task} has no state that can be restored: begin its episode again by its seed")
        state = np.asarray(state, np.float64)
        if (size := COUNTERS + len(self._felt) + self._physics.size) != len(state):
            raise SimulationError(f"simulator state has {len(state)} numbers, {self.task} has {size} here: it was saved by another task or "
                                  "version")
        self.step_index, self.success, self.done = int(state[0]), bool(state[1]), bool(state[2])
        self._felt = state[COUNTERS : COUNTERS + len(self._felt)].astype(np.float32)
        self._physics.restore(state[COUNTERS + len(self._felt) :])

    def step(self, action: np.ndarray) -> StepResult:
        action = self._checked(action)
        reward, terminated, truncated, info = self._advance(action)
        said = [info[name] for name in SUCCESS if name in info]
        self.success = bool(said[0]) if said else bool(terminated and reward > 0)
        self.done = self.success or bool(terminated or truncated) or self.step_index >= min(self.horizon, self._limit)
        return StepResult(float(self.success), self.success, self.done)

    def close(self) -> None:
        for viewer in self._viewers():  # gymnasium would free its buffers later, in whatever OpenGL context is the current one then
            viewer.make_context_current()
            viewer.con.free()
        self.gym_env.close()

    def _advance(self, action: np.ndarray) -> tuple[float, bool, bool, dict[str, Any]]:
        """One step of the environment with an action (d,) in [-1, 1]."""
        scaled = self._low + (np.clip(action, -1.0, 1.0) + 1.0) * 0.5 * (self._high - self._low)
        plain = np.where((self._low == -1.0) & (self._high == 1.0), np.clip(action, -1.0, 1.0), scaled)  # not rounded where they are ours
        try:
            given = self._spaces.unflatten(self.gym_env.action_space, plain)
            self.observation, reward, terminated, truncated, info = self.gym_env.step(given)
        except (ArithmeticError, ValueError, RuntimeError, np.linalg.LinAlgError) as error:
            raise SimulationError(f"{self.task} broke at step {self.step_index}: {type(error).__name__}: {str(error)[:200]}") from error
        self._felt = self._proprio()
        if not np.isfinite(self._felt).all():
            raise SimulationError(f"an observation of {self.task} is not finite at step {self.step_index}")
        self.step_index += 1
        return float(reward), terminated, truncated, info

    def _proprio(self) -> np.ndarray:
        felt = [self._spaces.flatten(space, self._entry(name)).ravel() for name, space in self._felt_parts.items()]
        return np.concatenate(felt).astype(np.float32) if felt else np.zeros(1, np.float32)

    def _entry(self, name: str) -> Any:
        return self.observation[name] if isinstance(self.observation, dict) else self.observation

    def _draw(self) -> np.ndarray:
        size = self.config.image_size
        renderer = getattr(self.gym_env.unwrapped, "mujoco_renderer", None)
        pictures = []
        for camera in self.cameras:
            if camera in self._pictures:
                picture = self._entry(camera)
            else:
                for viewer in self._viewers():  # another environment of this process may have drawn since
                    viewer.make_context_current()
                if renderer is not None:
                    renderer.camera_id = self._model_cameras.get(camera, -1)
                picture = self.gym_env.render()
            picture = np.asarray(picture)
            if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
                raise SimulationError(f"camera {camera!r} of {self.task} shows {picture.dtype} {picture.shape}, not (H, W, 3) uint8")
            if picture.shape[:2] != (size, size):
                picture = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
            pictures.append(picture)
        return np.stack(pictures)

    def _viewers(self) -> list[Any]:
        """What gymnasium draws MuJoCo's scenes with; each has an OpenGL context of its own."""
        return list(getattr(getattr(self.gym_env.unwrapped, "mujoco_renderer", None), "_viewers", {}).values())

    def _tried(self) -> MujocoState | None:
        """What saves and restores the environment; None where nothing does, as a trial shows. ConfigError when a seed does not decide an
        episode."""
        actions = np.random.default_rng(0).uniform(-1, 1, (2 * PROBED, self.action_dim)).astype(np.float32)

        def episode(seed: int, steps: int) -> list[np.ndarray]:
            self.reset(seed)
            return [self._felt, *self._steps(actions[:steps])]

        if not _equal(episode(0, PROBED), episode(0, PROBED)):
            raise ConfigError(f"{self.task} begins or goes on differently from the same seed: nothing that this package measures would be "
                              "repeatable; take another environment (sim.task)")
        inner = self.gym_env.unwrapped
        if not runs_on_mujoco(inner) or any(camera in self._pictures for camera in self.cameras):
            return None  # a picture of an observation is made by a step, not by a state
        before = numbers(inner)
        episode(1, PROBED - 1)
        physics = MujocoState(inner, before)
        episode(0, PROBED)
        saved = physics.save()
        went_on = [*self._steps(actions[PROBED:]), physics.save()]
        episode(1, PROBED - 1)
        physics.restore(saved)
        again = [*self._steps(actions[PROBED:]), physics.save()]
        if not _equal(went_on, again):
            log.warning("%s has a state of its own that this package does not know: its episodes cannot be restored", self.task)
            return None
        return physics

    def _steps(self, actions: np.ndarray) -> list[np.ndarray]:
        felt = []
        for action in actions:
            self._advance(action)
            felt.append(self._felt)
        return felt

    def _fingerprint(self, gymnasium: ModuleType) -> dict[str, str]:
        """As :attr:`Environment.fingerprint <cosmos_ray.sim.environment.Environment.fingerprint>`, of what decides an episode here."""
        package = type(self.gym_env.unwrapped).__module__.partition(".")[0]
        known = importlib.metadata.packages_distributions()
        versions = {name: importlib.metadata.version(known[name][0]) for name in ("mujoco", package) if name in known}
        return {
            "task": self.task,
            "gymnasium": gymnasium.__version__,
            **versions,
            "numpy": np.__version__,
            "make_seed": "0",
            "state": "mujoco" if self.restorable else "none",
            "control_freq": str(self.control_freq),
            "cameras": ",".join(self.cameras),
            "render": f"{self.config.image_size}px",
            "gl": os.environ.get("MUJOCO_GL", ""),
            **machine(),
        }


def load(task: str) -> ModuleType:
    """gymnasium, with the environment of ``task`` registered. ConfigError where it is not installed or knows no such environment."""
    gl.choose_backend()  # libraries on MuJoCo read the variable at import
    try:
        import gymnasium
    except ImportError as error:
        raise ConfigError(f"sim.task {task} needs gymnasium: install the extra, pip install 'cosmos-ray[gym]'") from error
    module, _, name = task.removeprefix(GYM).rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        gymnasium.spec(name)
    except ImportError as error:
        raise ConfigError(f"sim.task {task}: module {module} cannot be imported ({error}); install the package that registers "
                          f"{name}") from error
    except gymnasium.error.Error as error:
        said = str(error).partition("\n")[0].rstrip(".")
        more = "" if module else f"; name the module that registers the environment too: {GYM}MODULE:{name}"
        raise ConfigError(f"sim.task {task}: {said}{more}") from error
    return gymnasium


def _id(task: str) -> str:
    return task.removeprefix(GYM).rpartition(":")[2]


def _make(gymnasium: ModuleType, config: SimConfig) -> Any:
    """The environment, drawing pictures of our size where it lets itself be told."""
    name = _id(config.task)
    entry = gymnasium.spec(name).entry_point
    modes = getattr(gymnasium.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry, "metadata", {})
    drawn = {"render_mode": "rgb_array"} if "rgb_array" in modes.get("render_modes", ()) else {}
    refused: TypeError | None = None
    for arguments in ({**drawn, "width": config.image_size, "height": config.image_size}, drawn, {}):
        try:
            return gymnasium.make(name, max_episode_steps=-1, disable_env_checker=True, **arguments)
        except TypeError as error:  # has no such argument
            refused = error
        except (gymnasium.error.Error, ImportError, OSError) as error:
            raise ConfigError(f"sim.task {config.task} cannot be built: {error}") from error
    raise ConfigError(f"sim.task {config.task} cannot be built: {refused}")


def _action_bounds(space: Any, gymnasium: ModuleType, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest action, (d,) float64 each."""
    parts = space.spaces.values() if isinstance(space, gymnasium.spaces.Dict) else [space]
    if not all(isinstance(part, gymnasium.spaces.Box) for part in parts):
        raise ConfigError(f"{task} has the actions {space}: a policy of this package gives a vector of real numbers")
    flat = gymnasium.spaces.flatten_space(space)
    low, high = flat.low.astype(np.float64), flat.high.astype(np.float64)
    if not np.isfinite([low, high]).all():
        raise ConfigError(f"{task} has actions without bounds: wrap it in gymnasium.wrappers.RescaleAction and register that")
    return low, high


def _parts(space: Any, gymnasium: ModuleType) -> dict[str, Any]:
    return dict(space.spaces) if isinstance(space, gymnasium.spaces.Dict) else {"observation": space}


def _is_picture(space: Any) -> bool:
    shape = getattr(space, "shape", None)
    return shape is not None and len(shape) == 3 and shape[2] == 3 and space.dtype == np.uint8


def _check_cameras(config: SimConfig, pictures: set[str], env: Any) -> dict[str, int]:
    """Number of each camera of MuJoCo's model, by name. ConfigError where the configuration has a camera that is not there."""
    inner, named, drawn = env.unwrapped, dict[str, int](), list[str]()
    if env.render_mode == "rgb_array":
        if runs_on_mujoco(inner) and hasattr(inner, "mujoco_renderer"):
            named = {inner.model.camera(i).name: i for i in range(inner.model.ncam)}
        drawn = [RENDER, *named]
    known = [*pictures, *drawn]
    for camera in config.cameras:
        if camera not in known:
            raise ConfigError(f"{config.task} has no camera {camera!r} (sim.wrist_cameras, sim.third_cameras); it has "
                              f"{', '.join(known) or 'none, so no policy can see it'}")
    return named


def _equal(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return len(left) == len(right) and all(a.tobytes() == b.tobytes() for a, b in zip(left, right, strict=True))
