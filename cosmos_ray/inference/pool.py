"""The driver's side of the pool: start the actors, push weights, bring restarted ones up to date."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from cosmos_ray.config import InferenceConfig
from cosmos_ray.errors import CheckpointError, PoolUnavailable
from cosmos_ray.inference.actor import InferenceActor
from cosmos_ray.remote import ACTOR_LOST, own_error
from cosmos_ray.weights import Weights

logger = logging.getLogger(__name__)

START_S = 180.0  #: to import torch and load the checkpoint, on a machine busy with other actors
REPAIR_S = 2.0  #: how often restarted actors are looked for
PUSH_S = 60.0  #: for every actor to take new weights


class InferencePool:
    """Handles of the inference actors and the weights they ought to hold."""

    def __init__(self, checkpoint: str | Path, config: InferenceConfig, cpus: float):
        options = {"num_cpus": cpus, "num_gpus": config.gpus, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(config.threads)}}}
        self.actors = [InferenceActor.options(**options).remote(str(Path(checkpoint).resolve()), config) for _ in range(config.actors)]
        self.restarts = 0
        self._current: tuple[int, ray.ObjectRef | tuple[str, str]] | None = None  #: version, and weights or (checkpoint, judge)
        self._probes: dict[int, tuple[ray.ObjectRef | None, float]] = {}  #: actor -> status asked for, and when
        try:
            self._pids = [s["pid"] for s in ray.get([a.status.remote() for a in self.actors], timeout=START_S)]
        except GetTimeoutError as error:
            raise PoolUnavailable(f"the inference actors did not start within {START_S:g} s: does the cluster have room "
                                  f"for {config.actors} of them, {config.gpus:g} GPUs each?") from error
        except ACTOR_LOST as error:
            raise CheckpointError(f"an inference actor could not start: {_root(error)}") from error

    def push(self, weights: Weights) -> None:
        """Give every actor newer weights while they keep serving. An actor that is down gets them from :meth:`repair`."""
        self._current = (weights.version, ray.put(weights))
        self._deliver(self.actors)

    def load(self, checkpoint: str | Path, version: int, judge: str | Path = "") -> None:
        """Switch every actor to a checkpoint (evaluation of another policy), and to the network that judges its candidates."""
        self._current = (version, (str(Path(checkpoint).resolve()), judge and str(Path(judge).resolve())))
        self._deliver(self.actors)

    def repair(self) -> None:
        """Look after actors that Ray restarted: count them and give them the current weights.

        Does not wait for a status: it asks each actor every ``REPAIR_S`` seconds and acts on the answers that have come.
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
            if self._current and (status["version"], status["judge"]) != (self._current[0], self._judge):
                stale.append(actor)
        if stale:
            self._deliver(stale)

    @property
    def _judge(self) -> str:
        """The network that judges candidates, which every actor ought to hold beside the policy."""
        payload = self._current[1]
        return payload[1] if isinstance(payload, tuple) else ""

    def status(self) -> list[dict]:
        """Status of the actors that answer within five seconds."""
        ready, _ = ray.wait(references := [a.status.remote() for a in self.actors], num_returns=len(self.actors), timeout=5)
        out = []
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

    def _deliver(self, actors: list) -> None:
        version, payload = self._current
        calls = [a.load.remote(*payload) if isinstance(payload, tuple) else a.set_weights.remote(payload) for a in actors]
        ready, late = ray.wait(calls, num_returns=len(calls), timeout=PUSH_S)
        for call in late:
            logger.warning("an inference actor has not taken policy version %d within %g s", version, PUSH_S)
            ray.cancel(call)
        for call in ready:
            try:
                ray.get(call)
            except RayTaskError as error:
                raise own_error(error) from error
            except ACTOR_LOST:
                logger.warning("an inference actor died while taking policy version %d; it will get it after its restart", version)


def _root(error: BaseException) -> str:
    """Last line of an actor's start-up error, which holds the message we raised there."""
    return str(error).strip().splitlines()[-1]
