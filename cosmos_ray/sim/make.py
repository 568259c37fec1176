"""Builds the simulation of a configuration. Which library runs it is decided here alone, by the name of the task."""

from __future__ import annotations

from cosmos_ray.config import SimConfig
from cosmos_ray.config.tasks import GYM
from cosmos_ray.sim import tasks
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.simulation import Simulation


def make(config: SimConfig, make_seed: int = 0) -> Simulation:
    """The simulation of ``config``, a configuration of one task. ``make_seed`` is for :class:`Environment` alone.

    Raises:
        ConfigError: the configuration cannot work.
    """
    if config.task.startswith(GYM):
        from cosmos_ray.sim.gym.foreign import GymSimulation

        return GymSimulation(config)
    return Environment(config, make_seed)


def load(task: str) -> None:
    """Import what registers ``task`` in this process, so that stored episodes of it can be simulated. Does nothing for robosuite's.

    Raises:
        ConfigError: there is no such environment.
    """
    if task.startswith(GYM):
        from cosmos_ray.sim.gym.foreign import load

        load(task)


def validate(config: SimConfig) -> None:
    """Check a configuration without building its simulation: seconds, nearly all of them importing the library.

    Raises:
        ConfigError: one line that names the bad setting and what would work.
    """
    if config.task.startswith(GYM):
        load(config.task)
    else:
        tasks.validate(config)
