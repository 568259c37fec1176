"""The Ray shell around :class:`LearnerCore`, and the group of ranks the driver talks to."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayTaskError

from cosmos_ray.config import LearnerConfig
from cosmos_ray.errors import CosmosRayError
from cosmos_ray.learner.mixture import BatchSource, Mixture
from cosmos_ray.memory import enough_memory
from cosmos_ray.places import Gang
from cosmos_ray.remote import ACTOR_LOST, own_error
from cosmos_ray.replay.files.working_copy import fetched, published
from cosmos_ray.weights import Weights

LESS_STATE = ("more ranks (learner.world_size) share out the optimiser's state, and learner.lora_rank 32 trains adapters alone; where "
              "inference actors are on the same GPU, lower inference.actors")
START_S = 300.0  #: to import DeepSpeed, meet the other ranks and load a checkpoint


class LearnerLost(CosmosRayError):
    """A learner rank died. Everything committed is safe; the run resumes from its last checkpoint."""


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

    def start(self, task: LearnerTask, address: str, port: int, resume: bool) -> int:
        """Build the engine; returns the step it continues from."""
        with enough_memory(LESS_STATE):  # not as a decorator, which Ray cannot pickle
            return self._start(task, address, port, resume)

    def _start(self, task: LearnerTask, address: str, port: int, resume: bool) -> int:
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
        if resume:
            self.core.load(fetched(self.state))
        return self.core.step_count

    def train(self, steps: int) -> dict[str, float]:
        """Take in new episodes, then train; returns mean metrics."""
        self.core.refresh()
        return self.core.train(steps)

    def weights(self, version: int) -> Weights | None:
        """The record of the published weights, which rank 0 puts into Ray's object store; None from the other ranks."""
        return self.core.weights(version, lambda buffers: ray.put(buffers))

    def save(self) -> None:
        self.core.save(self.state)
        if self.publishes:
            published(self.state)

    def export(self, path: str, version: int, info: dict) -> None:
        self.core.export(path, version, info)
        if self.rank == 0:
            published(path)


class LearnerGroup:
    """All ranks, called together. LearnerLost when one of them died; the error of a rank is raised as it is."""

    def __init__(self, config: LearnerConfig, task: LearnerTask, place: Callable[[], Gang], resume: bool):
        """``place`` finds places for the ranks."""
        self._gang = place()
        self.folder = Path(task.state)
        self._publishing: list[ray.ObjectRef] = []
        try:
            self.ranks = [_rank(config, rank, options, config.threads or threads)
                          for rank, (options, threads) in enumerate(zip(self._gang.options, self._gang.threads, strict=True))]
            address, port = self._get([self.ranks[0].address.remote()], START_S)[0]
            self.step: int = self._call("start", task, address, port, resume, timeout=START_S)[0]
        except BaseException:
            self._gang.remove()
            raise

    def begin_training(self, steps: int) -> list[ray.ObjectRef]:
        """Start ``steps`` steps without waiting; hand the references to :meth:`finish_training`."""
        return [rank.train.remote(steps) for rank in self.ranks]

    def finish_training(self, references: list[ray.ObjectRef]) -> dict[str, float]:
        """Wait for :meth:`begin_training`; rank 0's metrics."""
        metrics = self._get(references, None)[0]
        self.step = int(metrics["step"])
        return metrics

    def publish(self, version: int) -> None:
        """Begin to put the published weights into Ray's object store, after what the ranks do now; see :meth:`published`."""
        self._publishing = [rank.weights.remote(version) for rank in self.ranks]

    def published(self) -> Weights | None:
        """The record of the weights that the last :meth:`publish` put, once; None before that. Never waits."""
        if not self._publishing:
            return None
        ready, late = ray.wait(self._publishing, num_returns=len(self._publishing), timeout=0)
        if late:
            self._get(ready, None)  # where one rank has failed the others may wait for it in vain
            return None
        references, self._publishing = self._publishing, []
        return self._get(references, None)[0]

    def save(self) -> None:
        """Write resumable state."""
        self._call("save")

    def export(self, path: Path, version: int, info: dict) -> None:
        """Write the published policy as a checkpoint directory."""
        self._call("export", str(path), version, info)

    def close(self) -> None:
        """Stop the ranks, without the interpreter's exit handlers: they abort now and then under DeepSpeed."""
        for rank in self.ranks:
            ray.kill(rank)
        self._gang.remove()

    def _call(self, method: str, *arguments: Any, timeout: float | None = None) -> list:
        return self._get([getattr(rank, method).remote(*arguments) for rank in self.ranks], timeout)

    def _get(self, references: list[ray.ObjectRef], timeout: float | None) -> list:
        try:
            return ray.get(references, timeout=timeout)
        except (RayTaskError, *ACTOR_LOST) as error:
            if isinstance(error, RayTaskError) and (isinstance(error.cause, CosmosRayError) or not _someone_died(references)):
                raise own_error(error) from error
            raise LearnerLost("a learner process died (out of memory?); run the same command again to continue from its last "
                              f"checkpoint in {self.folder}, with a lower learner.batch_size or more learner.accumulate if memory "
                              "was short") from error
        except GetTimeoutError as error:
            raise LearnerLost(f"the {len(self.ranks)} learner ranks did not start within {timeout:g} s: are their machines too "
                              "busy?") from error


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


def _someone_died(references: list[ray.ObjectRef]) -> bool:
    """Whether a rank is gone. Its peers fail in their next collective, and their errors may arrive first."""
    ready, _ = ray.wait(references, num_returns=len(references), timeout=10)
    for reference in ready:
        try:
            ray.get(reference)
        except ACTOR_LOST:
            return True
        except RayTaskError:
            continue
    return False
