"""The Ray shells around the rollout and demonstration cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ray
from ray.actor import ActorHandle

from cosmos_ray.config import RolloutConfig, RunConfig
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.rollout.outbox import Outbox
from cosmos_ray.rollout.ticket import Answer, EpisodeTicket, Waiting
from cosmos_ray.sim.child import Limits, SimulatorChild

if TYPE_CHECKING:  # imported late: a worker starts fast, and the driver needs no simulator
    from cosmos_ray.rollout.core import RolloutCore
    from cosmos_ray.rollout.demonstrator import DemonstratorCore


def limits(rollout: RolloutConfig, demonstrations: bool = False) -> Limits:
    """When a worker replaces its simulators: in any case before the driver, which waits for ``rollout.deadline_s``, replaces the worker."""
    most = rollout.deadline_s / 2
    return Limits(most if demonstrations else min(rollout.chunk_deadline_s, most), rollout.simulator_memory_mb, rollout.simulator_episodes)


def await_start(simulators: SimulatorChild) -> None:
    """A worker's first answer says that its simulators run."""
    while not simulators.ready(1.0):
        pass


def _waits(outbox: Outbox, simulators: SimulatorChild) -> list[Waiting]:
    """What a worker cannot go on without at the end of a turn."""
    on = outbox.trouble or ("its simulators, which start again" if simulators.starting else "")
    return [Waiting(on)] if on else []


@ray.remote(max_restarts=0, max_task_retries=0)
class RolloutActor:
    """One worker and its simulators' process. The driver replaces it when it dies or hangs; the store makes repeated episodes harmless."""

    def __init__(self, config: RunConfig, store: str, pool: Sequence[ActorHandle], index: int):
        self._config, self._store, self._pool, self._index = config, store, list(pool), index
        self._simulators = SimulatorChild(config.sim, config.rollout.envs_per_worker, limits(config.rollout))
        self._core: RolloutCore | None = None

    def advance(self, tickets: list[EpisodeTicket], seconds: float) -> list[Answer]:
        """Run policy episodes for about ``seconds``; see :meth:`RolloutCore.advance`."""
        from cosmos_ray.inference.client import PoolClient
        from cosmos_ray.replay.store import ReplayStore
        from cosmos_ray.rollout.core import RolloutCore

        if self._core is None:
            c = self._config
            client = PoolClient(self._pool, c.inference.timeout_s, start=self._index)
            self._core = RolloutCore(self._simulators, ReplayStore(self._store, create=False), client, steps=c.inference.steps,
                                     execute=c.rollout.execute, patience_s=c.replay.patience_s)
            await_start(self._simulators)
        return [*self._core.advance(tickets, seconds), *_waits(self._core.outbox, self._simulators)]

    def pid(self) -> int:
        return os.getpid()


@ray.remote(max_restarts=0, max_task_retries=0)
class DemonstratorActor:
    """One worker whose simulator's process runs the scripted expert."""

    def __init__(self, config: RunConfig, store: str):
        self._config, self._store = config, store
        self._simulators = SimulatorChild(config.sim, 1, limits(config.rollout, demonstrations=True))
        self._core: DemonstratorCore | None = None

    def advance(self, tickets: list[EpisodeKey], seconds: float) -> list[Answer]:
        """Record all of ``tickets``, which takes less than a second each; see :meth:`DemonstratorCore.advance`."""
        from cosmos_ray.replay.store import ReplayStore
        from cosmos_ray.rollout.demonstrator import DemonstratorCore

        if self._core is None:
            self._core = DemonstratorCore(self._simulators, ReplayStore(self._store, create=False), self._config.replay.patience_s)
            await_start(self._simulators)
        return [*self._core.advance(tickets, seconds), *_waits(self._core.outbox, self._simulators)]

    def pid(self) -> int:
        return os.getpid()
