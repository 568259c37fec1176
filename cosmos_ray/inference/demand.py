"""How many inference actors the requests ask for. Pure Python, no Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

GROW_S = 6.0  #: that queues must stay long before one more actor starts
SHRINK_S = 60.0  #: that actors must stay idle before one of them ends
QUEUE = 0.5  #: of a full batch that waits at each actor: a long queue
IDLE = 0.5  #: of the other actors' full batches, which all requests together do not exceed: one actor too many


class Demand:
    """Between ``least`` and ``most`` actors, by what waits at them.

    One more is wanted once the mean queue has been long at every look for ``GROW_S`` seconds; one less once the others would have done at
    every look for ``SHRINK_S`` seconds. The wait begins anew with every change.
    """

    def __init__(self, least: int, most: int, max_batch: int, clock: Callable[[], float] = time.monotonic):
        self.least, self.most, self._max_batch, self._clock = least, max(least, most), max_batch, clock
        self.wanted = least
        self._since: dict[str, float | None] = {"long": None, "idle": None}

    def look(self, waiting: Sequence[int], computing: Sequence[int]) -> int:
        """How many actors are wanted, after one more look at those there are: rows that wait at each, and rows that each computes."""
        there = len(waiting)
        long = sum(waiting) > QUEUE * self._max_batch * there
        idle = sum(waiting) + sum(computing) <= IDLE * self._max_batch * (there - 1)
        if self._lasts("long", long, GROW_S) and there < self.most:
            self._want(there + 1)
        elif self._lasts("idle", idle, SHRINK_S) and there > self.least:
            self._want(there - 1)
        elif not long and self.wanted > there:
            self._want(there)  # one that found no room is not waited for any longer
        return self.wanted

    def _lasts(self, what: str, holds: bool, seconds: float) -> bool:
        now, since = self._clock(), self._since[what]
        self._since[what] = None if not holds else now if since is None else since
        return holds and since is not None and now - since >= seconds

    def _want(self, count: int) -> None:
        self.wanted = count
        self._since = {"long": None, "idle": None}
