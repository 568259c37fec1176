"""The tickets that wait for a worker, by kind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import Any


class Line:
    """Tickets in the order in which they came; the oldest of some kinds is found without looking at the others.

    ``kind_of``: what a ticket needs that a worker keeps, such as its task.
    """

    def __init__(self, kind_of: Callable[[Any], str]):
        self._kind = kind_of
        self._kinds: dict[str, deque[tuple[int, Any]]] = {}  #: place in the line, ticket
        self._first, self._last, self._count = 0, 0, 0

    def __len__(self) -> int:
        return self._count

    def append(self, ticket: Any) -> None:
        """Add a ticket at the end."""
        self._last += 1
        self._count += 1
        self._kinds.setdefault(self._kind(ticket), deque()).append((self._last, ticket))

    def put_back(self, ticket: Any) -> None:
        """Add a ticket at the front."""
        self._first -= 1
        self._count += 1
        self._kinds.setdefault(self._kind(ticket), deque()).appendleft((self._first, ticket))

    def next(self, had: Collection[str], others: Collection[str]) -> Any:
        """The ticket that a worker gets which has ``had`` some kinds: the oldest of these, or else the oldest of a kind that none of the
        ``others`` has had, or else the oldest. It stays in the line until :meth:`take`. IndexError in an empty line."""
        for wanted in (lambda kind: kind in had, lambda kind: kind not in others, lambda kind: True):
            if found := [waiting[0] for kind, waiting in self._kinds.items() if wanted(kind)]:
                return min(found, key=lambda place: place[0])[1]
        raise IndexError("no ticket waits")

    def take(self, ticket: Any) -> None:
        """Remove what :meth:`next` returned."""
        kind = self._kind(ticket)
        waiting = self._kinds[kind]
        assert waiting[0][1] is ticket
        waiting.popleft()
        self._count -= 1
        if not waiting:
            del self._kinds[kind]

    def clear(self) -> None:
        """Forget all tickets."""
        self._kinds.clear()
        self._count = 0
