"""Collects concurrent requests into batches, by size and by deadline. Plain asyncio, no Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from cosmos_ray.errors import CosmosRayError
from cosmos_ray.inference.messages import Busy, Expired


class Rows(Protocol):
    """A request of as many observation rows as it has seeds."""

    @property
    def seeds(self) -> Any: ...


LATELY = 3  #: batches
SHARE = 0.25  #: of a batch's time that its successor may wait for more rows
AGAIN = 20  #: batches after which one more such wait is tried, where none paid

Request = TypeVar("Request", bound=Rows)
Reply = TypeVar("Reply")


class Batcher(Generic[Request, Reply]):
    """Runs ``answer`` on batches of waiting requests in a thread, one batch at a time.

    A batch leaves when it holds ``max_rows`` observation rows, or as many as there seem to be in all, or when the first request has waited
    long enough. There seem to be as many rows as a batch and its waiting room held together, lately: a lone client never waits, and the
    clients of a closed loop, who ask again once they are answered, do not split into two batches that take turns. Long enough is
    ``wait_s`` seconds, or a quarter of a batch's time for as long as this brings the rows that are awaited.

    A request whose caller was cancelled, or waits no longer, is dropped. ``between`` runs a function while no batch runs; the actor swaps
    weights there.
    ``told`` hears of every batch: its rows, the rows that wait after it, and the seconds from each of its requests to the answer.
    With ``queue_rows`` rows waiting, a further request is refused.
    """

    def __init__(self, answer: Callable[[list[Request]], list[Reply | CosmosRayError]], max_rows: int, wait_s: float,
                 told: Callable[[int, int, list[float]], None] = lambda rows, waiting, seconds: None,
                 queue_rows: int | None = None):
        self.answer, self.max_rows, self.wait_s, self.told, self.queue_rows = answer, max_rows, wait_s, told, queue_rows
        self.batches = self.rows = 0
        self.computing = 0  #: rows of the batch that runs
        self._patience = wait_s
        self._lately: deque[int] = deque([max_rows], maxlen=LATELY)  #: rows that a batch and its waiting room held
        self._waiting: list[tuple[Request, asyncio.Future, float]] = []  #: request, its answer, when it came
        self._arrived = asyncio.Event()
        self._idle = asyncio.Lock()
        self._longest = wait_s
        self._loop: asyncio.Task | None = None

    async def submit(self, request: Request, within_s: float | None = None) -> Reply:
        """The answer to one request; raises what went wrong with it. Busy while the queue is full; Expired for a request whose batch does
        not begin within ``within_s`` seconds."""
        if self.queue_rows is not None and (waiting := _rows(self._waiting)) >= self.queue_rows:
            raise Busy(f"{waiting} observations wait already at this inference actor, which takes {self.queue_rows}")
        if self._loop is None:
            self._loop = asyncio.create_task(self._run())
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append((request, future, loop.time()))
        self._arrived.set()
        timer = None if within_s is None else loop.call_later(within_s, self._expire, future, within_s)
        try:
            return await future
        finally:
            if timer is not None:
                timer.cancel()

    def _expire(self, future: asyncio.Future, within_s: float) -> None:
        """Drop a request that still waits. One that is computed gets its answer."""
        if not future.done() and any(waiting is future for _, waiting, _ in self._waiting):
            future.set_exception(Expired(f"the request waited for {within_s:g} s, and nobody awaits its answer any more"))

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return _rows(self._waiting)

    @property
    def load(self) -> int:
        """Rows that wait or are computed."""
        return self.waiting + self.computing

    async def between(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run ``function`` in a thread between two batches. It runs to its end, and no batch before that, also if the caller is
        cancelled."""
        return await asyncio.shield(self._alone(function, *arguments))

    async def _alone(self, function: Callable[..., Any], *arguments: Any) -> Any:
        async with self._idle:
            return await asyncio.to_thread(function, *arguments)

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            await self._fill()
            async with self._idle:
                if batch := self._take():
                    began, self.computing = asyncio.get_running_loop().time(), _rows(batch)
                    await self._answer(batch)
                    ended, self.computing = asyncio.get_running_loop().time(), 0
                    self.told(_rows(batch), _rows(self._waiting), [ended - since for _, _, since in batch])
                    self._longest = max(self.wait_s, SHARE * (ended - began))
                    if self.batches == 1:
                        self._patience = self._longest
                    self._lately.append(_rows(batch) + _rows(self._waiting))
            if not self._waiting:
                self._arrived.clear()

    async def _fill(self) -> None:
        """Wait for the rows that are likely to come."""
        loop, awaited = asyncio.get_running_loop(), min(self.max_rows, max(self._lately))
        deadline = loop.time() + self._patience
        while _rows(self._waiting) < awaited and (left := deadline - loop.time()) > 0:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)
        if _rows(self._waiting) >= awaited or self.batches % AGAIN == 0:
            self._patience = self._longest
        else:
            self._patience = max(self._patience / 2, self.wait_s)

    def _take(self) -> list[tuple[Request, asyncio.Future, float]]:
        """The oldest requests that fit ``max_rows``; at least one, however large it is, unless all were cancelled."""
        self._waiting = [one for one in self._waiting if not one[1].done()]
        rows, count = 0, 0
        for request, *_ in self._waiting:
            if count and rows + len(request.seeds) > self.max_rows:
                break
            rows, count = rows + len(request.seeds), count + 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        self.batches, self.rows = self.batches + bool(batch), self.rows + rows
        return batch

    async def _answer(self, batch: list[tuple[Request, asyncio.Future, float]]) -> None:
        replies: Sequence[Reply | Exception]
        try:
            replies = await asyncio.to_thread(self.answer, [request for request, *_ in batch])
        except Exception as error:  # noqa: BLE001 - whatever it was, it belongs to the callers; the loop must go on serving
            replies = [error] * len(batch)
        for (_, future, _), reply in zip(batch, replies, strict=True):
            if future.cancelled():
                continue
            if isinstance(reply, Exception):
                future.set_exception(reply)
            else:
                future.set_result(reply)


def _rows(waiting: Sequence[tuple[Rows, Any, float]]) -> int:
    return sum(len(request.seeds) for request, *_ in waiting)
