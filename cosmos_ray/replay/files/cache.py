"""A least-recently-used cache with a bound on the summed cost of what it holds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LeastRecentlyUsed(Generic[Key, Value]):
    """Mapping that forgets what was used longest ago once the costs add up to more than ``limit``. Any thread may use it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.cost = 0
        self._items: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: Key) -> Value | None:
        """The value of ``key``, which becomes the most recently used, or None."""
        with self._lock:
            item = self._items.get(key)
            if item is None:
                return None
            self._items.move_to_end(key)
            return item[0]

    def put(self, key: Key, value: Value, cost: int = 1) -> None:
        """Hold ``value``; a value that costs more than the whole limit is not held."""
        with self._lock:
            self._drop(key)
            if cost > self.limit:
                return
            self._items[key] = (value, cost)
            self.cost += cost
            while self.cost > self.limit:
                _, (_, freed) = self._items.popitem(last=False)
                self.cost -= freed

    def drop(self, key: Key) -> None:
        """Forget ``key`` if it is held."""
        with self._lock:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        item = self._items.pop(key, None)
        if item is not None:
            self.cost -= item[1]
