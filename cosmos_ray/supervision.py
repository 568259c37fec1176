"""Who watches whom: deadlines, restart budgets, and what is said about waits and deaths.

docs/supervision.md says the same as one page for readers. This module knows neither Ray nor threads: every watcher calls it from its
own loop.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

SAY_AFTER_S = 10.0  #: a wait that lasts longer says what it waits for
SAY_EVERY_S = 30.0  #: and says so again

# Deadlines, in seconds. Those that a user sets are settings: rollout.deadline_s, inference.timeout_s, replay.patience_s.
WORKER_START_S = 240.0  #: a rollout worker's first answer: imports, model build, kernels
SIMULATOR_START_S = 200.0  #: for a worker's simulators to start: imports, models, kernels, OpenGL
POOL_START_S = 180.0  #: an inference actor's first answer: torch, checkpoint
COMPILE_S = 1200.0  #: besides, where the actor compiles its network first
LEARNER_START_S = 300.0  #: DeepSpeed, the other ranks, checkpoint
PUSH_S = 60.0  #: for an inference actor to take new weights
SILENT_S = 60.0  #: an inference actor's answer to a look at it
PROBE_S = 2.0  #: between two looks at an inference actor, or at the cluster's nodes

DEATHS = 5  #: that are kept to be shown

# Budgets.
TICKET_ATTEMPTS = 3  #: workers that one initial state may break before it is quarantined
SIMULATOR_STARTS = 3  #: starts in a row of a worker's simulators that may fail
WORKER_STARTS, WORKER_STARTS_S = 5, 6 * WORKER_START_S  #: deaths before the first answer per worker, within so many seconds
LEARNER_RESTARTS, LEARNER_RESTARTS_S = 3, 600.0  #: restarts of the learner by the loop itself, within so many seconds


class RestartBudget:
    """At most ``most`` restarts within any ``within_s`` seconds."""

    def __init__(self, most: int, within_s: float, clock: Callable[[], float] = time.monotonic):
        self.most, self.within_s, self._clock = most, within_s, clock
        self._taken: deque[float] = deque()

    def take(self) -> bool:
        """Count one more restart. False, and nothing counted, when the budget is spent."""
        now = self._clock()
        while self._taken and now - self._taken[0] > self.within_s:
            self._taken.popleft()
        if len(self._taken) >= self.most:
            return False
        self._taken.append(now)
        return True


class Supervisor:
    """What the driver of a run says and records about its processes.

    ``record(kind, **values)`` gets every death (``kind`` "death": who, why, then) and, at its end, every wait that was said ("wait":
    who, on, seconds). A run's supervisor records into ``metrics.jsonl``, from which the report names them.
    """

    def __init__(self, record: Callable[..., None] = lambda kind, **values: None, clock: Callable[[], float] = time.monotonic):
        self._record, self._clock = record, clock
        self._waits: dict[str, list[Any]] = {}  #: who -> [on what, since, said last or None]
        self._views: dict[str, Callable[[], list[dict[str, Any]]]] = {}
        self._deaths: deque[dict[str, Any]] = deque(maxlen=DEATHS)

    def died(self, who: str, why: str, then: str) -> None:
        """Say and record that ``who`` ("rollout worker 2 on node ...") is gone: ``why``, and what is done about it (``then``)."""
        logger.warning("%s died (%s): %s", who, why, then)
        self._record("death", who=who, why=why, then=then)
        self._deaths.append({"who": who, "why": why, "then": then, "time": time.time()})

    def waits(self, who: str, on: str) -> None:
        """``who`` waits for ``on``. To be called as long as the wait lasts; the first call begins it.

        Says so once the wait is :data:`SAY_AFTER_S` old, and every :data:`SAY_EVERY_S` seconds after that.
        """
        now = self._clock()
        wait = self._waits.setdefault(who, [on, now, None])
        wait[0] = on
        if now - wait[1] >= SAY_AFTER_S and (wait[2] is None or now - wait[2] >= SAY_EVERY_S):
            wait[2] = now
            logger.warning("%s: waiting for %s, %.0f s so far", who, on, now - wait[1])

    def goes_on(self, who: str) -> None:
        """``who`` waits no longer. Nothing happens when it did not wait."""
        on, since, said = self._waits.pop(who, ("", 0.0, None))
        if said is not None:
            seconds = self._clock() - since
            logger.warning("%s: goes on after %.0f s of waiting for %s", who, seconds, on)
            self._record("wait", who=who, on=on, seconds=round(seconds, 1))

    def shows(self, what: str, view: Callable[[], list[dict[str, Any]]] | None) -> None:
        """``view()`` tells how ``what`` ("rollout workers") are, for :meth:`state`; None: they have ended. Another thread calls it."""
        self._views.pop(what, None)
        if view is not None:
            self._views[what] = view

    def state(self) -> dict[str, Any]:
        """{"waiting": [{who, on, seconds}], "deaths": the last ones, "views": {what: rows}}, as JSON takes them. May be called by any
        thread; RuntimeError where something changed meanwhile."""
        return {"waiting": [{"who": who, "on": on, "seconds": round(seconds, 1)} for who, (on, seconds) in self.waiting.items()],
                "deaths": list(self._deaths), "views": {what: view() for what, view in list(self._views.items())}}

    @property
    def waiting(self) -> dict[str, tuple[str, float]]:
        """who -> (for what, seconds so far), of every wait that lasts."""
        now = self._clock()
        return {who: (on, now - since) for who, (on, since, _) in self._waits.items()}
