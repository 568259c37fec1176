"""Builds the simulation of a configuration. Whoever needs one calls :func:`make`; which library runs it is decided here alone."""

from __future__ import annotations

from cosmos_ray.config import SimConfig
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.simulation import Simulation


def make(config: SimConfig, make_seed: int = 0) -> Simulation:
    """The simulation of ``config``, a configuration of one task; see :class:`Simulation` and, for robosuite, :class:`Environment`.

    Raises:
        ConfigError: the configuration cannot work.
    """
    return Environment(config, make_seed)
