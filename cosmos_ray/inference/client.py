"""The worker's side of the pool: sends a request, and survives the death of the actor that was to answer."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayTaskError

from cosmos_ray.errors import PoolUnavailable
from cosmos_ray.inference.messages import ActReply, ActRequest, WrongVersion
from cosmos_ray.remote import ACTOR_LOST, first_line, own_error

logger = logging.getLogger(__name__)

RETRY_S = 0.25  #: pause before a request is sent again
ACTOR_TRIES = 3  #: actors that one request can wait for: each gets this fraction of the timeout to answer


@dataclass
class Pending:
    """A request in flight."""

    request: ActRequest
    reference: ray.ObjectRef
    deadline: float


class PoolClient:
    """Sends requests to the actors in turn. When an actor dies or holds the wrong version, its request goes to the next actor."""

    def __init__(self, actors: list[ActorHandle], timeout_s: float, start: int = 0):
        self.actors, self.timeout_s = actors, timeout_s
        self.retries = 0
        self._next = start

    def submit(self, request: ActRequest) -> Pending:
        """Send without waiting."""
        return Pending(request, self._send(request), time.monotonic() + self.timeout_s)

    def result(self, pending: Pending) -> ActReply:
        """Wait for the answer. PoolUnavailable when no actor gave one within ``timeout_s`` of :meth:`submit`."""
        # Silence is only a reason to ask again where another actor can be asked: a busy one would answer twice.
        patience = self.timeout_s / ACTOR_TRIES if len(self.actors) > 1 else self.timeout_s
        answered = None  # what the last actor to answer said: it tells more than the silence that follows
        while True:
            try:
                return ray.get(pending.reference, timeout=max(0.0, min(patience, pending.deadline - time.monotonic())))
            except (*ACTOR_LOST, GetTimeoutError, RayTaskError) as error:
                reason = own_error(error) if isinstance(error, RayTaskError) else error
                if isinstance(error, RayTaskError) and not isinstance(reason, (WrongVersion, *ACTOR_LOST)):
                    raise reason from error
                if not isinstance(reason, GetTimeoutError):
                    answered = reason
                if time.monotonic() + RETRY_S >= pending.deadline:
                    raise PoolUnavailable(f"none of {len(self.actors)} inference actors answered within "
                                          f"{self.timeout_s:g} s: {first_line(answered or reason)}") from error
                logger.info("inference request goes to another actor: %s", type(error).__name__)
                self.retries += 1
                time.sleep(RETRY_S)
                pending.reference = self._send(pending.request)

    def _send(self, request: ActRequest) -> ray.ObjectRef:
        self._next = (self._next + 1) % len(self.actors)
        return self.actors[self._next].act.remote(request)
