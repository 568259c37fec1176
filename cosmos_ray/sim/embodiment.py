"""The embodiment of a simulation, read from the simulation itself."""

from __future__ import annotations

import dataclasses
import functools

from cosmos_ray.config import SimConfig
from cosmos_ray.config.libero import libero_task
from cosmos_ray.config.tasks import GYM
from cosmos_ray.embodiment import Embodiment
from cosmos_ray.sim.make import make


def simulated(config: SimConfig) -> Embodiment:
    """What a policy sees and moves in the simulation of ``config``, in the first task of several: a suite's tasks have one robot.

    Robots, grippers, task and controller decide the sizes together (a task may exchange the gripper), so they are read from an environment
    that is built once per process and never rendered: one to two seconds, later calls nothing.

    Raises:
        ConfigError: the configuration cannot work.
    """
    config = config.each()[0]
    if libero_task(config.task):  # one robot and one controller, so that no environment need be built
        return Embodiment(config.cameras, 4 if config.actions == "position" else 7, 9, config.control_freq, moving=(0, 1, 2))
    decisive = dataclasses.replace(config, instruction="", image_size=64, horizon=1, control_freq=20, placement=0.0, fast_step=False)
    found = dataclasses.replace(_built(decisive), cameras=config.cameras, quality=config.quality)
    return found if config.task.startswith(GYM) else dataclasses.replace(found, control_freq=config.control_freq)


@functools.cache
def _built(config: SimConfig) -> Embodiment:
    environment = make(config)
    try:
        return Embodiment(config.cameras, environment.action_dim, environment.proprio_dim, environment.control_freq, environment.moving)
    finally:
        environment.close()
