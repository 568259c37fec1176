"""Which windows the episodes of an index have, and how likely each is to be drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.episode import SOURCES, expand_ranges
from cosmos_ray.replay.index import EpisodeIndex

STRATA = ("demo", "success", "failure")


@dataclass(frozen=True)
class Selection:
    """Which windows may be drawn, and how likely each is.

    ``strata`` and ``tasks`` are shares by name, such as ``{"success": 0.5, "failure": 0.5}``: they need not add up to one,
    what has no window is left out and the others share its part. None takes whatever there is, every window as likely as
    any other. ``max_staleness`` leaves out rollouts whose policy version is more than that behind the newest in the store
    (demonstrations have no version and stay). With ``half_life``, an episode that is so many episodes older than the newest
    of its stratum is half as likely as that one. StoreError for unknown strata and impossible numbers.
    """

    strata: dict[str, float] | None = None
    tasks: dict[str, float] | None = None
    max_staleness: int | None = None
    half_life: float | None = None

    def __post_init__(self) -> None:
        for name in self.strata or {}:
            if name not in STRATA:
                raise StoreError(f"stratum {name!r} is unknown: use {', '.join(STRATA)}")
        for shares in (self.strata, self.tasks):
            if shares is not None and (not shares or min(shares.values()) < 0 or not 0 < sum(shares.values()) < float("inf")):
                raise StoreError(f"shares {shares} must be numbers of at least 0, one of them positive")
        if self.max_staleness is not None and self.max_staleness < 0:
            raise StoreError(f"max_staleness {self.max_staleness} must be at least 0")
        if self.half_life is not None and not self.half_life > 0:
            raise StoreError(f"half_life {self.half_life} must be positive, in episodes")


def window_offsets(frame_steps: np.ndarray, length: int, chunk: int) -> np.ndarray:
    """Offsets ``t`` in ``0..length - 1`` whose state and whose future state ``min(t + chunk, length)`` have frames.

    ``frame_steps`` are the steps in ``0..length`` with frames; the result is int32, ascending.
    """
    rendered = np.zeros(length + 1, dtype=bool)
    rendered[frame_steps] = True
    offsets = np.arange(length, dtype=np.int32)
    return offsets[rendered[offsets] & rendered[np.minimum(offsets + chunk, length)]]


@dataclass(frozen=True)
class Cell:
    """Episodes that are drawn from with one rule, ordered by their keys so that the order of their commits does not matter."""

    stratum: str
    rows: np.ndarray  # (n,) int64, in the index
    ends: np.ndarray  # (n,) float64, running total of the weights


class Windows:
    """The windows of ``chunk`` steps in an index, kept up with it by :meth:`update`.

    With ``everywhere`` a window may start at any step (frames can be made), else only where its frames are stored.
    """

    def __init__(self, index: EpisodeIndex, chunk: int, everywhere: bool = False) -> None:
        self.index, self.chunk, self.everywhere = index, chunk, everywhere
        self.counts = np.zeros(0, np.int64)  # windows of each row, 0 for what is never drawn
        self.strata = np.zeros(0, np.int8)  # number in STRATA, -1 for what is never drawn
        self.excluded = 0  # episodes that belong to no stratum
        self.newest = -1  # policy version
        self._offsets: dict[tuple[int, int], np.ndarray] = {}
        self._cells: dict[tuple, Cell] = {}
        self._removed = index.removed

    def update(self) -> tuple[int, int]:
        """Take in the rows added since; how many episodes are new, and how many of them have no window."""
        index, first = self.index, len(self.counts)
        rows = slice(first, len(index.names))
        if rows.stop == first and self._removed == index.removed:
            return 0, 0
        fresh = index.alive[rows]
        strata = self._stratify(rows)
        strata[~fresh] = -1
        counts = np.where(strata >= 0, self._count(rows), 0)
        self.strata, self.counts = np.concatenate([self.strata, strata]), np.concatenate([self.counts, counts])
        self.excluded += int((fresh & (strata < 0)).sum())
        versions = index["policy_version"][(self.strata >= 1) & index.alive]
        self.newest = int(versions.max(initial=-1))
        self._cells, self._removed = {}, index.removed
        return int(fresh.sum()), int((fresh & (strata >= 0) & (counts == 0)).sum())

    def count(self, stratum: str) -> tuple[int, int]:
        """Episodes and windows of a stratum."""
        rows = (self.strata == STRATA.index(stratum)) & self._alive
        return int(rows.sum()), int(self.counts[rows].sum())

    def offsets(self, row: int) -> np.ndarray:
        """Where the windows of an episode start, ascending."""
        return self._offsets_of(int(self.index["frames"][row]), int(self.index["length"][row]))

    def cell(self, stratum: str | None, task: str | None, selection: Selection) -> Cell:
        """The episodes of a stratum and a task (None: of any) under a selection's other rules."""
        key = (stratum, task, selection.max_staleness, selection.half_life)
        if key not in self._cells:
            self._cells[key] = self._make_cell(*key)
        return self._cells[key]

    def names(self) -> np.ndarray:
        """Rows of every episode that can be drawn, ordered by their keys."""
        return self._make_cell(None, None, None, None).rows

    @property
    def _alive(self) -> np.ndarray:
        """Of the rows taken in, those still there; the index may have grown since."""
        return self.index.alive[: len(self.counts)]

    def _make_cell(self, stratum: str | None, task: str | None, max_staleness: int | None, half_life: float | None) -> Cell:
        index, known = self.index, len(self.counts)
        mask = (self.counts > 0) & self._alive
        if stratum is not None:
            mask &= self.strata == STRATA.index(stratum)
        if task is not None:
            mask &= index["task"][:known] == index.tables["task"].number(task)
        if max_staleness is not None:
            mask &= (self.strata == STRATA.index("demo")) | (index["policy_version"][:known] >= self.newest - max_staleness)
        rows = np.flatnonzero(mask)
        rows = rows[np.argsort(index["order"][rows], kind="stable")]
        weights = self.counts[rows].astype(np.float64)
        if half_life is not None:
            age = np.empty(len(rows))
            age[np.argsort(-index["created"][rows], kind="stable")] = np.arange(len(rows))
            weights *= 0.5 ** (age / half_life)
        return Cell(stratum or "", rows, np.cumsum(weights))

    def _stratify(self, rows: slice) -> np.ndarray:
        """As ``EpisodeSummary.stratum``, for many rows."""
        index = self.index
        source, success = index["source"][rows], index["success"][rows]
        strata = np.where(success, STRATA.index("success"), STRATA.index("failure")).astype(np.int8)
        demo = source == SOURCES.index("demo")
        strata[demo] = np.where(success[demo], STRATA.index("demo"), -1)
        strata[(source == SOURCES.index("eval")) | (index["invalid"][rows] != 0)] = -1
        return strata

    def _count(self, rows: slice) -> np.ndarray:
        """Windows of each row; episodes with the same frames and length are counted once."""
        lengths = self.index["length"][rows]
        if self.everywhere:
            return lengths.copy()
        pairs = np.stack([self.index["frames"][rows].astype(np.int64), lengths])
        kinds, inverse = np.unique(pairs, axis=1, return_inverse=True)
        return np.array([len(self._offsets_of(int(f), int(n))) for f, n in kinds.T], np.int64)[inverse.reshape(-1)]

    def _offsets_of(self, frames: int, length: int) -> np.ndarray:
        if self.everywhere:
            return np.arange(length, dtype=np.int32)
        key = (frames, length)
        if key not in self._offsets:
            self._offsets[key] = window_offsets(expand_ranges(self.index.tables["frames"].values[frames]), length, self.chunk)
        return self._offsets[key]
