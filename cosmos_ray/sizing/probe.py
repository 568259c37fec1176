"""What the parts of the loop take on one core of this machine, and the JSON file that keeps the figures."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from cosmos_ray.config import RunConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.inference.core import load_core
from cosmos_ray.inference.messages import ActRequest
from cosmos_ray.learner.mixture import BatchSource, Mixture
from cosmos_ray.model.checkpoint import save_policy
from cosmos_ray.model.objective import Objective
from cosmos_ray.model.policy import build
from cosmos_ray.model.spec import make_spec
from cosmos_ray.replay.files.durable import replace
from cosmos_ray.replay.format.codec import encode_jpeg
from cosmos_ray.replay.format.episode import Episode, EpisodeKey
from cosmos_ray.replay.sampling.sampler import WindowSampler
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.sim.embodiment import simulated
from cosmos_ray.sim.make import make
from cosmos_ray.sim.simulation import start

FORMAT = 1
ROWS = (1, 2, 4, 8, 16)  #: batch sizes that are timed
PART_S = 8.0  #: of the timing of one part
MEANS = ("step_s", "reset_s", "commit_s", "learn_s", "worker_mb", "network_mb", "episode_mb")


@dataclass(frozen=True)
class Probe:
    """Seconds of one core, and bytes, of each part."""

    task: str
    horizon: int  #: control steps of an episode that does not succeed
    chunk: int  #: control steps of one decision
    step_s: float  #: simulation of one control step, with its share of a chunk's frames
    reset_s: float  #: reset of one episode
    infer_s: dict[int, float]  #: answer to a batch, by its rows
    commit_s: float  #: one episode into the store
    learn_s: float  #: one learner step
    worker_mb: float  #: private memory of a rollout worker with its simulators
    network_mb: float  #: private memory of a process with the network, beside that of Python
    episode_mb: float  #: of one episode in the store

    def answer_s(self, rows: float) -> float:
        """Seconds for a batch of ``rows``: linear between the measured sizes, and beyond the largest two."""
        sizes = sorted(self.infer_s)
        for low, high in zip(sizes, sizes[1:], strict=False):
            if rows <= high or high == sizes[-1]:
                slope = (self.infer_s[high] - self.infer_s[low]) / (high - low)
                return max(1e-6, self.infer_s[low] + slope * (rows - low))
        return self.infer_s[sizes[0]] * rows / sizes[0]

    def save(self, file: Path) -> None:
        replace((json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n").encode(), file)


def load_probe(file: Path) -> Probe:
    """A saved probe. ConfigError when the file is none."""
    try:
        held = json.loads(file.read_text())
        if held.pop("format") != FORMAT:
            raise ValueError("another format")
        probe = Probe(**{**held, "infer_s": {int(rows): float(seconds) for rows, seconds in held["infer_s"].items()}})
        if not probe.infer_s or not all(value > 0 for value in (probe.step_s, probe.horizon, probe.chunk, *probe.infer_s.values())):
            raise ValueError("a time that is not above 0")
        return probe
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{file} is no saved probe ({error}): make one with `size --save FILE`") from error


def measure(config: RunConfig) -> Probe:
    """Measure every part on all cores of this machine at once, about a minute: a core is slower while its neighbours work, as they do in a
    fleet. Figures are means over the cores."""
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(cores, get_context("spawn")) as processes:
        found = [call.result() for call in [processes.submit(_measure, config) for _ in range(cores)]]

    def mean(name: str) -> float:
        return float(np.mean([getattr(probe, name) for probe in found]))

    return dataclasses.replace(found[0], **{name: mean(name) for name in MEANS}, infer_s={
        rows: float(np.mean([probe.infer_s[rows] for probe in found])) for rows in ROWS})


def _measure(config: RunConfig) -> Probe:
    """Measure every part, one after another in this process.

    What computes is measured in processor time, so other processes of a busy machine do not count; a commit waits for the disk, and is
    measured by the clock.
    """
    torch.set_num_threads(1)
    sim, chunk, body, rng = config.sim.each()[0], config.model.chunk, simulated(config.sim), np.random.default_rng(0)
    before = _private_mb()
    env: Any = make(sim)
    env.execute(np.zeros((chunk, env.action_dim), np.float32), start(env, 0))
    worker_mb = _private_mb() - before + before / 2  # the simulators, and a Python with fewer libraries than this process
    began, resets = time.process_time(), 0
    while time.process_time() - began < PART_S / 4:
        trajectory = start(env, resets)
        resets += 1
    reset_s = (time.process_time() - began) / resets
    steps, passed = 0, 0.0
    while passed < PART_S:
        trajectory = start(env, steps)
        while not env.done and passed < PART_S:
            actions = rng.uniform(-1, 1, (chunk, env.action_dim)).astype(np.float32)
            begun = time.process_time()
            env.execute(actions, trajectory)
            passed += time.process_time() - begun
        steps += trajectory.length
    policy = build(make_spec(config.model, sim.cameras, action_dim=body.action_dim, proprio_dim=body.proprio_dim), seed=1)
    side = policy.spec.image_size
    images = rng.integers(0, 256, (max(ROWS), len(sim.cameras), side, side, 3), dtype=np.uint8)
    policy.tokenizer.fit(torch.from_numpy(images[:8, 0]))
    with tempfile.TemporaryDirectory() as folder:
        save_policy(policy, Path(folder) / "policy", version=1)
        before = _private_mb()
        core = load_core(str(Path(folder) / "policy"), config.inference, "cpu")
        infer_s = {}
        for rows in ROWS:
            proprio = rng.normal(size=(rows, policy.spec.proprio_dim)).astype(np.float32)
            request = ActRequest(images[:rows], proprio, ("do the task",) * rows, np.arange(rows), config.inference.steps)
            infer_s[rows] = _seconds(lambda request=request: core.answer([request]), PART_S / len(ROWS))
        network_mb = max(1.0, _private_mb() - before)
        store = ReplayStore(str(Path(folder) / "replay"))
        commit_s, episode_mb = _commits(store, config, env, policy.spec.proprio_dim, policy.spec.action_dim)
        learn_s = _learner_step(store, config, policy)
    return Probe(config.sim.title, sim.horizon, chunk, passed / steps, reset_s, infer_s, commit_s, learn_s, worker_mb, network_mb,
                 episode_mb)


def _commits(store: ReplayStore, config: RunConfig, env: Any, proprio_dim: int, action_dim: int) -> tuple[float, float]:
    """Seconds to store one episode of the task's horizon with frames at the ends of chunks, and its MB."""
    sim, rng, length = config.sim.each()[0], np.random.default_rng(0), config.sim.each()[0].horizon
    frames = [encode_jpeg(np.asarray(image)) for image in env.render()]
    times = list(range(0, length + 1, config.model.chunk))
    actions, count = rng.uniform(-1, 1, (length, action_dim)), 12
    seconds = []
    for seed in range(count):
        episode = Episode(
            key=EpisodeKey("probe", sim.task, "demo", seed), instruction="do the task", cameras=tuple(sim.cameras), success=True,
            episode_return=1.0, timed_out=False, invalid="", policy_version=-1, actions=actions, labels=actions, rewards=np.zeros(length),
            proprio=rng.normal(size=(length + 1, proprio_dim)), states=rng.normal(size=(length + 1, 80)),
            step_versions=np.full(length, -1), predicted_values=np.full(length, np.nan), frames={t: frames for t in times})
        began = time.perf_counter()
        store.commit(episode)
        seconds.append(time.perf_counter() - began)
    total = sum(file.stat().st_size for file in Path(store.root).rglob("*") if file.is_file())
    return sorted(seconds)[count // 2], total / count / 2**20


def _learner_step(store: ReplayStore, config: RunConfig, policy: Any) -> float:
    """Seconds of one learner step on one core: batch from the store, loss, gradients, AdamW."""
    store.refresh()
    source = BatchSource(WindowSampler(store, chunk=config.model.chunk, gamma=config.replay.gamma, seed=0),
                         Mixture.base(config.learner, config.replay), config.learner.rows)
    for parameter in policy.net.parameters():
        parameter.requires_grad_(True)
    objective, generator = Objective(policy), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(policy.net.parameters(), lr=1e-5)

    def step() -> None:
        for _ in range(config.learner.accumulate):
            objective.loss(source.draw(), generator)[0].backward()
        optimiser.step()
        optimiser.zero_grad()

    return _seconds(step, PART_S)


def _seconds(call: Callable[[], Any], budget_s: float) -> float:
    """Mean seconds of processor time of a call, after a first one that does not count."""
    call()
    began, calls = time.process_time(), 0
    while (passed := time.process_time() - began) < budget_s or not calls:
        call()
        calls += 1
    return passed / calls


def _private_mb() -> float:
    memory = psutil.Process().memory_info()
    return (memory.rss - memory.shared) / 2**20
