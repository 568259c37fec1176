"""Keeps workers busy with tickets, replaces those that die, hang or lose their node, and runs every ticket to its end.

Demonstrations, rollouts, evaluation and audits all go through a fleet. The fleet hands a dead worker's tickets out again. That does no
harm: the store commits an episode once per key, and an audit's answer depends on its ticket alone. The fleet itself knows no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cosmos_ray.errors import CosmosRayError
from cosmos_ray.rollout.ledger import Ledger
from cosmos_ray.rollout.line import Line
from cosmos_ray.rollout.ticket import SimulatorDied, Waiting
from cosmos_ray.supervision import PROBE_S, WORKER_START_S, WORKER_STARTS, WORKER_STARTS_S, RestartBudget, Supervisor

if TYPE_CHECKING:
    from cosmos_ray.rollout.calls import RayCalls


class Crew(Protocol):
    """Places workers, each with a number. A worker has ``advance(tickets, seconds) -> [answer]``: an answer has the ``name`` that its
    ticket finished under, and says in ``broken`` why the ticket broke its simulator ("" if it did not)."""

    def start(self, index: int) -> Any | None:
        """Start worker ``index`` and return its handle at once; None where no node has room now: the fleet asks again."""

    def should_move(self, index: int) -> bool:
        """Whether a node has joined on which worker ``index`` would have clearly more CPU: the fleet restarts it between two tickets."""

    def where(self, index: int) -> str:
        """Node of worker ``index``, for messages; while the worker has no place, what it asks for and what each node has."""


class WorkerLost(CosmosRayError):
    """The worker of a call is gone; ``with_node``: because its node is, which is no ticket's fault."""

    def __init__(self, why: str, with_node: bool = False):
        super().__init__(why)
        self.with_node = with_node


class WorkerTrouble(CosmosRayError):
    """Workers keep dying before they have answered once."""


@dataclass
class _Seat:
    """A worker, or the place for one."""

    index: int
    handle: Any = None  #: None: empty
    call: Any = None
    called: float = 0.0
    answered: bool = False  #: whether the worker ever answered; it gets no ticket before
    tickets: dict[str, Any] = field(default_factory=dict)  #: name -> ticket, given out and not finished
    given: dict[str, float] = field(default_factory=dict)  #: name -> when that ticket was given out
    kinds: set[str] = field(default_factory=set)  #: of the tickets that it was given
    moving: bool = False  #: gets no more tickets, and starts elsewhere once it holds none
    waits_for: str = ""  #: in the worker's own words
    resting: str = ""  #: why no worker is started here for now


class Fleet:
    """Runs tickets on the workers of a crew, within :meth:`poll`.

    Args:
        count: number of workers; the fleet goes on with those that find a place.
        capacity: tickets a worker holds at once.
        name_of: the names that a ticket may finish under, such as those of its episode in the store.
        kind_of: what a ticket needs that a worker keeps, such as its task: a worker gets tickets of a kind that it has had, then of one
            that no other worker has had, then the oldest.
        deadline_s: seconds without an answer after which a worker is replaced.
        who: what a worker is called in messages.
        turn_s: seconds that a worker works before it answers.
    """

    def __init__(self, crew: Crew, calls: RayCalls, count: int, capacity: int, name_of: Callable[[Any], tuple[str, ...]], deadline_s: float,
                 supervisor: Supervisor, who: str = "rollout worker", turn_s: float = 1.0, clock: Callable[[], float] = time.monotonic,
                 kind_of: Callable[[Any], str] = lambda ticket: ""):
        self._crew, self._calls, self._supervisor, self._clock = crew, calls, supervisor, clock
        self._capacity, self._names, self._deadline, self._who, self._turn = capacity, name_of, deadline_s, who, turn_s
        self._kind = kind_of
        self._seats = [_Seat(i) for i in range(count)]
        self._line = Line(kind_of)
        self._starts = RestartBudget(WORKER_STARTS * count, WORKER_STARTS_S, clock)  #: workers that died before their first answer
        self._ledger = Ledger()
        supervisor.shows(f"{who}s", self.view)
        self.quarantined = self._ledger.quarantined  #: name -> reason, of tickets that broke too many workers
        self.replaced = 0  #: workers that died, hung or lost their node
        self._probe()

    @property
    def capacity(self) -> int:
        """Tickets that can be running at once, when every worker has a place."""
        return self._capacity * len(self._seats)

    @property
    def outstanding(self) -> int:
        """Tickets submitted and not finished."""
        return len(self._line) + sum(len(seat.tickets) for seat in self._seats)

    def submit(self, tickets: list[Any]) -> None:
        """Add tickets at the end of the line."""
        for ticket in tickets:
            self._line.append(ticket)

    def view(self) -> list[dict[str, Any]]:
        """How every worker is: {who, where, waits_for, tickets, asked_s, oldest, oldest_s}; times in seconds ago."""
        now, rows = self._clock(), []
        for seat in self._seats:
            oldest = min(((since, name) for name, since in seat.given.items() if name in seat.tickets), default=None)
            rows.append({"who": f"{self._who} {seat.index}", "where": self._crew.where(seat.index), "tickets": len(seat.tickets),
                         "waits_for": seat.waits_for or ("a place" if seat.handle is None else "" if seat.answered else "its start"),
                         "asked_s": None if seat.call is None else round(now - seat.called, 1), "oldest": oldest and oldest[1],
                         "oldest_s": oldest and round(now - oldest[0], 1)})
        return rows

    def poll(self, timeout: float) -> list[Any]:
        """Hand out work, wait up to ``timeout`` seconds for a worker to answer, and return the results. Does not wait when idle.

        Raises what a worker raised on purpose (a full disk, a wrong model), because every worker would meet the same. A worker that raises
        in its first answer, when others have given theirs, counts as dead.
        """
        if self._clock() >= self._probe_at:
            self._probe()
        for seat in sorted(self._seats, key=lambda seat: seat.called):  # few tickets go round all workers
            if seat.answered and seat.call is None:
                self._go_on(seat)
        calls = {seat.call: seat for seat in self._seats if seat.call is not None}
        ended = self._calls.ended(list(calls), timeout if self.outstanding else 0.0)
        finished = [answer for call in ended for answer in self._collect(calls[call])]
        for seat in calls.values():
            patience = self._deadline if seat.answered else max(self._deadline, WORKER_START_S)
            if seat.call is not None and self._clock() - seat.called > patience:
                self._lose(seat, f"no answer for {patience:g} s")
        self._say_waits()
        return finished

    def close(self) -> None:
        """Stop the workers."""
        for seat in self._seats:
            if seat.handle is not None:
                self._calls.stop(seat.handle)
                self._vacate(seat)
        self._line.clear()
        self._supervisor.shows(f"{self._who}s", None)
        self._say_waits()  # which have ended

    def _probe(self) -> None:
        """Fill the empty seats, and let one crowded worker move."""
        self._probe_at = self._clock() + PROBE_S
        for seat in self._seats:
            if seat.handle is None and (not seat.resting or self._starts.take()):
                seat.resting, seat.handle = "", self._crew.start(seat.index)
                if seat.handle is not None:  # in an empty turn the worker makes what it needs
                    seat.call, seat.called = self._calls.advance(seat.handle, [], 0.0), self._clock()
        if all(seat.answered and not seat.moving for seat in self._seats):
            for seat in [seat for seat in self._seats if self._crew.should_move(seat.index)][:1]:
                seat.moving = True
        if all(seat.handle is None for seat in self._seats) and (why := max(seat.resting for seat in self._seats)):
            raise WorkerTrouble(f"{self._who}s died {self.replaced} times and none of the present ones has answered: {why}; if memory is "
                                "short, lower rollout.workers or rollout.envs_per_worker")

    def _go_on(self, seat: _Seat) -> None:
        """Give a worker fresh tickets and its next turn, or a new place."""
        if seat.moving and not seat.tickets:
            self._calls.stop(seat.handle)
            self._vacate(seat)
            return
        fresh: list[Any] = []
        # Shares are even, so that the last tickets of a queue do not all land on one worker.
        working = sum(s.answered and not s.moving for s in self._seats)
        room = 0 if seat.moving else min(self._capacity, -(-self.outstanding // working)) - len(seat.tickets)
        others = {kind for other in self._seats if other is not seat for kind in other.kinds}
        while len(fresh) < room and len(self._line):
            # A suspect runs alone: whatever takes the worker down then, it was not its neighbour.
            held, ticket = [*seat.tickets.values(), *fresh], self._line.next(seat.kinds, others)
            if held and any(self._ledger.suspect(self._names(one)[0]) for one in [*held, ticket]):
                break
            self._line.take(ticket)
            fresh.append(ticket)
            seat.kinds.add(self._kind(ticket))
        for ticket in fresh:
            seat.tickets[self._names(ticket)[0]], seat.given[self._names(ticket)[0]] = ticket, self._clock()
        if seat.tickets:
            seat.call, seat.called = self._calls.advance(seat.handle, fresh, self._turn), self._clock()

    def _collect(self, seat: _Seat) -> list[Any]:
        """The results that an ended call brought."""
        try:
            answers = self._calls.answers(seat.call)
        except WorkerLost as error:
            self._lose(seat, str(error), error.with_node)
            return []
        except CosmosRayError as error:
            if seat.answered or not any(other.answered for other in self._seats):
                raise
            self._lose(seat, str(error))  # a node without a simulator does not stop the others
            return []
        seat.call, seat.answered, finished = None, True, []
        seat.waits_for = next((answer.on for answer in answers if isinstance(answer, Waiting)), "")
        if not seat.waits_for:
            self._supervisor.goes_on(f"{self._who} {seat.index}")
        for answer in [answer for answer in answers if isinstance(answer, SimulatorDied)]:
            self._supervisor.died(f"simulator of {self._who} {seat.index} on {self._crew.where(seat.index)}", answer.why, answer.then)
        for answer in [answer for answer in answers if not isinstance(answer, (SimulatorDied, Waiting))]:
            for name in [name for name, ticket in seat.tickets.items() if answer.name in self._names(ticket)]:
                ticket = seat.tickets.pop(name)
                if not answer.broken:
                    finished.append(answer)
                elif self._ledger.strike(name, answer.broken):
                    self._line.put_back(ticket)
        self._ledger.finished += len(finished)
        return finished

    def _lose(self, seat: _Seat, why: str, with_node: bool = False) -> None:
        """Empty the seat of a worker that is gone, and queue its tickets again."""
        self.replaced += 1
        who = f"{self._who} {seat.index} on {self._crew.where(seat.index)}"
        self._supervisor.died(who, why, f"{len(seat.tickets)} tickets start again")
        self._calls.stop(seat.handle)
        seat.call = None
        self._vacate(seat, "" if seat.answered or with_node or self._starts.take() else why)
        for name, ticket in seat.tickets.items():
            if with_node or self._ledger.strike(name, why, alone=len(seat.tickets) == 1):
                self._line.put_back(ticket)

    def _vacate(self, seat: _Seat, resting: str = "") -> None:
        self._seats[seat.index] = _Seat(seat.index, resting=resting)
        self._supervisor.goes_on(f"{self._who} {seat.index}")
        self._probe_at = self._clock() if seat.answered else self._probe_at  # a worker that worked is replaced at once

    def _say_waits(self) -> None:
        """Say what takes long: a place, a first answer, an answer."""
        empty = [seat for seat in self._seats if seat.handle is None]
        starting = [seat for seat in self._seats if seat.handle is not None and not seat.answered]
        for who, seats, what in ((f"{self._who}s", empty, "a place for"), (f"starting {self._who}s", starting, "the first answer of")):
            if seats and self.outstanding:
                where = seats[0].resting or self._crew.where(seats[0].index)
                self._supervisor.waits(who, f"{what} {len(seats)} of {len(self._seats)} ({where})")
            else:
                self._supervisor.goes_on(who)
        for seat in self._seats:
            if seat.call is not None and seat.answered and self._deadline < float("inf"):
                on = seat.waits_for or f"an answer on {len(seat.tickets)} tickets from {self._crew.where(seat.index)}"
                self._supervisor.waits(f"{self._who} {seat.index}", on)


def run_tickets(fleet: Fleet, tickets: Sequence[Any], take: Callable[[list[Any]], None]) -> None:
    """Run ``tickets`` to their end. ``take`` gets the answers of every poll, once a second at the latest, also when there are none."""
    fleet.submit(list(tickets))
    while fleet.outstanding:
        take(fleet.poll(timeout=1.0))
