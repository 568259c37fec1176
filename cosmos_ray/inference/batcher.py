"""Collects concurrent requests into batches, by size and by deadline. Plain asyncio, no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from cosmos_ray.errors import CosmosRayError


class Rows(Protocol):
    """A request of as many observation rows as it has seeds."""

    @property
    def seeds(self) -> Any: ...


Request = TypeVar("Request", bound=Rows)
Reply = TypeVar("Reply")


class Batcher(Generic[Request, Reply]):
    """Runs ``answer`` on batches of waiting requests in a thread, one batch at a time.

    A batch leaves when it holds ``max_rows`` observation rows, or ``wait_s`` seconds after its first request arrived. Requests that
    arrive while a batch runs form the next batch, so the wait costs nothing under load. A request whose caller was cancelled is dropped.
    ``between`` runs a function while no batch runs; the actor swaps weights there.
    """

    def __init__(self, answer: Callable[[list[Request]], list[Reply | CosmosRayError]], max_rows: int, wait_s: float):
        self.answer, self.max_rows, self.wait_s = answer, max_rows, wait_s
        self.batches = self.rows = 0
        self._waiting: list[tuple[Request, asyncio.Future]] = []
        self._arrived = asyncio.Event()
        self._idle = asyncio.Lock()
        self._loop: asyncio.Task | None = None

    async def submit(self, request: Request) -> Reply:
        """The answer to one request; raises what went wrong with it."""
        if self._loop is None:
            self._loop = asyncio.create_task(self._run())
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._arrived.set()
        return await future

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
            deadline = asyncio.get_running_loop().time() + self.wait_s
            while sum(len(r.seeds) for r, _ in self._waiting) < self.max_rows:
                left = deadline - asyncio.get_running_loop().time()
                if left <= 0:
                    break
                self._arrived.clear()
                try:
                    await asyncio.wait_for(self._arrived.wait(), left)
                except TimeoutError:
                    break
            async with self._idle:
                if batch := self._take():
                    await self._answer(batch)
            if not self._waiting:
                self._arrived.clear()

    def _take(self) -> list[tuple[Request, asyncio.Future]]:
        """The oldest requests that fit ``max_rows``; at least one, however large it is, unless all were cancelled."""
        self._waiting = [(request, future) for request, future in self._waiting if not future.cancelled()]
        rows, count = 0, 0
        for request, _ in self._waiting:
            if count and rows + len(request.seeds) > self.max_rows:
                break
            rows, count = rows + len(request.seeds), count + 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        self.batches, self.rows = self.batches + bool(batch), self.rows + rows
        return batch

    async def _answer(self, batch: list[tuple[Request, asyncio.Future]]) -> None:
        replies: Sequence[Reply | Exception]
        try:
            replies = await asyncio.to_thread(self.answer, [request for request, _ in batch])
        except Exception as error:  # noqa: BLE001 - whatever it was, it belongs to the callers; the loop must go on serving
            replies = [error] * len(batch)
        for (_, future), reply in zip(batch, replies, strict=True):
            if future.cancelled():
                continue
            if isinstance(reply, Exception):
                future.set_exception(reply)
            else:
                future.set_result(reply)
