"""Batches that worker threads make ahead of use, equal to batches made one by one.

JPEG decoding leaves Python's lock, so threads scale with the cores. With ``pin`` the arrays are page-locked memory (through
torch), from which a GPU copies while it computes: ``torch.from_numpy(batch.images).to("cuda", non_blocking=True)``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np

from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.replay.sampling.sampler import Empty, Source, Unusable


class _Ahead(NamedTuple):
    before: dict[str, Any]  # state of the source before it picked the batch
    future: Future


class PrefetchLoader:
    """Iterates over the batches of ``source`` for ever, ``depth`` of them being made ahead by ``threads`` threads.

    Changes of the source (new episodes after a refresh, another selection) show after the ``depth`` batches that are picked
    already; :meth:`restart` picks these anew. An error is raised where the batch would have come, and the next call tries that
    batch again. A source that renders frames draws on the one thread that holds the GL context, which is the loader's then:
    ConfigError if ``threads`` is more than one. ``pin`` needs torch and a GPU, ConfigError where there is none. One thread uses
    a loader, as a context manager or with :meth:`close`; a closed one raises StoreError.
    """

    def __init__(self, source: Source, *, threads: int = 1, depth: int = 2, pin: bool = False) -> None:
        if threads < 1 or depth < 1:
            raise ConfigError(f"a loader needs at least one thread and one batch ahead, not {threads} and {depth}")
        if threads > 1 and getattr(getattr(source, "sampler", None), "render", None) is not None:
            raise ConfigError(f"frames are rendered in one thread only: load with one thread, not {threads}")
        if pin:
            _check_pinning()
        self.source, self.depth = source, depth
        self._empty: Empty = _pinned if pin else np.empty
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(threads, thread_name_prefix="replay-loader")
        self._ahead: deque[_Ahead] = deque()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while True:
            self._pick_ahead()
            try:
                batch = self._ahead[0].future.result()
            except Unusable as unusable:
                self.restart()  # as if the episode had never been there
                self.source.forget(unusable)
            except Exception:
                self.restart()  # the fault may be over by the next call: it starts from the same state
                raise
            else:
                self._ahead.popleft()
                return batch

    def restart(self) -> None:
        """Give up the batches that are being made; the next ones are picked from where the last one returned left off."""
        for ahead in self._ahead:
            ahead.future.cancel()
        wait([ahead.future for ahead in self._ahead if not ahead.future.cancelled()])  # nobody may read while the source changes
        if self._ahead:
            self.source.restore(self._ahead[0].before)
        self._ahead.clear()

    def snapshot(self) -> dict[str, Any]:
        """State of the source after the last batch returned: what was made ahead does not count."""
        return self._ahead[0].before if self._ahead else self.source.snapshot()

    def close(self) -> None:
        """Stop the threads; the source is as after the last batch returned."""
        self.restart()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def __enter__(self) -> PrefetchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pick_ahead(self) -> None:
        """Pick ahead as far as it goes. A batch that cannot be picked is an error once everything before it was returned."""
        if self._pool is None:
            raise StoreError("this loader is closed: make another one")
        while len(self._ahead) < self.depth:
            before = self.source.snapshot()
            try:
                picks = self.source.pick()
            except StoreError:
                self.source.restore(before)
                if self._ahead:
                    return
                raise
            self._ahead.append(_Ahead(before, self._pool.submit(self.source.build, picks, self._empty)))


def _check_pinning() -> None:
    """ConfigError where there is nothing to pin memory for."""
    try:
        import torch
    except ImportError as error:
        raise ConfigError("pinned batches need torch, which is not installed: load with pin=False") from error
    if not torch.cuda.is_available():
        raise ConfigError("pinned batches need a GPU and torch finds none: load with pin=False")


def _pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in page-locked memory."""
    import torch

    # The tensor lives as long as the array, which is of its memory. torch keeps and reuses freed pages.
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().view(dtype).reshape(shape)
