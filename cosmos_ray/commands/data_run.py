"""The run that `replay import` makes, or adds to: its settings come from the command line and from the first episode."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from cosmos_ray.commands.configure import configure
from cosmos_ray.config import RunConfig
from cosmos_ray.config.settings import SETTINGS, with_absolute_paths
from cosmos_ray.config.stored import store_of, stored_config
from cosmos_ray.config.tasks import task_instruction
from cosmos_ray.embodiment import third_person
from cosmos_ray.errors import ConfigError
from cosmos_ray.fit import check_chunk, check_fits, check_suite
from cosmos_ray.replay.format.codec import decode_jpeg
from cosmos_ray.replay.format.episode import Episode
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.run import open_run, validate
from cosmos_ray.sim.recorded_simulation import ENV_ARGS, recorded_simulation, with_cameras
from cosmos_ray.use import Use


class DataRun:
    """The run of ``options``: found, or made when the first episode of an import is known."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.notes: list[str] = []
        self.config = self._configured({"sim.task": ""})
        self.found = stored_config(self.config) is not None
        if not self.found:
            validate(self.config)
        elif options.config or any(getattr(options, name) is not None for name in SETTINGS if name not in ("name", "root")):
            with open_run(self.config, Use(creates=False, needs_ray=False)):
                pass  # refuses what does not go with the run, and keeps what does

    @property
    def store(self) -> str:
        return store_of(self.config)

    def accept(self, episode: Episode) -> None:
        """Hold the first episode against the run, which is made with it. ConfigError, and no run, when they do not go together."""
        config, body = self.config, episode.embodiment
        if not self.found:
            config = self._with_simulation(episode)
            check_suite(config, body.cameras)
            check_chunk(config, body)
        if config.sim.task:
            check_fits("the demonstrations", body, config.sim)
        if not self.found:
            ReplayStore(self.store)  # which may fail, so it comes before the run
            with open_run(config, Use(needs_ray=False)):
                self.config, self.found = config, True

    def text(self) -> str:
        """Lines for the user: the run's simulation, and what comes next."""
        sim = self.config.sim
        if sim.task:
            lines = [f"  simulation of run {self.config.name}: {sim.task} with {' and '.join(sim.robots)} under {sim.controller}, told "
                     f"{sim.instruction!r}"]
        else:
            lines = [f"  run {self.config.name} has no simulation: `pretrain` and `export` work; --sim.task gives it one"]
        return "\n".join([*(f"  note: {note}" for note in self.notes), *lines])

    def _configured(self, usual: dict[str, Any]) -> RunConfig:
        return with_absolute_paths(configure(self.options, usual))

    def _with_simulation(self, episode: Episode) -> RunConfig:
        """The settings with the simulation that the user names, else with the one that the episode names and that fits it."""
        values = recorded_simulation(episode.info)
        if self.config.sim.task:
            return _told(self.config, episode.instruction)
        if not values or getattr(self.options, "sim.task") is not None:
            return self.config
        wrist = tuple(camera for camera in episode.cameras if not third_person(camera))
        if episode.embodiment.action_dim == 4 * len(values.get("sim.robots", ("Panda",))):  # what says the controller does not say this
            values["sim.actions"] = "position"
        height, width = decode_jpeg(next(iter(episode.frames.values()))[0]).shape[:2]
        if height == width:
            values["sim.image_size"] = height
        try:
            config = _told(self._configured(with_cameras(values, episode.cameras, wrist)), episode.instruction)
            validate(config)
            check_fits("the demonstrations", episode.embodiment, config.sim)
        except ConfigError as error:
            self.notes.append(f"the files name the robosuite task {values['sim.task']}, and it is not simulated here: {error}")
            return self.config
        if "sim.controller" not in values:
            self.notes.append(f"the files name no controller: {config.sim.controller} with actions of {config.sim.actions} is taken; "
                              "--sim.controller and --sim.actions give another one")
        if ENV_ARGS in episode.info and config.sim.quality == "fast" and not getattr(self.options, "render", False):
            self.notes.append("pictures of robosuite's own renderer are not those of a simulation of sim.quality fast: --sim.quality full "
                              "simulates in theirs, and more slowly")
        return config


def _told(config: RunConfig, instruction: str) -> RunConfig:
    """``config`` with the instruction of the data where it has the task's own."""
    if config.sim.instruction != task_instruction(config.sim.task):
        return config
    return dataclasses.replace(config, sim=dataclasses.replace(config.sim, instruction=instruction))
