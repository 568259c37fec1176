"""One of our simulations as a ``gymnasium.Env``."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from cosmos_ray.config import SimConfig, check_ranges
from cosmos_ray.errors import SimulationError
from cosmos_ray.seeds import SPAN, state_seed
from cosmos_ray.sim.make import make

PROPRIO = "proprio"


class OfferedEnv(gymnasium.Env):
    """Pictures and proprioception in, one control step out; the same simulation that rollouts and evaluations run.

    An observation is ``{camera: (H, W, 3) uint8, ..., "proprio": (p,) float32}``; an action is (d,) float32 in [-1, 1]. The reward is 1.0
    on the step that completes the task, else 0.0. ``terminated`` is success, ``truncated`` the time limit (``horizon``) or a simulation
    that broke; ``info`` has ``is_success``, the ``seed`` of the initial state after a reset, and ``invalid``, the reason, after a break.
    The same seed gives the same initial state, bit for bit; a reset without one draws a seed. The states of evaluations are held out: only
    ``reset(options={"evaluation": INDEX})`` begins in one (LIBERO: in its published state of this index). ``render`` shows all cameras side
    by side.

    Args:
        render_mode: "rgb_array" or None.
        settings: fields of :class:`SimConfig <cosmos_ray.config.SimConfig>`, such as ``task``, ``image_size`` or ``third_cameras``.

    Raises:
        ConfigError: the settings cannot work.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, render_mode: str | None = None, **settings: Any):
        config = SimConfig(**settings)
        check_ranges(config, "sim.")
        config.check()
        self.simulation = make(config)
        self.render_mode = render_mode
        self.metadata = {**type(self).metadata, "render_fps": self.simulation.control_freq}
        size, box = config.image_size, gymnasium.spaces.Box
        pictures = {camera: box(0, 255, (size, size, 3), np.uint8) for camera in config.cameras}
        proprio = box(-np.inf, np.inf, (self.simulation.proprio_dim,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({**pictures, PROPRIO: proprio})
        self.action_space = box(-1.0, 1.0, (self.simulation.action_dim,), np.float32)
        self._closed = False
        self._pictures = np.zeros((len(config.cameras), size, size, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        held_out = (options or {}).get("evaluation")
        if held_out is not None:
            state = state_seed("eval", 0, int(held_out))
        else:
            state = state_seed("demo", 0, (int(self.np_random.integers(SPAN)) if seed is None else seed) % SPAN)
        self.simulation.reset(state)
        return self._observed(), {"is_success": False, "seed": state}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        try:
            result = self.simulation.step(action)
        except SimulationError as error:
            if self.simulation.done or not self.action_space.contains(np.asarray(action, np.float32)):
                raise  # the caller's mistake
            return self._observed(), 0.0, False, True, {"is_success": False, "invalid": str(error)}
        return self._observed(), result.reward, result.success, result.done and not result.success, {"is_success": result.success}

    def render(self) -> np.ndarray | None:
        return np.concatenate(list(self._pictures), axis=1) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        if not self._closed:
            self.simulation.close()
        self._closed = True

    def _observed(self) -> dict[str, np.ndarray]:
        self._pictures = self.simulation.render()
        return {**dict(zip(self.simulation.cameras, self._pictures.copy(), strict=True)), PROPRIO: self.simulation.proprio()}
