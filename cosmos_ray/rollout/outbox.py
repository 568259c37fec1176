"""Finished episodes on their way into a store: held in memory and tried again while the store cannot be written."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from cosmos_ray.errors import StoreUnavailable
from cosmos_ray.replay.format.episode import Episode
from cosmos_ray.replay.store import ReplayStore

logger = logging.getLogger(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
PAUSE_S = 0.05  #: between two calls of flush() while there is nothing else to do


class Outbox:
    """Commits episodes in the order in which they come. While the store is unavailable (disk full, mount gone), each try waits longer.

    Tries for ``patience_s`` seconds from the first failure on, then raises StoreUnavailable. Raises any other StoreError at once, as no
    later try can help. Make no more episodes while some wait: the outbox holds them in memory.
    """

    def __init__(self, store: ReplayStore, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.store, self.patience_s = store, patience_s
        self._clock = clock
        self._waiting: deque[tuple[Episode, Any]] = deque()
        self.trouble = ""  #: why the last try failed; "" if it did not
        self._failing_since: float | None = None
        self._wait, self._next = FIRST_WAIT_S, 0.0

    def __len__(self) -> int:
        """Episodes that are in memory only."""
        return len(self._waiting)

    @property
    def failing(self) -> bool:
        """Whether the last try failed."""
        return self._failing_since is not None

    def put(self, episode: Episode, tag: Any = None) -> None:
        """Take over an episode; :meth:`flush` returns ``tag`` once the episode is stored."""
        self._waiting.append((episode, tag))

    def flush(self) -> list[tuple[Any, bool]]:
        """Commit what can be committed now; returns (tag, whether the episode was new) for each."""
        done: list[tuple[Any, bool]] = []
        while self._waiting:
            episode, tag = self._waiting[0]
            reached, new = self.attempt(partial(self.store.commit, episode))
            if not reached:
                break
            self._waiting.popleft()
            done.append((tag, new))
        return done

    def attempt(self, action: Callable[[], Any]) -> tuple[bool, Any]:
        """(True, result of ``action``), or (False, None) while the store is unavailable or the next try is not due. Raises as
        :meth:`flush` does."""
        if self._failing_since is not None and self._clock() < self._next:
            return False, None
        try:
            result = action()
        except StoreUnavailable as error:
            self._fail(error)
            return False, None
        if self._failing_since is not None:
            logger.warning("the replay store %s can be used again", self.store.root)
        self._failing_since, self._wait, self.trouble = None, FIRST_WAIT_S, ""
        return True, result

    def _fail(self, error: StoreUnavailable) -> None:
        now, held, self.trouble = self._clock(), len(self._waiting), str(error)
        if self._failing_since is None:
            self._failing_since = now
            if self.patience_s > 0:
                logger.warning("%s; this is tried again for %g s, %d finished episodes are kept in memory", error, self.patience_s, held)
        passed = now - self._failing_since
        if passed >= self.patience_s:
            raise StoreUnavailable(f"{error} (tried for {passed:.0f} s; {held} finished episodes are lost with this process)") from error
        self._next = now + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT_S)
