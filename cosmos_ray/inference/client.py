"""The worker's side of the pool: sends a request, and survives the death of the actor that was to answer."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayTaskError

from cosmos_ray.errors import PoolUnavailable
from cosmos_ray.inference.messages import ActReply, ActRequest, Busy, Expired, WrongVersion
from cosmos_ray.remote import ACTOR_LOST, first_line, own_error
from cosmos_ray.supervision import SAY_AFTER_S, Supervisor

logger = logging.getLogger(__name__)

RETRY_S = 0.25  #: pause before a request is sent again
STALE_S = 5.0  #: after which what an actor told of its load counts no more
LOST = 10**6  #: load of an actor that failed a request, so that the others are asked for a while
ASK_ANOTHER = (WrongVersion, Busy, Expired)  #: what an actor says where another one may answer
ACTOR_TRIES = 3  #: actors that one request can wait for: each gets this fraction of the timeout to answer


class Loads:
    """Which actor has least to do, as one client knows: by what its answers told, and by what the client has sent since.

    What an actor told is forgotten after ``STALE_S`` seconds. Among equals the actors take turns.
    """

    def __init__(self, count: int, start: int = 0, clock: Callable[[], float] = time.monotonic):
        self._loads, self._told, self._clock = [0] * count, [clock()] * count, clock
        self._last = start % count

    def choose(self, rows: int) -> int:
        """The actor for a request of ``rows`` rows, which count as its load from now on."""
        now, count = self._clock(), len(self._loads)
        for index, told in enumerate(self._told):
            if now - told > STALE_S:
                self.tell(index, 0)
        in_turn = [(self._last + 1 + i) % count for i in range(count)]
        self._last = min(in_turn, key=lambda index: self._loads[index])  # the first of equals
        self._loads[self._last] += rows
        return self._last

    def tell(self, index: int, load: int) -> None:
        """Take in the load of an actor."""
        self._loads[index], self._told[index] = load, self._clock()


@dataclass
class Pending:
    """A request in flight."""

    request: ActRequest
    reference: ray.ObjectRef
    deadline: float
    actor: ActorHandle  #: that it was sent to


class PoolClient:
    """Sends each request to the actor with least to do. When an actor dies or holds the wrong version, its request goes to another one."""

    def __init__(self, actors: list[ActorHandle], timeout_s: float, start: int = 0):
        self.actors, self.timeout_s = actors, timeout_s
        self.retries = 0
        self._loads, self._start = Loads(len(actors), start), start
        self._changes = 0  #: of the pool, that this client knows of
        self._news: ray.ObjectRef | None = None  #: the pool's present actors, asked for
        self._supervisor, self._who = Supervisor(), f"client {start} of the inference pool"

    def submit(self, request: ActRequest) -> Pending:
        """Send without waiting."""
        deadline = time.monotonic() + self.timeout_s
        reference, actor = self._send(request, deadline)
        return Pending(request, reference, deadline, actor)

    def result(self, pending: Pending) -> ActReply:
        """Wait for the answer. PoolUnavailable when no actor gave one within ``timeout_s`` of :meth:`submit`."""
        # Silence is only a reason to ask again where another actor can be asked: a busy one would answer twice.
        patience = self.timeout_s / ACTOR_TRIES if len(self.actors) > 1 else self.timeout_s
        answered = None  # what the last actor to answer said: it tells more than the silence that follows
        while True:
            try:
                reply = self._await(pending.reference, min(time.monotonic() + patience, pending.deadline))
                self._tell(pending.actor, reply.load)
                if reply.pool > self._changes and self._news is None:
                    self._news = pending.actor.peers.remote()
                self._supervisor.goes_on(self._who)
                return reply
            except (*ACTOR_LOST, GetTimeoutError, RayTaskError) as error:
                reason = own_error(error) if isinstance(error, RayTaskError) else error
                if isinstance(error, RayTaskError) and not isinstance(reason, (*ASK_ANOTHER, *ACTOR_LOST)):
                    raise reason from error
                if isinstance(reason, GetTimeoutError):
                    ray.cancel(pending.reference)  # nobody awaits that answer now
                elif not isinstance(reason, Expired):
                    answered = reason
                if time.monotonic() + RETRY_S >= pending.deadline:
                    self._supervisor.goes_on(self._who)
                    raise PoolUnavailable(f"none of {len(self.actors)} inference actors answered within "
                                          f"{self.timeout_s:g} s: {first_line(answered or reason)}") from error
                logger.info("inference request goes to another actor: %s", type(error).__name__)
                self.retries += 1
                time.sleep(RETRY_S)
                self._tell(pending.actor, LOST)
                pending.reference, pending.actor = self._send(pending.request, pending.deadline)

    def _send(self, request: ActRequest, deadline: float) -> tuple[ray.ObjectRef, ActorHandle]:
        self._hear()
        actor = self.actors[self._loads.choose(len(request.seeds))]
        within = max(0.0, deadline - time.monotonic())
        return actor.act.remote(dataclasses.replace(request, within_s=within)), actor

    def _tell(self, actor: ActorHandle, load: int) -> None:
        if actor in self.actors:  # else it has left the pool
            self._loads.tell(self.actors.index(actor), load)

    def _hear(self) -> None:
        """Take in the pool's present actors, if they were asked for and are known."""
        if self._news is None or not ray.wait([self._news], timeout=0)[0]:
            return
        news, self._news = self._news, None
        try:
            change, actors = ray.get(news)
        except ACTOR_LOST:
            return  # the next reply tells of it again
        if change > self._changes:
            self._changes, self.actors = change, actors
            self._loads = Loads(len(actors), self._start)

    def _await(self, reference: ray.ObjectRef, until: float) -> ActReply:
        """The answer, or GetTimeoutError at the time ``until``. A wait of more than ten seconds is said."""
        while True:
            self._supervisor.waits(self._who, "an answer of an inference actor")
            left = until - time.monotonic()
            try:
                return ray.get(reference, timeout=max(0.0, min(SAY_AFTER_S, left)))
            except GetTimeoutError:
                if left <= SAY_AFTER_S:
                    raise
