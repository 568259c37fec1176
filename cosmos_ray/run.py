"""An open run: its config, folder, tracker and Ray, handed to every stage."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray

from cosmos_ray.config import RunConfig, SimConfig, check
from cosmos_ray.config.stored import stored_config
from cosmos_ray.connection import connect
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.inference.pool import InferencePool
from cosmos_ray.model.checkpoint import read_description
from cosmos_ray.model.exchange.text_embeddings import read_text_embeddings
from cosmos_ray.model.spec import PolicySpec, make_spec
from cosmos_ray.model.tokenizer import PATCH
from cosmos_ray.progress import Progress
from cosmos_ray.rollout.ticket import SPAN
from cosmos_ray.sim import tasks
from cosmos_ray.sim.experts import check_expert
from cosmos_ray.tracking import Tracker


@dataclass
class Run:
    """What a stage works with."""

    config: RunConfig
    folder: RunFolder
    tracker: Tracker
    quiet: bool = False  #: no progress lines

    def progress(self, what: str, total: int, done: int = 0, unit: str = "") -> Progress:
        """A progress line, silent when the run is quiet."""
        return Progress(what, total, done, unit, quiet=self.quiet)

    def of_round(self, what: str, number: int) -> str:
        """``what`` as a progress line names it, with the number of its round where there are several."""
        return what if self.config.rounds == 1 else f"{what} {number}/{self.config.rounds}"

    @property
    def cores(self) -> int:
        """CPUs of the cluster."""
        return max(1, int(ray.cluster_resources().get("CPU", 1)))

    @property
    def node_cores(self) -> int:
        """CPUs of the largest node: threads of one process cannot use more."""
        return max([1] + [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]])

    def cpu_share(self, actors: int) -> float:
        """CPUs each of ``actors`` may reserve so that all of them can be placed, at most one."""
        return min(1.0, int(100 * self.cores / max(1, actors)) / 100)

    def pool(self, checkpoint, cpus: float) -> InferencePool:
        """Start the inference pool from a checkpoint. ConfigError when that policy cannot act in this simulation."""
        _check_fits(read_description(checkpoint)[0], self.config.sim)
        _check_instruction(Path(checkpoint), self.config)
        return InferencePool(checkpoint, self.config.inference, cpus)


def validate(config: RunConfig) -> None:
    """Everything that can be wrong with a config, found before any process starts. Raises ConfigError."""
    check(config)
    tasks.validate(config.sim)
    rollouts = config.rounds * (config.rollouts + config.refine_rollouts)
    if rollouts > SPAN:
        raise ConfigError(f"rounds = {config.rounds} of rollouts = {config.rollouts} and refine_rollouts = {config.refine_rollouts} are "
                          f"more than the {SPAN} initial states of a run: lower one of them")
    _check_model(config)


def _check_model(config: RunConfig) -> None:
    """Whether the network can be built for these cameras, actions and frames, and gives what the learner asks of it."""
    size, sim = config.sim.image_size, config.sim
    if size % PATCH:
        raise ConfigError(f"sim.image_size = {size} is not a multiple of {PATCH}, the tokenizer's patch")
    action_dim, proprio_dim = _vector_sizes(sim)
    spec = make_spec(config.model, sim.cameras, size, action_dim, proprio_dim)
    channels, height, width = spec.frame_shape
    if height % spec.transformer.patch:
        raise ConfigError(f"a latent grid of {height}x{width} (sim.image_size / {PATCH}) does not divide into model.patch = "
                          f"{spec.transformer.patch}")
    if config.model.chunk * action_dim > channels * height * width:
        raise ConfigError(f"model.chunk = {config.model.chunk} actions of {action_dim} numbers do not fit a latent frame of "
                          f"{channels * height * width}: shorten the chunk or enlarge sim.image_size")
    if config.learner.advantage_temperature and not spec.top_share:
        raise ConfigError("learner.advantage_temperature asks for a value in one evaluation, which model.top_share trains: set it above 0 "
                          "(0.7, say), or learner.advantage_temperature to 0")
    if spec.preset != "tiny":
        for name in ("tokenizer_path", "text_path"):
            path = getattr(config.model, name)
            if not path or not os.path.exists(path):
                raise ConfigError(f"preset {spec.preset} needs model.{name}, and {path!r} does not exist")


def _vector_sizes(sim: SimConfig) -> tuple[int, int]:
    """(action, proprio) dimensions of the simulation."""
    return len(sim.robots) * (4 if sim.actions == "position" else 7), 9 * len(sim.robots)


def _check_fits(spec: PolicySpec, sim: SimConfig) -> None:
    """Whether a policy sees and moves what the simulation has."""
    theirs = (len(spec.cameras), spec.image_size, spec.action_dim, spec.proprio_dim)
    ours = (len(sim.cameras), sim.image_size, *_vector_sizes(sim))
    what = ("cameras", "pixels a side", "numbers per action", "numbers of proprioception")
    for name, needed, given in zip(what, theirs, ours, strict=True):
        if needed != given:
            raise ConfigError(f"the policy was trained with {needed} {name}, the simulation has {given}: change sim.* to what it knows, "
                              "or take another policy")


def _check_instruction(checkpoint: Path, config: RunConfig) -> None:
    """Whether the task's text embedding is at hand, in the checkpoint or from a T5 directory."""
    instruction, file = tasks.spec(config.sim.task).instruction, checkpoint / "text.safetensors"
    if file.exists() and not os.path.isdir(config.model.text_path):
        known = list(read_text_embeddings(file))
        if instruction not in known:
            raise ConfigError(f"the policy has no text embedding of {instruction!r}, only of {len(known)}, such as {known[0]!r}: "
                              "import or pretrain it with a T5 directory as model.text_path, or take another task")


@contextlib.contextmanager
def open_run(config: RunConfig, *, fresh: bool = False, quiet: bool = False, create: bool = True, with_ray: bool = True,
             demonstrates: bool = False) -> Iterator[Run]:
    """Validate, take the run's folder, start or join Ray; give everything back at the end, however it comes.

    A new run that ``demonstrates`` needs a scripted expert; ConfigError before a run is made, or moved aside by ``fresh``, for nothing.
    """
    validate(config)
    if demonstrates and (fresh or stored_config(config) is None):
        check_expert(config.sim)
    folder = RunFolder(config, fresh=fresh, create=create)
    tracker = None
    try:
        if with_ray:
            connect(config.address)
        tracker = Tracker(config, folder)
        yield Run(config, folder, tracker, quiet)
    finally:
        if tracker is not None:
            tracker.close()
        if with_ray:
            ray.shutdown()
        folder.close()
