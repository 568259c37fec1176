"""The Ray shell around ``InferenceCore``."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError

from cosmos_ray.config import InferenceConfig, PlannerConfig
from cosmos_ray.errors import CosmosRayError
from cosmos_ray.inference.batcher import Batcher
from cosmos_ray.inference.core import load_core
from cosmos_ray.inference.messages import ActReply, ActRequest
from cosmos_ray.inference.metrics import ActorMetrics
from cosmos_ray.supervision import PUSH_S
from cosmos_ray.weights import Weights

QUEUE_ROWS = 1024  #: observations that may wait in an actor: 300 MB of two 224-pixel cameras


class WeightsLost(CosmosRayError):
    """Pushed weights that can no longer be had: the learner that put them has ended. The next push mends it."""


class WeightsLate(CosmosRayError):
    """Pushed weights did not arrive within ``PUSH_S``. They may still come."""


def fetch(weights: Weights) -> Weights:
    """``weights`` with their buffers in place of the reference. WeightsLost, WeightsLate."""
    try:
        return dataclasses.replace(weights, data=ray.get(weights.data, timeout=PUSH_S))
    except ObjectLostError as error:
        raise WeightsLost(f"policy version {weights.version} is lost: the learner that put it has ended") from error
    except GetTimeoutError as error:
        raise WeightsLate(f"policy version {weights.version} did not arrive within {PUSH_S:g} s") from error


@ray.remote(max_restarts=-1, max_task_retries=0)
class InferenceActor:
    """Serves one policy. Restarted by Ray after a crash; it then holds ``checkpoint`` until the driver pushes newer weights.

    Calls are not retried by Ray: answering has no side effect, and the client retries against any actor of the pool.
    """

    def __init__(self, checkpoint: str, config: InferenceConfig, instructions: Sequence[str] = ()):
        torch.set_num_threads(config.threads)
        self._load = partial(load_core, config=config, device="cuda" if ray.get_gpu_ids() else "cpu")
        self._expects: dict[str, Any] = {"observations": config.max_batch, "steps": config.steps, "instructions": instructions}
        self._core = self._load(checkpoint)
        self._core.prepare(None, **self._expects)
        self._batcher: Batcher[ActRequest, ActReply] = Batcher(lambda requests: self._core.answer(requests), config.max_batch,
                                                               config.wait_ms / 1000, self._told, QUEUE_ROWS)
        self._peers: tuple[int, list[ActorHandle]] = 0, []
        self._metrics = ActorMetrics(ray.get_runtime_context().get_node_id()[:8], config.max_batch)

    async def act(self, request: ActRequest) -> ActReply:
        """Answer a request, batched with whatever else is waiting. WrongVersion, Busy, Expired: see the batcher."""
        reply = await self._batcher.submit(dataclasses.replace(request, arrived=time.monotonic()), request.within_s)
        return dataclasses.replace(reply, load=self._batcher.load, pool=self._peers[0])

    async def know(self, change: int, actors: list[ActorHandle]) -> None:
        """Take in the pool's present actors, after its change number ``change``; clients ask for them."""
        self._peers = max(self._peers, (change, actors), key=lambda known: known[0])

    async def peers(self) -> tuple[int, list[ActorHandle]]:
        """What :meth:`know` was told last."""
        return self._peers

    def _told(self, rows: int, waiting: int, waits_s: list[float]) -> None:
        self._metrics.batch(rows, waiting, waits_s, self._core.version)

    async def set_weights(self, weights: Weights) -> int:
        """Fetch and check weights while the old ones serve, swap them between two batches; returns the version now held.

        CheckpointError for weights that are damaged or of another model, WeightsLost and WeightsLate for such that do not come.
        """
        core = self._core
        if weights.version <= core.version:
            return core.version
        fetched = await asyncio.to_thread(fetch, weights)
        await asyncio.to_thread(core.check_weights, fetched, ray.get_runtime_context().get_node_id())
        # Another checkpoint may have been loaded meanwhile.
        return await self._batcher.between(lambda: self._core.set_weights(fetched, checked=self._core is core))

    async def load(self, checkpoint: str, planning_checkpoint: str = "", planner: PlannerConfig | None = None) -> int:
        """Replace the policy by that of a checkpoint, older or newer, and return its version. Arguments as in :func:`load_core`; ready for
        ``planner``, if one is given."""
        return await self._batcher.between(self._replace, checkpoint, planning_checkpoint, planner)

    def _replace(self, checkpoint: str, planning_checkpoint: str, planner: PlannerConfig | None) -> int:
        core = self._load(checkpoint, planning_checkpoint=planning_checkpoint)
        core.take_over(self._core)
        self._core = core  # already now: its networks may be those of the core before
        core.prepare(planner, **self._expects)
        return core.version

    async def status(self) -> dict:
        """{version, planning_checkpoint, batches, rows, waiting, computing, pool, pid, node}; rows so far, and at the moment."""
        core, batcher = self._core, self._batcher
        return {"version": core.version, "planning_checkpoint": core.planning_checkpoint, "batches": batcher.batches, "rows": batcher.rows,
                "waiting": batcher.waiting, "computing": batcher.computing, "pool": self._peers[0],
                "pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}
