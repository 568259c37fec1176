"""Keeps worker actors busy with tickets, replaces the workers that die or hang, and runs every ticket to its end.

Demonstrations, rollouts, evaluation and audits all go through a fleet. The fleet hands a dead worker's tickets out again. That does no
harm: the store commits an episode once per key, and an audit's answer depends on its ticket alone.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from cosmos_ray.errors import CosmosRayError
from cosmos_ray.remote import ACTOR_LOST, first_line, own_error

logger = logging.getLogger(__name__)

ATTEMPTS = 3  #: times a ticket may take its worker down with it before the run gives up on that ticket
START_S = 240.0  #: allowance for a worker's first answer: imports, model build, kernels


class Answer(Protocol):
    """What a worker returns for a ticket."""

    @property
    def name(self) -> str:
        """The name that the ticket finished under."""
        ...

    @property
    def broken(self) -> str:
        """Why the ticket broke its simulator; "" if it gave a result."""
        ...


class WorkerTrouble(CosmosRayError):
    """Workers keep dying without finishing anything."""


@dataclass
class _Worker:
    actor: ActorHandle
    tickets: dict[str, Any] = field(default_factory=dict)  #: name -> ticket, given out and not finished
    call: ray.ObjectRef | None = None
    called: float = 0.0
    answered: bool = False  #: whether this actor ever answered


class Fleet:
    """Workers with an ``advance(tickets, seconds) -> [Answer]`` method.

    Args:
        spawn: starts worker ``index`` and returns its handle.
        count: number of workers.
        capacity: tickets a worker holds at once.
        name_of: the names that a ticket may finish under, such as those of its episode in the store.
        deadline_s: seconds without an answer after which a worker is replaced.
        turn_s: seconds that a worker works before it answers.
    """

    def __init__(self, spawn: Callable[[int], ActorHandle], count: int, capacity: int, name_of: Callable[[Any], tuple[str, ...]],
                 deadline_s: float, turn_s: float = 1.0):
        self._spawn, self._capacity, self._names, self._deadline, self._turn = spawn, capacity, name_of, deadline_s, turn_s
        self._workers = [_Worker(spawn(i)) for i in range(count)]
        self._queue: deque[Any] = deque()
        self._deaths: dict[str, int] = {}
        self.replaced = 0  #: workers that died or hung and were replaced
        self.quarantined: dict[str, str] = {}  #: name -> reason, of tickets given up after ``ATTEMPTS`` attempts

    @property
    def capacity(self) -> int:
        """Tickets that can be running at once."""
        return self._capacity * len(self._workers)

    @property
    def outstanding(self) -> int:
        """Tickets submitted and not finished."""
        return len(self._queue) + sum(len(w.tickets) for w in self._workers)

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return ray.get([w.actor.pid.remote() for w in self._workers])

    def submit(self, tickets: list[Any]) -> None:
        """Add tickets to the queue."""
        self._queue.extend(tickets)

    def poll(self, timeout: float) -> list[Any]:
        """Hand out work, wait up to ``timeout`` seconds for a worker to answer, and return the answers.

        Raises what a worker raised on purpose (a full disk, a wrong model), because every worker would meet the same.
        """
        for worker in self._workers:
            if worker.call is None:
                self._hand_out(worker)
        calls = {w.call: w for w in self._workers if w.call is not None}
        if not calls:
            return []
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=timeout)
        if ready:
            ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        finished: list[Any] = []
        for call in ready:
            finished += self._collect(calls[call], call)
        for i, worker in enumerate(self._workers):
            patience = self._deadline if worker.answered else max(self._deadline, START_S)
            if worker.call is not None and worker.call not in ready and time.monotonic() - worker.called > patience:
                self._replace(i, f"no answer for {patience:g} s")
        return finished

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            ray.kill(worker.actor)

    def _hand_out(self, worker: _Worker) -> None:
        # Shares are even, so that the last tickets of a queue do not all land on one worker.
        share = -(-(len(self._queue) + sum(len(w.tickets) for w in self._workers)) // len(self._workers))
        room = min(self._capacity, max(share, 1)) - len(worker.tickets)
        fresh: list[Any] = []
        while len(fresh) < room and self._queue:
            # The last attempt of a ticket runs alone: whatever takes the worker down then, it was not its neighbour.
            last = self._on_last_attempt(self._queue[0])
            if (last and (fresh or worker.tickets)) or any(map(self._on_last_attempt, worker.tickets.values())):
                break
            fresh.append(self._queue.popleft())
            if last:
                break
        for ticket in fresh:
            worker.tickets[self._names(ticket)[0]] = ticket
        if worker.tickets:
            worker.call, worker.called = worker.actor.advance.remote(fresh, self._turn), time.monotonic()

    def _on_last_attempt(self, ticket: Any) -> bool:
        return self._deaths.get(self._names(ticket)[0], 0) == ATTEMPTS - 1

    def _collect(self, worker: _Worker, call: ray.ObjectRef) -> list[Any]:
        try:
            finished: list[Answer] = ray.get(call)
        except RayTaskError as error:
            raise own_error(error) from error
        except ACTOR_LOST as error:
            self._replace(self._workers.index(worker), first_line(error))
            return []
        worker.call, worker.answered = None, True
        for answer in finished:
            for name, ticket in list(worker.tickets.items()):
                if answer.name in self._names(ticket):
                    del worker.tickets[name]
                    if answer.broken:
                        self._again(name, ticket, answer.broken)
        return [answer for answer in finished if not answer.broken]

    def _again(self, name: str, ticket: Any, reason: str) -> None:
        """Queue a ticket that broke something again, or give it up."""
        self._deaths[name] = self._deaths.get(name, 0) + 1
        if self._deaths[name] < ATTEMPTS:
            self._queue.appendleft(ticket)
        else:
            logger.error("ticket %s is given up after %d attempts: %s", name, ATTEMPTS, reason)
            self.quarantined[name] = reason

    def _replace(self, index: int, reason: str) -> None:
        """Start a new worker in place of a dead one, and hand the dead one's tickets out again."""
        worker = self._workers[index]
        logger.warning("worker %d is replaced (%s); %d tickets start again", index, reason, len(worker.tickets))
        ray.kill(worker.actor)
        self.replaced += 1
        for name, ticket in worker.tickets.items():
            self._again(name, ticket, reason)
        if self.replaced > 5 * len(self._workers) and not any(w.answered for w in self._workers):
            raise WorkerTrouble(f"workers died {self.replaced} times and none of the present ones has answered: {reason}; if "
                                "memory is short, lower rollout.workers or rollout.envs_per_worker")
        self._workers[index] = _Worker(self._spawn(index))


def run_tickets(fleet: Fleet, tickets: Sequence[Any], take: Callable[[list[Any]], None]) -> None:
    """Run ``tickets`` to their end. ``take`` gets the answers of every poll, once a second at the latest, also when there are none."""
    fleet.submit(list(tickets))
    while fleet.outstanding:
        take(fleet.poll(timeout=1.0))
