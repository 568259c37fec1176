"""An open run: its config, folder, tracker and Ray, handed to every stage."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import ray

from cosmos_ray import released
from cosmos_ray.asks import check_cluster, check_own_gpu, more_actors_ask, pool_ask
from cosmos_ray.bucket_run import fetch_settings
from cosmos_ray.config import RunConfig, SimConfig, check
from cosmos_ray.config.run import check_plain
from cosmos_ray.config.stored import stored_config
from cosmos_ray.connection import connect
from cosmos_ray.diagnosis.pulse import Pulse, pulse_file
from cosmos_ray.errors import ConfigError, CosmosRayError
from cosmos_ray.fit import check_acts, check_chunk, check_fits, check_simulates, check_suite
from cosmos_ray.folder import RunFolder
from cosmos_ray.inference.pool import InferencePool
from cosmos_ray.model.exchange.files import recover
from cosmos_ray.model.spec import make_spec
from cosmos_ray.model.tokenizer import PATCH
from cosmos_ray.placement import Placement, autoscales, cluster_nodes
from cosmos_ray.progress import Progress, say
from cosmos_ray.quarantine import Quarantine
from cosmos_ray.reach import Reach
from cosmos_ray.replay.sampling.demonstrated import demonstrated
from cosmos_ray.rollout.ticket import demonstrations
from cosmos_ray.seeds import SPAN
from cosmos_ray.sim import make as simulation
from cosmos_ray.sim.embodiment import simulated
from cosmos_ray.sim.experts import check_expert
from cosmos_ray.supervision import Supervisor
from cosmos_ray.tracking import Tracker
from cosmos_ray.use import Use

logger = logging.getLogger(__name__)

PATIENCE_S = 3.0  #: that short work may take without a progress line


@dataclass
class Run:
    """What a stage works with."""

    config: RunConfig
    folder: RunFolder
    tracker: Tracker
    quiet: bool = False  #: no progress lines
    supervisor: Supervisor = field(init=False)  #: says and records what dies and what waits
    placement: Placement = field(init=False)  #: where the run's processes are
    quarantine: Quarantine = field(init=False)  #: initial states that no episode begins in any more

    def __post_init__(self) -> None:
        self.supervisor, self.quarantine = Supervisor(self.tracker.log), Quarantine(self.folder)
        self.placement = Placement(self.supervisor)

    def progress(self, what: str, total: int, done: int = 0, unit: str = "") -> Progress:
        """A progress line, silent when the run is quiet."""
        progress = Progress(what, total, done, unit, quiet=self.quiet)
        self.supervisor.shows("progress", lambda: [progress.state()])
        return progress

    def counter(self, what: str, unit: str) -> Callable[[int, int], None]:
        """A progress line for functions that report (done, total); none where all is done before the line is due."""
        begun: list[Progress] = []
        began = time.monotonic()

        def show(done: int, total: int) -> None:
            if not begun and time.monotonic() - began > PATIENCE_S:
                begun.append(self.progress(what, total, done, unit))  # the rate counts from here
            if begun:
                (begun[0].finish if done >= total else begun[0].update)(done)

        return show

    def goes_on(self, what: str, round: int, state: str, step: int, total: int, more: str = "") -> None:
        """Say and record that training ``what`` ("refine") goes on from ``step`` of learner ``state``: what was logged of later steps
        counts no more. Says too which settings and packages are others than before. Does nothing where nothing was trained before."""
        if not step and self.folder.manifest.point(state, step) is None:
            return
        version = self.folder.manifest.read().get("version", 0)
        say(f"{self.of_round(what, round)} goes on from step {step} of {total} (policy version {version}{more})", self.quiet)
        for line in self.folder.manifest.differences():
            logger.warning("%s goes on %s", self.of_round(what, round), line)
        self.tracker.log("resume", what=what, round=round, step=step)

    def of_round(self, what: str, number: int) -> str:
        """``what`` as a progress line names it, with the number of its round where there are several."""
        return what if self.config.rounds == 1 else f"{what} {number}/{self.config.rounds}"

    def simulating(self, sim: SimConfig) -> Run:
        """This run with another simulation, which its folder does not keep."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, sim=sim)
        return other

    def check_policy(self, checkpoint: str | Path) -> None:
        """ConfigError when the policy of ``checkpoint`` cannot act in this simulation, or judge what acts there."""
        check_acts(checkpoint, self.config)

    def pool(self, checkpoint: str | Path) -> InferencePool:
        """An inference pool, which starts from a checkpoint. ConfigError as for :meth:`check_policy`."""
        self.check_policy(checkpoint)
        self.folder.publish()  # actors on other machines read it
        inference = self.config.inference
        more = partial(self.placement.crew, more_actors_ask(self.config)) if inference.max_actors > inference.actors else None
        return InferencePool(checkpoint, inference, self.placement.options(pool_ask(self.config)), self.supervisor,
                             dict.fromkeys(sim.instruction for sim in self.config.sim.each()), more)


def validate(config: RunConfig) -> None:
    """Everything that can be wrong with a config, found before any process starts. Raises ConfigError."""
    check(config)
    for sim in config.sim.each():
        simulation.validate(sim)
    rollouts = config.rounds * (config.rollouts + config.refine_rollouts)
    if rollouts > SPAN:
        raise ConfigError(f"rounds = {config.rounds} of rollouts = {config.rollouts} and refine_rollouts = {config.refine_rollouts} are "
                          f"more than the {SPAN} initial states of a run: lower one of them")
    _check_model(config)


def _check_model(config: RunConfig) -> None:
    """Whether the network can be built for these cameras, actions and frames, and gives what the learner asks of it."""
    size, sim = config.model.image_size, config.sim
    if size % PATCH:
        raise ConfigError(f"model.image_size = {size} is not a multiple of {PATCH}, the tokenizer's patch")
    spec = make_spec(config.model, sim.cameras, action_dim=0, proprio_dim=0)  # `check_chunk` asks for the true sizes
    height, width = spec.frame_shape[1:]
    if height % spec.transformer.patch:
        raise ConfigError(f"a latent grid of {height}x{width} (model.image_size / {PATCH}) does not divide into model.patch = "
                          f"{spec.transformer.patch}")
    if config.learner.advantage_temperature and not spec.top_share:
        raise ConfigError("learner.advantage_temperature asks for a value in one evaluation, which model.top_share trains: set it above 0 "
                          "(0.7, say), or learner.advantage_temperature to 0")
    if spec.preset != "tiny":
        for name in ("tokenizer_path", "text_path"):
            path = getattr(config.model, name)
            if not path or not os.path.exists(path):
                raise ConfigError(f"preset {spec.preset} needs model.{name}, and {released.problem(path)}")


@contextlib.contextmanager
def open_run(config: RunConfig, use: Use = Use(), *, fresh: bool = False, quiet: bool = False) -> Iterator[Run]:  # noqa: B008 - frozen
    """Validate, take the run's folder, start or join Ray; give everything back at the end, however it comes.

    ConfigError when ``use`` needs what is not there. Where the settings and the run show that, no run is made, or moved aside by ``fresh``,
    for nothing.
    """
    validate(config)
    simulates = use.simulates(config)
    fetch_settings(config.root, config.name)
    before = None if fresh else stored_config(config)
    if simulates:
        check_simulates(config)
    if use.creates and before is None:  # a run keeps sim.* and model.*, so its later commands need not look again
        check_plain(config.name)
        if use.demonstrates:
            _check_experts(config)
            check_suite(config, config.sim.cameras, simulated=True)
        if config.sim.names:
            check_chunk(config, simulated(config.sim))

    def check_store(folder: RunFolder) -> None:
        if before is not None and config.sim.names and config.sim != before.sim:  # a run of imported demonstrations gets a simulation
            check_fits("the demonstrations", demonstrated(folder.store()).embodiment, config.sim)
        for name in ("base", "refined", "planning") if simulates else ():
            if folder.has_policy(name):
                check_acts(folder.checkpoint(name), config)
        if use.demonstrates and _lacks_demonstrations(config, folder):
            _check_experts(config)

    if use.acts and not use.needs_ray:
        check_own_gpu(config)
    folder = RunFolder(config, fresh=fresh, create=use.creates, only_reads=use.only_reads, beside=use.beside,
                       check=check_store)
    tracker, pulse, connected, made = None, None, False, use.creates and before is None
    try:
        if folder.writable:
            for place in ("checkpoints", "checkpoints/rounds"):
                recover(folder.path / place)
        if use.acts and use.needs_ray and not use.creates and not any(map(folder.has_policy, ("base", "refined"))):
            raise ConfigError(f"there is no base policy in {folder.shown(folder.path / 'checkpoints')}: run `pretrain` first")
        if use.needs_ray:
            private = connect(config.address, simulates=bool(config.sim.names) and (use.acts or not use.learns))
            connected = True
            if not autoscales(nodes := cluster_nodes()):
                check_cluster(config, nodes, use.acts, use.learns, use.demonstrates or simulates, private)
        tracker = Tracker(config, folder)
        run = Run(config, folder, tracker, quiet)
        if use.needs_ray:
            pulse = Pulse(pulse_file(folder.path), run.supervisor, "" if private else ray.get_runtime_context().gcs_address)
            reach = Reach(None if folder.uri else folder.path, folder.replay, run.supervisor)
            reach.check()
            run.placement.takes = reach.takes
        try:
            yield run
        finally:
            run.placement.close()
    except CosmosRayError:
        if pulse is not None:
            pulse.close()
        if made:
            folder.unmake()
        raise
    finally:
        if pulse is not None:
            pulse.close()
        if tracker is not None:
            tracker.close()
        if connected:
            ray.shutdown()
        folder.close()


def _lacks_demonstrations(config: RunConfig, folder: RunFolder) -> bool:
    """Whether `collect` has anything to record."""
    return any(demonstrations(folder.store(), config.sim.names, config.demos)[1].values())


def _check_experts(config: RunConfig) -> None:
    for sim in config.sim.each():
        check_expert(sim)
