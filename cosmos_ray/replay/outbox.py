"""Finished episodes on their way into a store: kept in memory and tried again while it cannot be written."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from cosmos_ray.errors import StoreUnavailable
from cosmos_ray.replay.episode import Episode
from cosmos_ray.replay.store import ReplayStore

logger = logging.getLogger(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0


class Outbox:
    """Commits episodes in the order they come. While the store is unavailable (disk full, mount gone), each try waits longer.

    It tries for ``patience_s`` seconds from the first failure on; after that the StoreUnavailable is raised. Any other
    StoreError is raised at once: no later try can help. Make no more episodes while any are waiting: they are held in memory.
    """

    def __init__(self, store: ReplayStore, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.store, self.patience_s = store, patience_s
        self._clock = clock
        self._waiting: deque[tuple[Episode, Any]] = deque()
        self._failing_since: float | None = None
        self._wait, self._next = FIRST_WAIT_S, 0.0

    def __len__(self) -> int:
        """Episodes that are in memory only."""
        return len(self._waiting)

    def put(self, episode: Episode, tag: Any = None) -> None:
        """Take an episode over; ``tag`` comes back with it once it is stored."""
        self._waiting.append((episode, tag))

    def flush(self) -> list[tuple[Any, bool]]:
        """Commit what can be committed now: (tag, whether it was new) of each."""
        done: list[tuple[Any, bool]] = []
        while self._waiting and self._clock() >= self._next:
            episode, tag = self._waiting[0]
            try:
                new = self.store.commit(episode)
            except StoreUnavailable as error:
                self._fail(error)
                break
            self._waiting.popleft()
            done.append((tag, new))
            if self._failing_since is not None:
                logger.warning("the replay store can be written again; %d episodes are waiting", len(self._waiting))
            self._failing_since, self._wait, self._next = None, FIRST_WAIT_S, 0.0
        return done

    def deliver(self, episode: Episode) -> bool:
        """Commit one episode, waiting as long as it takes or patience lasts; whether it was new."""
        self.put(episode, episode.key.name)
        while True:
            for tag, new in self.flush():
                if tag == episode.key.name:
                    return new
            time.sleep(max(0.01, self._next - self._clock()))

    def _fail(self, error: StoreUnavailable) -> None:
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
            logger.warning("%s; %d episodes are kept in memory and tried again for %g s", error, len(self._waiting), self.patience_s)
        if now - self._failing_since >= self.patience_s:
            count, passed = len(self._waiting), now - self._failing_since
            raise StoreUnavailable(f"{error} (tried for {passed:.0f} s; {count} finished episodes are lost with this process)") from error
        self._next = now + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT_S)
