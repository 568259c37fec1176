"""Which windows the episodes of an index have, and how likely each is to be drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.format.episode import CLASSES, TRAINED, EpisodeClass, expand_ranges
from cosmos_ray.replay.index import EpisodeIndex

DEMO = CLASSES.index("demo")


@dataclass(frozen=True)
class Selection:
    """Which windows may be drawn, and how likely each is.

    ``classes`` and ``tasks`` are shares by name, such as ``{"success": 0.5, "failure": 0.5}``: they need not add up to one, and
    with both, a class of a task gets the product. The shares of what has no window go to the others; drawing of a task that no
    episode ever had is a StoreError. None takes whatever there is, every window as likely as any other.
    ``max_staleness`` leaves out rollouts whose policy version is more than that behind the newest in the store (demonstrations
    have no version and stay). With ``half_life``, a window is half as likely as one of an episode so many episodes newer, of
    those with the same part in the shares. StoreError for classes that are not trained on and for impossible numbers.
    """

    classes: dict[EpisodeClass, float] | None = None
    tasks: dict[str, float] | None = None
    max_staleness: int | None = None
    half_life: float | None = None

    def __post_init__(self) -> None:
        # Copies: a change of the caller's table would pass the checks by. In one order: equal selections draw alike.
        classes, tasks = _checked_shares(self.classes), _checked_shares(self.tasks)
        for name in classes or {}:
            if name not in TRAINED:
                raise StoreError(f"episode class {name!r} is not trained on: use {', '.join(TRAINED)}")
        object.__setattr__(self, "classes", classes and {name: classes[name] for name in TRAINED if name in classes})
        object.__setattr__(self, "tasks", tasks and dict(sorted(tasks.items())))
        if self.max_staleness is not None and not (isinstance(self.max_staleness, Real) and self.max_staleness >= 0):
            raise StoreError(f"max_staleness {self.max_staleness!r} must be a number of versions, at least 0")
        if self.half_life is not None and not (isinstance(self.half_life, Real) and self.half_life > 0):
            raise StoreError(f"half_life {self.half_life!r} must be a positive number of episodes")


def _checked_shares(shares: Mapping[Any, float] | None) -> dict[str, float] | None:
    if shares is None:
        return None
    named = isinstance(shares, Mapping) and all(isinstance(name, str) and isinstance(share, Real) for name, share in shares.items())
    # Written so that a share that is not a number fails it.
    if not named or not all(share >= 0 for share in shares.values()) or not 0 < sum(shares.values()) < float("inf"):
        raise StoreError(f"shares {shares!r} must be numbers of at least 0 by name, one of them positive")
    return dict(shares)


def window_offsets(frame_steps: np.ndarray, length: int, chunk: int) -> np.ndarray:
    """Offsets ``t`` in ``0..length - 1`` whose state and whose future state ``min(t + chunk, length)`` have frames.

    ``frame_steps`` are the steps in ``0..length`` with frames; the result is int32, ascending.
    """
    rendered = np.zeros(length + 1, dtype=bool)
    rendered[frame_steps] = True
    offsets = np.arange(length, dtype=np.int32)
    return offsets[rendered[offsets] & rendered[np.minimum(offsets + min(chunk, length), length)]]


@dataclass(frozen=True)
class Cell:
    """Episodes that are drawn from with one rule, ordered by their keys so that the order of their commits does not matter."""

    episode_class: EpisodeClass | None  # None: of any
    rows: np.ndarray  # (n,) int64, in the index
    ends: np.ndarray  # (n,) float64, running total of the weights


class Windows:
    """The windows of ``chunk`` steps in an index, as of the last :meth:`update`.

    With ``everywhere`` a window may start at any step (frames can be made), else only where its frames are stored.
    """

    def __init__(self, index: EpisodeIndex, chunk: int, everywhere: bool = False) -> None:
        self.index, self.chunk, self.everywhere = index, chunk, everywhere
        self.counts = np.zeros(0, np.int64)  # windows of each row, 0 for what is never drawn
        self.classes = np.zeros(0, np.int8)  # number in CLASSES
        self.excluded = 0  # episodes of a class that is not trained on
        self.newest = -1  # policy version
        self._sizes = {name: (0, 0) for name in TRAINED}
        self._ordered = np.zeros(0, np.int64)  # rows with windows
        self._offsets: dict[tuple[int, int], np.ndarray] = {}
        self._cells: dict[tuple, Cell] = {}
        self._removed = index.removed

    def update(self) -> tuple[int, int]:
        """Take in the rows added and removed since; how many episodes are new, and how many of them have no window."""
        index, first = self.index, len(self.counts)
        rows = slice(first, len(index.names))
        if rows.stop == first and self._removed == index.removed:
            return 0, 0
        self._removed = index.removed
        alive = index.alive[: rows.stop]
        fresh = alive[rows]
        classes = index.classes(rows)
        trained = fresh & _is_trained(classes)
        counts = np.where(trained, self._count(rows), 0)
        self.classes, self.counts = np.concatenate([self.classes, classes]), np.concatenate([self.counts, counts])
        self._measure(alive)
        added = first + np.flatnonzero(counts)
        self._ordered = self._in_order(np.concatenate([self._ordered[alive[self._ordered]], self._in_order(added)]))
        self._cells = {}
        return int(fresh.sum()), int((trained & (counts == 0)).sum())

    def count(self, episode_class: EpisodeClass) -> tuple[int, int]:
        """Episodes and windows of a class that is trained on."""
        return self._sizes[episode_class]

    def offsets(self, row: int) -> np.ndarray:
        """Where the windows of an episode start, ascending."""
        return self._offsets_of(int(self.index["frames"][row]), int(self.index["length"][row]))

    def cell(self, episode_class: EpisodeClass | None, task: str | None, selection: Selection) -> Cell:
        """The episodes of a class and a task (None: of any) under a selection's other rules. StoreError for an unknown task."""
        key = (episode_class, task, selection.max_staleness, selection.half_life)
        if key not in self._cells:
            self._cells[key] = self._make_cell(*key)
        return self._cells[key]

    def names(self) -> np.ndarray:
        """Rows of every episode that can be drawn, ordered by their keys."""
        return self._ordered

    def _measure(self, alive: np.ndarray) -> None:
        """Sizes of the classes and the newest policy version among the rows that are ``alive``."""
        classes, counts = self.classes[alive], self.counts[alive]
        for name in TRAINED:
            mine = classes == CLASSES.index(name)
            self._sizes[name] = (int(mine.sum()), int(counts[mine].sum()))
        self.excluded = int((~_is_trained(classes)).sum())
        rollouts = alive & _is_trained(self.classes) & (self.classes != DEMO)
        self.newest = int(self.index["policy_version"][: len(alive)][rollouts].max(initial=-1))

    def _in_order(self, rows: np.ndarray) -> np.ndarray:
        """``rows`` by their keys alone. Of rows that are in order already except for the last few, this is fast."""
        keys = self.index["order"][rows]
        by_key = np.argsort(keys, kind="stable")
        rows, keys = rows[by_key], keys[by_key]
        for key in np.unique(keys[1:][keys[1:] == keys[:-1]]):  # keys are hashes; on a collision the name decides
            same = slice(np.searchsorted(keys, key), np.searchsorted(keys, key, side="right"))
            rows[same] = sorted(rows[same], key=lambda row: self.index.names[row])
        return rows

    def _make_cell(
        self, episode_class: EpisodeClass | None, task: str | None, max_staleness: int | None, half_life: float | None
    ) -> Cell:
        index, rows = self.index, self._ordered
        if episode_class is not None:
            rows = rows[self.classes[rows] == CLASSES.index(episode_class)]
        if task is not None:
            rows = rows[index["task"][rows] == self._task(task)]
        if max_staleness is not None:
            recent = index["policy_version"][rows] >= self.newest - max_staleness
            rows = rows[recent | (self.classes[rows] == DEMO)]
        weights = self.counts[rows].astype(np.float64)
        if half_life is not None:
            age = np.empty(len(rows))
            age[np.argsort(-index["created"][rows], kind="stable")] = np.arange(len(rows))
            with np.errstate(over="ignore", under="ignore"):
                weights *= np.exp2(-age / half_life)
        return Cell(episode_class, rows, np.cumsum(weights))

    def _task(self, task: str) -> int:
        """The number of a task in the index."""
        known = self.index.tables["task"].values
        if task not in known:
            there = sorted(known[number] for number in np.unique(self.index["task"][self._ordered]))
            raise StoreError(f"no episode is of task {task!r}: " + (f"the tasks are {', '.join(there)}" if there else "there is none yet"))
        return known.index(task)

    def _count(self, rows: slice) -> np.ndarray:
        """Windows of each row; episodes with the same frames and length are counted once."""
        lengths = self.index["length"][rows]
        if self.everywhere:
            return lengths.copy()
        base = int(lengths.max(initial=0)) + 1  # both as one number: sorting pairs takes ten times as long
        pairs, inverse = np.unique(self.index["frames"][rows] * np.int64(base) + lengths, return_inverse=True)
        return np.array([len(self._offsets_of(int(pair) // base, int(pair) % base)) for pair in pairs], np.int64)[inverse]

    def _offsets_of(self, frames: int, length: int) -> np.ndarray:
        if self.everywhere:
            return np.arange(length, dtype=np.int32)
        key = (frames, length)
        if key not in self._offsets:
            self._offsets[key] = window_offsets(expand_ranges(self.index.tables["frames"].values[frames]), length, self.chunk)
        return self._offsets[key]


def _is_trained(classes: np.ndarray) -> np.ndarray:
    """(n,) bool: whether episodes of these classes, (n,) numbers in CLASSES, are trained on."""
    return np.isin(classes, [CLASSES.index(name) for name in TRAINED])
