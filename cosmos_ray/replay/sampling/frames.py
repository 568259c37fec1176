"""Decoded frames of the newest episodes in memory, which saves decoding them again."""

from __future__ import annotations

import heapq
import threading

import numpy as np


class _Block:
    """The frames of one episode; rows are filled as they are decoded."""

    def __init__(self, created: float, steps: np.ndarray, shape: tuple[int, ...]) -> None:
        self.created = created
        self.rows = {int(step): row for row, step in enumerate(steps)}
        self.frames = np.empty((len(steps), *shape), np.uint8)
        self.filled = np.zeros(len(steps), bool)


class HotFrames:
    """Holds ``(C, H, W, 3)`` uint8 frames by episode and step in at most ``limit`` bytes, the newest episodes first.

    An episode counts with all its frames from its first one on. A newer one takes the place of the oldest; an older one is not
    taken in. ``created`` tells an episode from another one that was committed later under the same name. Any thread may use it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._blocks: dict[str, _Block] = {}
        self._oldest: list[tuple[float, str, int]] = []  # heap of (created, name, bytes) of the blocks
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Episodes that are held."""
        return len(self._blocks)

    def get(self, name: str, step: int, created: float) -> np.ndarray | None:
        """The frames of one step, not to be written to, or None."""
        block = self._blocks.get(name)  # without the lock: a row is written before it is marked as filled, and once only
        if block is None or block.created != created:
            return None
        row = block.rows.get(step)
        return block.frames[row] if row is not None and block.filled[row] else None

    def put(self, name: str, created: float, steps: np.ndarray, step: int, frames: np.ndarray) -> None:
        """Keep a copy of the frames of ``step``; ``steps`` are all that the episode has, others are not kept."""
        if self.limit <= 0:
            return
        with self._lock:
            block = self._blocks.get(name)
            if block is not None and (block.created != created or block.frames.shape[1:] != frames.shape):
                self._drop(name)
                block = None
            if block is None and step in steps:
                block = self._admit(name, created, steps, frames.shape)
            row = block.rows.get(step) if block is not None else None
            if block is not None and row is not None and not block.filled[row]:
                block.frames[row] = frames
                block.filled[row] = True

    def drop(self, name: str) -> None:
        """Forget an episode."""
        with self._lock:
            self._drop(name)

    def _drop(self, name: str) -> None:
        block = self._blocks.pop(name, None)
        if block is not None:
            self.bytes -= block.frames.nbytes
            self._oldest = [entry for entry in self._oldest if entry[1] != name]
            heapq.heapify(self._oldest)

    def _admit(self, name: str, created: float, steps: np.ndarray, shape: tuple[int, ...]) -> _Block | None:
        """Make room by giving up older episodes, or give up none where these are too few."""
        need = len(steps) * int(np.prod(shape))
        out, left = [], self.bytes
        while left + need > self.limit and self._oldest and self._oldest[0] < (created, name, need):
            out.append(heapq.heappop(self._oldest))
            left -= out[-1][2]
        if left + need > self.limit:
            for entry in out:
                heapq.heappush(self._oldest, entry)
            return None
        for entry in out:
            del self._blocks[entry[1]]
        block = self._blocks[name] = _Block(created, steps, shape)
        heapq.heappush(self._oldest, (created, name, need))
        self.bytes = left + need
        return block
