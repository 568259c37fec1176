"""The Ray shell around :class:`LearnerCore`, and the ranks as the driver's :class:`LearnerGroup` calls them."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from cosmos_ray.config import LearnerConfig
from cosmos_ray.errors import CosmosRayError
from cosmos_ray.learner.group import LearnerGroup, RankDied
from cosmos_ray.learner.mixture import BatchSource, Mixture
from cosmos_ray.memory import enough_memory
from cosmos_ray.places import Gang
from cosmos_ray.remote import ACTOR_LOST, first_line, why_lost
from cosmos_ray.replay.files.working_copy import fetched, published
from cosmos_ray.supervision import Supervisor
from cosmos_ray.weights import Weights

LESS_STATE = ("more ranks (learner.world_size) share out the optimiser's state, and learner.lora_rank 32 trains adapters alone; where "
              "inference actors are on the same GPU, lower inference.actors")
BLAME_S = 10.0  #: from the first error of a rank on, to learn which rank died


@dataclass(frozen=True)
class LearnerTask:
    """The task of a learner, as plain data."""

    policy: str  #: checkpoint directory to start from
    store: str  #: replay store directory
    state: str  #: directory of resumable learner state
    mixture: Mixture
    chunk: int
    gamma: float
    peak_lr: float
    total_steps: int
    seed: int
    latents: str = ""  #: directory of the latent cache, if the config wants one
    world_weight: float = 0.0  #: loss weight of the future frames in world-model samples; 0 keeps the policy's own
    planning_checkpoint: str = ""  #: checkpoint directory of the planning network, whose value weighs own rollouts; "" = no weighting


@ray.remote(max_restarts=0, max_task_retries=0)
class LearnerActor:
    """One rank. Never restarted by Ray: a new engine would be out of step with the other ranks."""

    def __init__(self, config: LearnerConfig, rank: int):
        self.config, self.rank = config, rank

    def address(self) -> tuple[str, int]:
        """(host, free port) for the rendezvous; asked of rank 0."""
        from cosmos_ray.learner.engine import free_port

        return ray.util.get_node_ip_address(), free_port()

    def start(self, task: LearnerTask, address: str, port: int) -> tuple[int, list[str]]:
        """Build the engine; returns the step it continues from, and which newer states are not whole."""
        with enough_memory(LESS_STATE):  # not as a decorator, which Ray cannot pickle
            return self._start(task, address, port)

    def _start(self, task: LearnerTask, address: str, port: int) -> tuple[int, list[str]]:
        import torch

        from cosmos_ray.learner.core import LearnerCore
        from cosmos_ray.learner.encoder import open_latents
        from cosmos_ray.learner.engine import rendezvous
        from cosmos_ray.model.checkpoint import load_checkpoint
        from cosmos_ray.replay.sampling.sampler import WindowSampler
        from cosmos_ray.replay.store import ReplayStore

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        os.environ.update(rendezvous(self.rank, self.config.world_size, address, port))
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        policy, _ = load_checkpoint(task.policy, dtype)
        if task.world_weight:
            policy.spec = dataclasses.replace(policy.spec, world_weight=task.world_weight)
        sampler = WindowSampler(ReplayStore(task.store, create=False), chunk=task.chunk, gamma=task.gamma,
                                seed=task.seed * 1000 + self.rank)
        source = BatchSource(sampler, task.mixture, self.config.rows)
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        latents = open_latents(policy.place(device, dtype), self.config, task.chunk, task.latents)
        planning = load_checkpoint(task.planning_checkpoint, dtype)[0].place(device, dtype).eval() if task.planning_checkpoint else None
        self.core = LearnerCore(self.config, policy, source, peak_lr=task.peak_lr, total_steps=task.total_steps, seed=task.seed,
                                rank=self.rank, device=device, latents=latents, planning_network=planning)
        self.state = task.state
        self.publishes = self.rank == 0 or ray.util.get_node_ip_address() != address  # one rank for the files of rank 0's machine
        self.core.load(fetched(self.state))
        return self.core.step_count, self.core.passed_over

    def probe(self) -> None:
        """Show that the rank answers."""

    def train(self, steps: int) -> dict[str, float]:
        """Take in new episodes, then train; returns mean metrics."""
        self.core.refresh()
        return self.core.train(steps)

    def publish(self, version: int) -> Weights | None:
        """The record of the published weights, which rank 0 puts into Ray's object store; None from the other ranks."""
        record = self.core.weights(version, lambda buffers: ray.put(buffers))
        return record and dataclasses.replace(record, node=ray.get_runtime_context().get_node_id())

    def save(self) -> None:
        self.core.save(self.state)
        if self.publishes:
            published(self.state)

    def export(self, path: str, version: int, info: dict) -> None:
        self.core.export(path, version, info)
        if self.rank == 0:
            published(path)


@dataclass
class _Call:
    references: list[ray.ObjectRef]
    failed: float | None = None  #: when a rank first failed


class RayRanks:
    """The ranks as Ray actors in the places of ``gang``: :class:`~cosmos_ray.learner.group.Ranks`."""

    def __init__(self, config: LearnerConfig, gang: Gang):
        self._gang = gang
        self.actors = [_rank(config, rank, options, config.threads or threads)
                       for rank, (options, threads) in enumerate(zip(gang.options, gang.threads, strict=True))]

    def begin(self, method: str, *arguments: Any) -> _Call:
        return _Call([getattr(actor, method).remote(*arguments) for actor in (self.actors[:1] if method == "address" else self.actors)])

    def answers(self, call: _Call, timeout: float) -> list[Any] | None:
        ready, late = ray.wait(call.references, num_returns=len(call.references), timeout=timeout)
        died: dict[str, str] = {}
        failed: dict[str, str] = {}
        cause: Exception | None = None
        for rank, reference in enumerate(call.references):
            if reference in ready:
                try:
                    ray.get(reference)
                except ACTOR_LOST as error:
                    died[f"rank {rank}"], cause = why_lost(error), error
                except RayTaskError as error:
                    if isinstance(error.cause, CosmosRayError):
                        raise error.cause from error
                    failed[f"rank {rank}"], cause = first_line(error.cause), error
        if not died and not failed:
            return None if late else ray.get(call.references)
        if not died and late:  # the peers of a dead rank fail in their next collective, and their errors may arrive first
            call.failed = call.failed or time.monotonic()
            if time.monotonic() - call.failed < BLAME_S:
                return None
        blamed = died or failed
        raise RankDied(f"learner {' and '.join(blamed)}", next(iter(blamed.values()))) from cause

    def silent(self, call: _Call) -> str:
        _, late = ray.wait(call.references, num_returns=len(call.references), timeout=0)
        return "learner " + " and ".join(f"rank {rank}" for rank, reference in enumerate(call.references) if reference in late)

    def close(self) -> None:
        """Stop the ranks, without the interpreter's exit handlers: they abort now and then under DeepSpeed."""
        for actor in self.actors:
            ray.kill(actor)
        self._gang.remove()


def _rank(config: LearnerConfig, rank: int, options: dict[str, Any], threads: int) -> ActorHandle:
    """Start a rank's actor."""
    # Several threads pay off only if they spin for a while between the small operations of a training step (0.18 s against
    # 0.29 s a step on two quiet cores); without a bound they starve everything else on a busy machine (over 2 s a step).
    spin = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "100000"} if threads > 1 else {"OMP_WAIT_POLICY": "PASSIVE"}
    variables = {"OMP_NUM_THREADS": str(threads), **spin}
    if not options["num_gpus"]:
        variables["DS_ACCELERATOR"] = "cpu"
    actor_class: Any = LearnerActor  # ray.remote adds `options`, which its type stubs do not declare
    return actor_class.options(**options, runtime_env={"env_vars": variables}).remote(config, rank)


def learner_group(config: LearnerConfig, task: LearnerTask, supervisor: Supervisor, place: Callable[[], Gang | None]) -> LearnerGroup:
    """The learner of ``task``, not started yet; ``place`` finds places for its ranks, None while there is no room."""
    return LearnerGroup(lambda: RayRanks(config, gang) if (gang := place()) else None, (task,), Path(task.state), supervisor,
                        config.deadline_s)
