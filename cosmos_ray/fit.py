"""Whether a policy, a simulation, stored demonstrations and the network's settings go together: one line that says both sides, before
anything runs."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

from cosmos_ray.config import RunConfig, SimConfig
from cosmos_ray.config.suites import SUITES
from cosmos_ray.embodiment import Embodiment, third_person
from cosmos_ray.errors import ConfigError
from cosmos_ray.model.checkpoint import read_description
from cosmos_ray.model.exchange.text_embeddings import read_text_embeddings
from cosmos_ray.model.spec import make_spec
from cosmos_ray.sim.embodiment import simulated


def check_simulates(config: RunConfig) -> None:
    """ConfigError for a run without a simulation."""
    if not config.sim.names:
        raise ConfigError(f"run {config.name!r} has no simulation, for neither its settings nor its demonstrations name a robosuite "
                          "task that fits: give --sim.task or --sim.suite, and --sim.robots, --sim.controller, --sim.actions, "
                          "--sim.wrist-cameras and "
                          "--sim.third-cameras where they are not the task's")


def check_fits(whose: str, theirs: Embodiment, sim: SimConfig) -> Embodiment:
    """The embodiment of the simulation, under the names that ``theirs`` has for its cameras.

    ConfigError, which names both sizes, when ``whose`` (the policy, the demonstrations) embodiment differs.
    """
    ours = simulated(sim)
    robots = f" with {' and '.join(sim.robots)} under {sim.controller}, sim.actions {sim.actions}" if sim.robots else ""
    arms = f"({sim.title}{robots})"
    refuse_misfit(whose, theirs, "cannot be used in a simulation of", ours, f"{arms}: change sim.* to the robot, controller, action space, "
                  f"cameras and rate of {whose}, or take other ones")
    return dataclasses.replace(ours, cameras=theirs.cameras)


def refuse_misfit(whose: str, theirs: Embodiment, cannot: str, ours: Embodiment, rest: str) -> None:
    """ConfigError "``whose`` of SIZES ``cannot`` SIZES ``rest``" when the two embodiments differ."""
    if differing := theirs.misfit(ours):
        known, given = (_sizes(differing, side) for side in (1, 2))
        raise ConfigError(f"{whose} of {known} {cannot} {given} {rest}")


def check_suite(config: RunConfig, cameras: tuple[str, ...], simulated: bool = False) -> None:
    """ConfigError when the suite has other wrist and third-person cameras than these, which go into its slots in their order.

    The cameras are of demonstrations, or ``simulated``.
    """
    suite = SUITES.get(config.model.suite)
    if suite and [third_person(camera) for camera in cameras] != [third_person(camera) for camera in suite.cameras]:
        suited, names = f"suite {config.model.suite!r}", ", ".join(cameras)
        wanted = ", ".join(suite.cameras)
        if simulated:
            raise ConfigError(f"{suited} sees the cameras {wanted}, in this order, and the simulation has {names}: give "
                              "--sim.wrist-cameras and --sim.third-cameras, as many of each, or another --model.suite")
        raise ConfigError(f"{suited} sees the cameras {wanted}, in this order, and the demonstrations have {names}: import "
                          "them with --rename-camera OLD=NEW (the name of a wrist camera contains 'wrist') or --cameras, or give another "
                          "--model.suite")


def check_chunk(config: RunConfig, body: Embodiment) -> None:
    """ConfigError when the numbers of an action chunk do not fit into the latent frame that carries them."""
    spec = make_spec(config.model, body.cameras, body.action_dim, body.proprio_dim)
    numbers, room = config.model.chunk * body.action_dim, math.prod(spec.frame_shape)
    if numbers > room:
        raise ConfigError(f"model.chunk = {config.model.chunk} actions of {body.action_dim} numbers do not fit a latent frame of {room}: "
                          "shorten the chunk or enlarge model.image_size")


def check_acts(checkpoint: str | Path, config: RunConfig) -> None:
    """ConfigError when the policy in ``checkpoint`` cannot act in the run's simulation, or is not told what it knows."""
    check_simulates(config)
    spec = read_description(checkpoint)[0]
    check_fits("the policy", spec.embodiment, config.sim)
    file = Path(checkpoint) / "text.safetensors"
    if file.exists() and not os.path.isdir(spec.text_path):
        known = list(read_text_embeddings(file))
        if missing := [sim.instruction for sim in config.sim.each() if sim.instruction not in known]:
            raise ConfigError(f"the policy has no text embedding of {missing[0]!r}, only of {len(known)}, such as {known[0]!r}: "
                              "import or pretrain it with a T5 directory as model.text_path, or take another task or sim.instruction")


def _sizes(differing: list[tuple[str, str, str]], side: int) -> str:
    return " and ".join(f"{entry[0]} {entry[side]}" if entry[0] == "cameras" else f"{entry[side]} {entry[0]}" for entry in differing)
