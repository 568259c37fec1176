"""The driver's side of the pool: start the actors, push weights, bring late and restarted ones up to date."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayTaskError

from cosmos_ray.config import InferenceConfig, PlannerConfig
from cosmos_ray.errors import CheckpointError, PoolUnavailable
from cosmos_ray.inference.actor import InferenceActor, WeightsLate, WeightsLost
from cosmos_ray.inference.demand import Demand
from cosmos_ray.inference.messages import ActingPolicy
from cosmos_ray.remote import ACTOR_LOST, answers, first_line, own_error, why_lost
from cosmos_ray.supervision import COMPILE_S, POOL_START_S, PROBE_S, PUSH_S, SILENT_S, Supervisor
from cosmos_ray.weights import Weights

logger = logging.getLogger(__name__)

POLL_S = 0.05  #: between two looks while the pool settles
LEAVE_S = 10.0  #: in which clients hear that an actor leaves the pool


@dataclass(frozen=True)
class PushedWeights:
    """Weights in Ray's object store that every actor should hold."""

    weights: Weights  #: with a reference as data
    planning_checkpoint: str = ""  #: none: the learner pushes policies that score their own candidates
    within_s: float = PUSH_S

    @property
    def version(self) -> int:
        return self.weights.version

    def give(self, actor: ActorHandle) -> ray.ObjectRef:
        return actor.set_weights.remote(self.weights)

    def is_held(self, version: int, planning_checkpoint: str) -> bool:
        return version >= self.version


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that every actor should hold, with the planning network beside it."""

    version: int
    checkpoint: str
    planning_checkpoint: str
    planner: PlannerConfig | None = None  #: that requests will ask for
    within_s: float = POOL_START_S

    def give(self, actor: ActorHandle) -> ray.ObjectRef:
        return actor.load.remote(self.checkpoint, self.planning_checkpoint, self.planner)

    def is_held(self, version: int, planning_checkpoint: str) -> bool:
        return (version, planning_checkpoint) == (self.version, self.planning_checkpoint)


class MoreActors(Protocol):
    """Room for inference actors beyond the first ones."""

    def resize(self, count: int) -> None:
        """Have actors 0 to ``count`` - 1 from now on; the room of the others is given back."""

    def start(self, index: int) -> ActorHandle | None:
        """Start actor ``index`` where there is room now; None where there is none."""


@dataclass
class _Seat:
    """One actor as the driver knows it. Times are of ``time.monotonic``."""

    actor: ActorHandle
    who: str
    process: tuple[str, int]  #: node and process id
    held: tuple[int, str] | None  #: version and planning checkpoint; None when it has to be given anew
    probe: ray.ObjectRef | None = None  #: its status, asked for
    probed: float = 0.0
    answered: float = field(default_factory=time.monotonic)
    delivery: ray.ObjectRef | None = None  #: its answer to ``given``
    given: PushedWeights | LoadedCheckpoint | None = None
    since: float = 0.0  #: when the delivery began
    lost: float | None = None  #: since when its process is gone and no new one has answered
    mourned: bool = False  #: whether that death was said
    pool: int = 0  #: change of the pool that the actor knows of
    waiting: int = 0  #: rows, when it was asked last
    computing: int = 0

    def forget(self) -> None:
        """Drop the calls that are on their way."""
        self.probe = self.delivery = None


class InferencePool:
    """Handles of the inference actors, and what these actors should hold.

    The actors start when the pool is made. Nothing here waits but :meth:`start`, which comes first: :meth:`push` and :meth:`load` say what
    is wanted, and :meth:`poll`, called again and again, has every actor get it, those included that are late, restarted or silent now.
    Actors serve what they hold until then.
    """

    def __init__(self, checkpoint: str | Path, config: InferenceConfig, options: Sequence[dict[str, Any]],
                 supervisor: Supervisor | None = None, instructions: Sequence[str] = (),
                 more: Callable[[Callable[[int, dict[str, Any]], ActorHandle]], MoreActors] | None = None):
        """Have the actors start; ``options`` are Ray's options of each, ``instructions`` those that will come, if they are known.

        ``more`` makes the room for further actors from what starts one of them, as :meth:`Placement.crew` does.
        """
        environment = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(config.threads)}}}
        actor_class: Any = InferenceActor  # ray.remote adds `options`, which its type stubs do not declare
        given = str(Path(checkpoint).resolve()), config, tuple(instructions)
        self.actors: list[ActorHandle] = [actor_class.options(**own, **environment).remote(*given) for own in options]
        self.restarts = self.changes = 0
        self._supervisor = supervisor or Supervisor()
        self._wanted: PushedWeights | LoadedCheckpoint | None = None  #: None: what the actors hold, whatever it is
        self._seats: list[_Seat] = []
        self._demand = Demand(len(options), config.max_actors, config.max_batch)
        self._more = more and more(lambda index, own: actor_class.options(**own, **environment, max_restarts=0).remote(*given))
        self._joining: tuple[ActorHandle, ray.ObjectRef] | None = None  #: a further actor, and its first status
        self._tried = 0.0  #: when room for one was looked for
        self._leaving: list[tuple[_Seat, float]] = []  #: since when nobody new is sent to it
        self._first: list[ray.ObjectRef] = [actor.status.remote() for actor in self.actors]
        compiles = config.accelerate != "none"
        self._start_s = POOL_START_S + (COMPILE_S if compiles else 0)
        self._supervisor.shows("inference actors", self.view)
        self._awaited = f"torch and {Path(checkpoint).name}" + (", compiled for every size of batch" if compiles else "")

    def start(self) -> InferencePool:
        """Wait until every actor has answered once, and return the pool. CheckpointError, PoolUnavailable."""
        try:
            statuses = answers(self._first, "inference pool", f"the first answer of its {len(self.actors)} actors ({self._awaited})",
                               self._supervisor, self._start_s)
        except GetTimeoutError as error:
            raise PoolUnavailable(f"the inference actors did not start within {self._start_s:g} s: are their machines "
                                  "busy?") from error
        except ACTOR_LOST as error:
            raise CheckpointError(f"an inference actor could not start: {why_lost(error)}") from error
        self._seats = [_Seat(actor, f"inference actor {i}", _process(status), _held(status))
                       for i, (actor, status) in enumerate(zip(self.actors, statuses, strict=True))]
        return self

    def push(self, weights: Weights) -> None:
        """Have every actor take newer weights, which are in Ray's object store, while the actors keep serving."""
        self._wanted = PushedWeights(weights)
        self._deliver()

    def load(self, checkpoint: str | Path, acting: ActingPolicy) -> None:
        """Have every actor switch to the policy of ``checkpoint`` and to the planning network of ``acting``."""
        if acting.version is None:
            raise ValueError("a checkpoint is loaded with its version: requests insist on that version")
        self._wanted = LoadedCheckpoint(acting.version, str(Path(checkpoint).resolve()), acting.planning_checkpoint,
                                        acting.planner, self._start_s)
        for seat in self._seats:
            seat.held = None
        self._deliver()

    def settle(self) -> None:
        """Wait until an actor holds what was pushed or loaded last. Raises as :meth:`poll`."""
        while self._wanted is not None and not self.holders:
            self.poll()
            time.sleep(POLL_S)

    @property
    def holders(self) -> int:
        """Actors that hold what was pushed or loaded last."""
        return sum(seat.lost is None and not self._lacks(seat) for seat in self._seats)

    def poll(self) -> None:
        """Look after the actors: what they hold, those that Ray restarted, those that are silent. Never waits; to be called often.

        Raises what an actor says about weights or a checkpoint that cannot be taken (CheckpointError), once; PoolUnavailable when all
        actors have been gone for as long as a start may take.
        """
        for seat in [*self._seats, *(seat for seat, _ in self._leaving)]:
            self._look(seat)
        self._deliver()
        if self._more is not None:
            self._scale(self._more)

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

    def view(self) -> list[dict[str, Any]]:
        """How every actor is: {who, version, wanted, answered_s, waiting, computing, lost, taking_s}; versions of the policy, rows, and
        seconds ago."""
        now, wanted = time.monotonic(), self._wanted
        return [{"who": seat.who, "version": seat.held and seat.held[0], "wanted": wanted and wanted.version,
                 "answered_s": round(now - seat.answered, 1), "waiting": seat.waiting, "computing": seat.computing,
                 "lost": seat.lost is not None, "taking_s": None if seat.delivery is None else round(now - seat.since, 1)}
                for seat in list(self._seats)]

    def close(self) -> None:
        """Stop the actors."""
        self._supervisor.shows("inference actors", None)
        for actor in [*self.actors, *(seat.actor for seat, _ in self._leaving), *(self._joining or ())[:1]]:
            ray.kill(actor)

    # ---------------------------------------------------------------- how many are there

    def _scale(self, more: MoreActors) -> None:
        """Start one more actor, or end one, as the requests ask for; tell the actors who there is."""
        now, first, there = time.monotonic(), self._demand.least, len(self._seats)
        lost = [seat for seat in self._seats[first:] if seat.lost is not None]  # nobody starts it again
        if self._joining is not None:
            self._join(*self._joining)
        elif lost:
            self._leave(lost[0])
        elif not self._leaving:
            wanted = self._demand.look([seat.waiting for seat in self._seats], [seat.computing for seat in self._seats])
            more.resize(max(wanted, there) - first)
            if wanted > there and now - self._tried >= PROBE_S:
                self._tried = now
                if (actor := more.start(there - first)) is not None:
                    logger.info("requests queue: inference actor %d starts, of at most %d", there, self._demand.most)
                    self._joining = actor, actor.status.remote()
            elif wanted < there:
                logger.info("%s has nothing to do and ends", self._seats[-1].who)
                self._leave(self._seats[-1])
        for seat, since in list(self._leaving):
            if seat.lost is not None or now - since > LEAVE_S and not seat.waiting + seat.computing:
                self._supervisor.goes_on(seat.who)
                ray.kill(seat.actor)
                self._leaving.remove((seat, since))
                more.resize(len(self._seats) - first)
        actors = [seat.actor for seat in self._seats if seat.actor in self.actors or not self._lacks(seat)]
        if actors != self.actors:
            self.actors, self.changes = actors, self.changes + 1
        for seat in [*self._seats, *(seat for seat, _ in self._leaving)]:
            if seat.pool < self.changes:
                seat.actor.know.remote(self.changes, list(self.actors))
                seat.pool = self.changes

    def _join(self, actor: ActorHandle, first: ray.ObjectRef) -> None:
        """Give a further actor its seat, once it has started. Clients hear of it once it holds what the others should hold."""
        if not _done(first):
            return
        self._joining = None
        try:
            status = ray.get(first)
        except ACTOR_LOST as error:
            logger.warning("a further inference actor could not start: %s", why_lost(error))
            return
        self._seats.append(_Seat(actor, f"inference actor {len(self._seats)}", _process(status), _held(status)))

    def _leave(self, seat: _Seat) -> None:
        self._seats.remove(seat)
        self._leaving.append((seat, time.monotonic()))

    # ---------------------------------------------------------------- are they there

    def _look(self, seat: _Seat) -> None:
        """Take in an actor's status, and ask for the next one."""
        now = time.monotonic()
        if seat.probe is None:
            if now - seat.probed >= PROBE_S:
                seat.probe, seat.probed = seat.actor.status.remote(), now
        elif _done(seat.probe):
            probe, seat.probe = seat.probe, None
            try:
                self._answered(seat, ray.get(probe))
            except ACTOR_LOST as error:
                self._lost(seat, error)
        else:
            self._supervisor.waits(seat.who, "an answer")
            if now - seat.probed > SILENT_S:
                self._died(seat, f"no answer for {SILENT_S:g} s", "it is killed, and Ray starts it again")
                seat.lost = seat.lost or now
                seat.forget()
                ray.kill(seat.actor, no_restart=False)

    def _answered(self, seat: _Seat, status: dict) -> None:
        self._supervisor.goes_on(seat.who)
        if seat.process != (process := _process(status)):
            self._died(seat, "its process ended", "Ray has started it again")
            seat.process, seat.mourned, seat.delivery = process, False, None
            self.restarts += 1
        seat.lost, seat.answered = None, time.monotonic()
        seat.waiting, seat.computing, seat.pool = status["waiting"], status["computing"], status["pool"]
        if seat.delivery is None:
            seat.held = _held(status)

    def _lost(self, seat: _Seat, error: BaseException) -> None:
        """Its process is gone or cannot be reached. Where it is gone Ray starts another one."""
        now = time.monotonic()
        seat.forget()
        seat.lost = seat.lost or now
        if not isinstance(error, ActorUnavailableError):
            self._died(seat, why_lost(error), "nobody can start it again")
        self._supervisor.waits(seat.who, f"its restart ({first_line(error)})")
        if all(seat.lost is not None and now - seat.lost > self._start_s for seat in self._seats):
            raise PoolUnavailable(f"no inference actor has come back for {self._start_s:g} s: {why_lost(error)}; see what the machines "
                                  "lack (memory, GPUs), then run the same command again")

    def _died(self, seat: _Seat, why: str, then: str) -> None:
        if not seat.mourned:
            self._supervisor.died(seat.who, why, then)
        seat.mourned = True

    # ---------------------------------------------------------------- what do they hold

    def _deliver(self) -> None:
        for seat in self._seats:
            if seat.delivery is not None:
                self._collect(seat)
            if self._wanted is not None and seat.delivery is None and seat.lost is None and self._lacks(seat):
                seat.delivery, seat.given, seat.since = self._wanted.give(seat.actor), self._wanted, time.monotonic()

    def _lacks(self, seat: _Seat) -> bool:
        return self._wanted is not None and (seat.held is None or not self._wanted.is_held(*seat.held))

    def _collect(self, seat: _Seat) -> None:
        """Take in what became of a delivery. One that is late is cancelled, so that what is wanted by now can take its place."""
        call, given, push = seat.delivery, seat.given, f"push to {seat.who}"
        assert call is not None and given is not None
        if not (done := _done(call)) and time.monotonic() - seat.since <= given.within_s:
            self._supervisor.waits(push, f"policy version {given.version}")
            return
        self._supervisor.goes_on(push)
        seat.forget()  # a status that was asked for before tells what it held before
        if not done:
            logger.warning("%s has not taken policy version %d within %g s; it gets the newest one again", seat.who, given.version,
                           given.within_s)
            ray.cancel(call)
            return
        try:
            seat.held = ray.get(call), given.planning_checkpoint
        except ACTOR_LOST as error:
            self._lost(seat, error)
        except RayTaskError as error:
            self._refused(seat, given, own_error(error))

    def _refused(self, seat: _Seat, given: PushedWeights | LoadedCheckpoint, reason: Exception) -> None:
        """The actor could not take what it was given. Raises ``reason`` where that was the newest there is, but for what did not come."""
        logger.warning("%s keeps what it holds: %s", seat.who, first_line(reason))
        if self._wanted is not given or isinstance(reason, WeightsLate):
            return  # it gets what is newest
        self._wanted = None  # no other actor can take it either
        if not isinstance(reason, WeightsLost):
            raise reason


def _done(call: ray.ObjectRef) -> bool:
    return bool(ray.wait([call], timeout=0, fetch_local=False)[0])


def _process(status: dict) -> tuple[str, int]:
    return status["node"], status["pid"]


def _held(status: dict) -> tuple[int, str]:
    return status["version"], status["planning_checkpoint"]
