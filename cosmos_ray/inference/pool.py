"""The driver's side of the pool: start the actors, push weights, bring restarted ones up to date."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayTaskError

from cosmos_ray.config import InferenceConfig
from cosmos_ray.errors import CheckpointError, PoolUnavailable
from cosmos_ray.inference.actor import InferenceActor
from cosmos_ray.inference.messages import ActingPolicy
from cosmos_ray.remote import ACTOR_LOST, own_error
from cosmos_ray.weights import Weights

logger = logging.getLogger(__name__)

START_S = 180.0  #: to import torch and load the checkpoint, on a machine busy with other actors
REPAIR_S = 2.0  #: how often restarted actors are looked for
PUSH_S = 60.0  #: for every actor to take new weights


@dataclass(frozen=True)
class PushedWeights:
    """Weights in Ray's object store that every actor should hold."""

    version: int
    weights: ray.ObjectRef
    planning_checkpoint: str = ""  #: none: the learner pushes policies that score their own candidates

    def give(self, actor: ActorHandle) -> ray.ObjectRef:
        return actor.set_weights.remote(self.weights)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that every actor should hold, with the planning network beside it."""

    version: int
    checkpoint: str
    planning_checkpoint: str

    def give(self, actor: ActorHandle) -> ray.ObjectRef:
        return actor.load.remote(self.checkpoint, self.planning_checkpoint)


class InferencePool:
    """Handles of the inference actors, and what these actors should hold."""

    def __init__(self, checkpoint: str | Path, config: InferenceConfig, options: Sequence[dict[str, Any]]):
        """``options`` are Ray's options of each actor."""
        environment = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(config.threads)}}}
        actor_class: Any = InferenceActor  # ray.remote adds `options`, which its type stubs do not declare
        self.actors: list[ActorHandle] = [
            actor_class.options(**own, **environment).remote(str(Path(checkpoint).resolve()), config) for own in options]
        self.restarts = 0
        self._wanted: PushedWeights | LoadedCheckpoint | None = None  #: None: the checkpoint that the actors started from
        self._probes: dict[int, tuple[ray.ObjectRef | None, float]] = {}  #: actor -> status asked for, and when
        try:
            statuses: list[dict] = ray.get([a.status.remote() for a in self.actors], timeout=START_S)
        except GetTimeoutError as error:
            raise PoolUnavailable(f"the inference actors did not start within {START_S:g} s: are their machines "
                                  "busy?") from error
        except ACTOR_LOST as error:
            raise CheckpointError(f"an inference actor could not start: {_root(error)}") from error
        self._pids = [status["pid"] for status in statuses]

    def push(self, weights: Weights) -> None:
        """Give every actor newer weights while the actors keep serving. :meth:`repair` gives them to an actor that is down now."""
        self._want(PushedWeights(weights.version, ray.put(weights)))

    def load(self, checkpoint: str | Path, acting: ActingPolicy) -> None:
        """Switch every actor to the policy of ``checkpoint`` and to the planning network of ``acting``."""
        if acting.version is None:
            raise ValueError("a checkpoint is loaded with its version: requests insist on that version")
        self._want(LoadedCheckpoint(acting.version, str(Path(checkpoint).resolve()), acting.planning_checkpoint))

    def repair(self) -> None:
        """Count the actors that Ray restarted, and give them what the others hold.

        Never waits: asks each actor for its status every ``REPAIR_S`` seconds and acts on the answers that have come.
        """
        stale = []
        for i, actor in enumerate(self.actors):
            probe, asked = self._probes.get(i, (None, 0.0))
            if probe is None:
                if time.monotonic() - asked > REPAIR_S:
                    self._probes[i] = actor.status.remote(), time.monotonic()
                continue
            if not ray.wait([probe], timeout=0)[0]:
                continue
            self._probes[i] = None, asked
            try:
                status = ray.get(probe)
            except ACTOR_LOST:
                continue  # still restarting: next time
            if status["pid"] != self._pids[i]:
                self._pids[i] = status["pid"]
                self.restarts += 1
                logger.warning("inference actor %d was restarted", i)
            wanted = self._wanted
            if wanted and (status["version"], status["planning_checkpoint"]) != (wanted.version, wanted.planning_checkpoint):
                stale.append(actor)
        if stale and self._wanted:
            self._deliver(self._wanted, stale)

    def status(self) -> list[dict]:
        """Status of the actors that answer within five seconds."""
        references: list[ray.ObjectRef] = [actor.status.remote() for actor in self.actors]
        ready, _ = ray.wait(references, num_returns=len(references), timeout=5)
        out: list[dict] = []
        for reference in references:
            try:
                if reference in ready:
                    out.append(ray.get(reference))
            except ACTOR_LOST:
                continue
        return out

    def close(self) -> None:
        """Stop the actors."""
        for actor in self.actors:
            ray.kill(actor)

    def _want(self, wanted: PushedWeights | LoadedCheckpoint) -> None:
        self._wanted = wanted
        self._deliver(wanted, self.actors)

    @staticmethod
    def _deliver(wanted: PushedWeights | LoadedCheckpoint, actors: list[ActorHandle]) -> None:
        calls = [wanted.give(actor) for actor in actors]
        ready, late = ray.wait(calls, num_returns=len(calls), timeout=PUSH_S)
        for call in late:
            logger.warning("an inference actor has not taken policy version %d within %g s", wanted.version, PUSH_S)
            ray.cancel(call)
        for call in ready:
            try:
                ray.get(call)
            except RayTaskError as error:
                raise own_error(error) from error
            except ACTOR_LOST:
                logger.warning("an inference actor died while taking policy version %d; it will get it after its restart", wanted.version)


def _root(error: BaseException) -> str:
    """Last line of an actor's start-up error, which holds the message we raised there."""
    return str(error).strip().splitlines()[-1]
