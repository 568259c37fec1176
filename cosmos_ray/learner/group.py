"""The driver's side of the learner: calls that nobody waits for, and ranks that are started again when one dies or hangs.

Knows no Ray: :class:`~cosmos_ray.learner.actor.RayRanks` does what :class:`Ranks` says.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cosmos_ray.errors import CosmosRayError
from cosmos_ray.supervision import LEARNER_RESTARTS, LEARNER_RESTARTS_S, LEARNER_START_S, PROBE_S, RestartBudget, Supervisor

logger = logging.getLogger(__name__)

TURN_S = 0.5  #: that a wait for the learner looks for its answers at once
PLACE_S = 0.1  #: between two looks for room, for whoever waits for the learner
WHO = "learner"


class LearnerLost(CosmosRayError):
    """The learner died too often. Everything committed is safe; the run resumes from the learner's last state."""


class RankDied(Exception):
    """A rank is gone, or failed in a way that may not come again. ``who`` names it, ``why`` is the reason in one line."""

    def __init__(self, who: str, why: str):
        super().__init__(f"{who}: {why}")
        self.who, self.why = who, why


class Ranks(Protocol):
    """The processes of one engine."""

    def begin(self, method: str, *arguments: Any) -> Any:
        """Call ``method`` on every rank ("address": on rank 0 alone), after what was called before."""

    def answers(self, call: Any, timeout: float) -> list[Any] | None:
        """The answers of a call, None while one is missing. Waits up to ``timeout`` seconds. RankDied; or the error of ours that a rank
        raised, which would come again."""

    def silent(self, call: Any) -> str:
        """Names of the ranks whose answer is missing."""

    def close(self) -> None:
        """End the processes."""


class Answer(NamedTuple):
    """A call that is done. "start": the learner's step, after a restart as well; "train": rank 0's mean metrics; "save": the
    step of the state; "publish": rank 0's weights; "export": None."""

    kind: str
    value: Any


@dataclass
class _Call:
    kind: str
    what: str  #: that a wait for it says
    handle: Any


class LearnerGroup:
    """All ranks, called together. Calls begin here and are done in :meth:`poll`, in order.

    When a rank dies, or does not answer within ``deadline_s``, all ranks are ended and started again from the newest whole state; what was
    called is forgotten, and the next answer is "start" with the step that it goes on from. LearnerLost once the restart budget is spent.
    An error of ours that would come again is raised as it is.

    Args:
        launch: makes new ranks; None where there is no room for them now, which ``launch`` says itself.
        start: arguments of the ranks' method "start", before the address and port at which they meet.
        folder: of the learner's states.
    """

    def __init__(self, launch: Callable[[], Ranks | None], start: tuple[Any, ...], folder: Path, supervisor: Supervisor, deadline_s: float,
                 clock: Callable[[], float] = time.monotonic):
        self.folder, self.step, self.restarts = folder, 0, 0
        self._launch, self._start, self._supervisor, self._deadline_s, self._clock = launch, start, supervisor, deadline_s, clock
        self._budget = RestartBudget(LEARNER_RESTARTS, LEARNER_RESTARTS_S, clock)
        self._deaths: list[str] = []
        self._in_vain = 0  #: deaths since the learner was last further than ever
        self._furthest = self._saved = 0
        self._ranks: Ranks | None = None
        supervisor.shows(WHO, self.view)
        self._calls: deque[_Call] = deque()
        self._since = clock()  #: when the first of the calls became that
        self._usual_s: dict[str, float] = {}  #: kind of call -> seconds it took last
        self.started = False

    def view(self) -> list[dict[str, Any]]:
        """How the learner is: {who, step, does, since_s, restarts}."""
        call = next(iter(list(self._calls)), None)
        does = "starts" if not self.started else call.what if call is not None else "nothing: it waits for what is to be trained next"
        return [{"who": WHO, "step": self.step, "does": does, "since_s": round(self._clock() - self._since, 1), "restarts": self.restarts}]

    # ---------------------------------------------------------------- calls

    def train(self, steps: int) -> None:
        """Take in new episodes, then train ``steps`` steps."""
        self._begin("train", f"a burst of {steps} training steps", steps)

    def save(self) -> None:
        """Write resumable state."""
        self._saved = self.step
        self._begin("save", "its state to be written")

    def publish(self, version: int) -> None:
        """Get the weights to act with."""
        self._begin("publish", "its weights", version)

    def export(self, path: Path, version: int, info: dict) -> None:
        """Write the published policy as a checkpoint directory."""
        self._begin("export", f"{path} to be written", str(path), version, info)

    @property
    def busy(self) -> bool:
        """Whether a call is not done yet, or the ranks are starting."""
        return not self.started or any(call.kind != "probe" for call in self._calls)

    @property
    def training(self) -> bool:
        """Whether a burst is not done yet."""
        return any(call.kind == "train" for call in self._calls)

    def save_due(self, every: int) -> bool:
        """Whether a multiple of ``every`` steps was passed since a state was saved or resumed from."""
        return self.step // every > self._saved // every

    # ---------------------------------------------------------------- answers

    def poll(self, timeout: float = 0.0) -> list[Answer]:
        """What is done by now, waiting up to ``timeout`` seconds for the first of it. Starts the ranks, and starts them again."""
        if self._ranks is None and not self._place():
            time.sleep(min(timeout, PLACE_S))
            return []
        done: list[Answer] = []
        while self._ranks is not None and self._calls:
            call = self._calls[0]
            try:
                values = self._ranks.answers(call.handle, 0.0 if done else timeout)
                if values is None:
                    self._wait(self._ranks, call)
                    break
            except RankDied as death:
                self._restart(death)
                break
            self._calls.popleft()
            self._supervisor.goes_on(WHO)
            self._usual_s[call.kind] = self._clock() - self._since
            self._since = self._clock()
            done += self._take(call.kind, values)
        if self.started and not self._calls and self._clock() - self._since > PROBE_S:
            self._begin("probe", "an answer of its idle ranks")
        return done

    def start(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Return once the ranks have started; ``meanwhile`` is called again and again until then."""
        while not self.started:
            self.poll(TURN_S)
            meanwhile()

    def finish(self) -> list[Answer]:
        """Wait for all calls, or for a death of the ranks, which forgets them; returns what was done."""
        done: list[Answer] = []
        while self.started and self.busy:
            done += self.poll(TURN_S)
        return done

    def save_now(self) -> int | None:
        """Wait for the burst that is running, and write resumable state, so that an interrupt loses nothing that was learned. Returns the
        step of the state, None if there is nothing to save or the ranks died."""
        if not self.started:
            return None
        self.save()
        return next((answer.value for answer in reversed(self.finish()) if answer.kind == "save"), None)

    def close(self) -> None:
        """Stop the ranks."""
        if self._ranks is not None:
            self._ranks.close()
        self._ranks, self.started = None, False
        self._calls.clear()
        self._supervisor.goes_on(WHO)
        self._supervisor.shows(WHO, None)

    # ---------------------------------------------------------------- inside

    def _place(self) -> bool:
        """Make ranks if there is room for them."""
        self._ranks = self._launch()
        if self._ranks is None:
            return False
        self._begin("address", "its processes to start")
        return True

    def _begin(self, kind: str, what: str, *arguments: Any) -> None:
        if self._ranks is None:
            raise RuntimeError(f"the learner has not started: {kind}")
        if not self._calls:
            self._since = self._clock()
        self._calls.append(_Call(kind, what, self._ranks.begin(kind, *arguments)))

    def _take(self, kind: str, values: list[Any]) -> list[Answer]:
        first = values[0]
        if kind == "probe":
            return []
        if kind == "address":
            self._begin("start", "its ranks to load the network and to meet", *self._start, *first)
            return []
        if kind == "start":
            self.step, passed_over = first
            self._saved = self.step
            for note in passed_over:
                logger.warning("learner state in %s: %s; going on from step %d", self.folder, note, self.step)
            self.started, first = True, self.step
        if kind == "train":
            self.step = int(first["step"])
        if kind == "save":
            first = self.step
        if self.step > self._furthest:
            self._furthest, self._in_vain = self.step, 0
        return [Answer(kind, first)]

    def _wait(self, ranks: Ranks, call: _Call) -> None:
        """Say the wait for ``call`` when it is longer than usual. RankDied past its deadline."""
        waited = self._clock() - self._since
        deadline = LEARNER_START_S if call.kind in ("address", "start") else self._deadline_s
        if waited > deadline:
            raise RankDied(ranks.silent(call.handle), f"no answer within {deadline:g} s, while waiting for {call.what}")
        if waited > 2 * self._usual_s.get(call.kind, 0.0):
            self._supervisor.waits(WHO, call.what)

    def _restart(self, death: RankDied) -> None:
        """End all ranks, to be started again. LearnerLost when that was done too often."""
        self.close()
        self._deaths.append(str(death))
        self._in_vain += 1
        if self._in_vain > LEARNER_RESTARTS or not self._budget.take():
            self._supervisor.died(death.who, death.why, "not restarted any more")
            reasons = "; ".join(f"{reason} ({count} times)" if count > 1 else reason for reason, count in Counter(self._deaths).items())
            raise LearnerLost(f"the learner died {len(self._deaths)} times and is not restarted any more: {reasons}. Everything stored is "
                              f"safe: run the same command again to continue from its last state in {self.folder}, with a lower "
                              "learner.batch_size or more learner.accumulate if memory was short") from death
        self.restarts += 1
        self._supervisor.died(death.who, death.why, f"all learner ranks are started again from their last state (restart {self.restarts})")
