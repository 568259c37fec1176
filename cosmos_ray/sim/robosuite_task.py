"""A task of robosuite: how its environment is made, reset and judged."""

from __future__ import annotations

from typing import Any

import numpy as np

from cosmos_ray.config import SimConfig
from cosmos_ray.sim import gl

SUCCESS_HOLD = 3
"""The task's success check must hold on this many consecutive control steps before the episode counts as a success."""


class RobosuiteTask:
    """``env`` is robosuite's environment. ``make_seed`` seeds the random choices while robosuite builds the model."""

    hold = SUCCESS_HOLD

    def __init__(self, config: SimConfig, make_seed: int):
        mujoco, robosuite = gl.load()
        self.kinematics = mujoco.mj_kinematics
        self.env: Any = robosuite.make(
            config.task, robots=list(config.robots), controller_configs=controllers(config), has_renderer=False,
            has_offscreen_renderer=False, use_camera_obs=False, control_freq=config.control_freq, horizon=10**6,
            ignore_done=True, hard_reset=False, seed=make_seed,
        )  # fmt: skip
        if config.placement > 0:
            _widen(self.env.placement_initializer, config.placement, bool(getattr(self.env, "single_object_mode", 0)))

    @property
    def fingerprint(self) -> dict[str, str]:
        """What episodes depend on besides the settings and the model."""
        return {}

    def reset(self, seed: int) -> None:
        """A fresh initial state, which depends on ``seed`` alone."""
        reseed(self.env, seed)
        self.env.reset()

    def begin(self, seed: int, stepper: Any) -> None:
        """Reset, and take the steps that come before an episode's first: none here."""
        self.reset(seed)

    def judge(self, action: np.ndarray) -> bool:
        """Whether the task's success check holds after a control step of ``action``, robosuite's full vector. Once per step: tasks keep
        their books in it."""
        self.bring_up()
        self.env._post_action(action)  # some tasks keep their books in the reward function
        return bool(self.env._check_success())

    def bring_up(self) -> None:
        """Integration leaves positions of bodies one substep behind the joints; bring them up, as a restored state has them."""
        self.kinematics(self.env.sim.model._model, self.env.sim.data._data)


def reseed(env: Any, seed: int) -> None:
    """Start the random generator of a robosuite ``env`` anew: in place, because the placement samplers hold this very generator."""
    env.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state


def controllers(config: SimConfig) -> list[dict]:
    """robosuite's default controller of each robot, with the arms' part controller exchanged where configured."""
    from robosuite.controllers import load_composite_controller_config, load_part_controller_config

    loaded = []
    for robot in config.robots:
        composite = load_composite_controller_config(robot=robot)
        for part in ("right", "left"):
            arm = composite["body_parts"].get(part)
            if arm is not None and arm["type"] != config.controller:
                chosen = load_part_controller_config(default_controller=config.controller)
                composite["body_parts"][part] = {**chosen, "gripper": arm["gripper"]}
        loaded.append(composite)
    return loaded


def _widen(sampler: Any, half_width: float, alone: bool) -> None:
    """Set the half-width of every range that ``sampler`` draws from, keeping its centre.

    ``alone``: only one of the objects stays in the scene once all are placed, so that they need not fit beside each other.
    """
    for part in getattr(sampler, "samplers", {}).values():
        _widen(part, half_width, alone)
    if alone:
        sampler.ensure_valid_placement = False
    for name in ("x_range", "y_range"):
        low, high = getattr(sampler, name, (0.0, 0.0))
        if high > low:
            centre = (low + high) / 2
            setattr(sampler, name, [centre - half_width, centre + half_width])
            sampler.ensure_object_boundary_in_range = False  # the range is of the object's middle
