"""The windows of one stratum, indexed so that each is equally likely to be drawn."""

from __future__ import annotations

import bisect

import numpy as np

from cosmos_ray.replay.episode import EpisodeSummary


def window_offsets(frame_steps: np.ndarray, length: int, chunk: int) -> np.ndarray:
    """Offsets ``t`` in ``0..length - 1`` whose state and whose future state ``min(t + chunk, length)`` have frames.

    ``frame_steps`` are the steps in ``0..length`` with frames; the result is int32, ascending.
    """
    rendered = np.zeros(length + 1, dtype=bool)
    rendered[frame_steps] = True
    offsets = np.arange(length, dtype=np.int32)
    return offsets[rendered[offsets] & rendered[np.minimum(offsets + chunk, length)]]


class Stratum:
    """Episodes in the order of their names, so that a draw depends on which episodes there are, not on when they were
    found."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._offsets: dict[str, np.ndarray] = {}
        self._summaries: dict[str, EpisodeSummary] = {}
        self._ends: np.ndarray | None = None  # running total of windows, rebuilt after a change

    def add(self, summary: EpisodeSummary, offsets: np.ndarray) -> None:
        """Take in an episode with its window offsets; known names are left as they are."""
        if summary.name not in self._offsets:
            bisect.insort(self._names, summary.name)
            self._offsets[summary.name] = offsets
            self._summaries[summary.name] = summary
            self._ends = None

    def remove(self, name: str) -> None:
        """Forget an episode if it is known."""
        if self._offsets.pop(name, None) is not None:
            self._names.remove(name)
            del self._summaries[name]
            self._ends = None

    @property
    def names(self) -> list[str]:
        """Names of the episodes, sorted."""
        return self._names

    @property
    def windows(self) -> int:
        """Number of windows over all episodes."""
        ends = self._totals()
        return int(ends[-1]) if len(ends) else 0

    def window(self, index: int) -> tuple[EpisodeSummary, int]:
        """Episode and offset of window ``index`` in ``0..windows - 1``."""
        ends = self._totals()
        episode = int(np.searchsorted(ends, index, side="right"))
        name = self._names[episode]
        offsets = self._offsets[name]
        return self._summaries[name], int(offsets[index - int(ends[episode]) + len(offsets)])

    def _totals(self) -> np.ndarray:
        if self._ends is None:
            counts = np.fromiter((len(self._offsets[name]) for name in self._names), np.int64, len(self._names))
            self._ends = np.cumsum(counts)
        return self._ends
