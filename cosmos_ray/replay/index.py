"""The known episodes as rows of columns: arrays instead of one object per episode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cosmos_ray.replay.format.episode import CLASS_NUMBERS, SOURCES, EpisodeKey, EpisodeSummary

#: Column -> dtype. Text is kept once in a table; the column holds its number there.
COLUMNS: dict[str, type] = {
    "source": np.int8,  # number in SOURCES
    "task": np.int32,
    "run": np.int32,
    "seed": np.int64,
    "attempt": np.int64,
    "initial_state": np.int32,
    "success": np.bool_,
    "score": np.float64,
    "episode_return": np.float64,
    "length": np.int64,
    "timed_out": np.bool_,
    "invalid": np.int32,
    "policy_version": np.int64,
    "frames": np.int32,
    "created": np.float64,
    "size": np.int64,
    "order": np.uint64,  # see sort_key
}
TABLES = ("task", "run", "initial_state", "invalid", "frames")


class Table:
    """Values kept once, under numbers in the order of their arrival. The first is the empty one."""

    def __init__(self, values: Iterable[Any] = ("",)) -> None:
        self.values = list(values)
        self._numbers = {value: number for number, value in enumerate(self.values)}

    def number(self, value: Any) -> int:
        """The number of ``value``, given now if it has none."""
        number = self._numbers.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


class EpisodeIndex:
    """Rows in order of discovery. A row never moves; a removed episode leaves its row behind, not :attr:`alive`."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.tables = {name: Table([()] if name == "frames" else [""]) for name in TABLES}
        self.removed = 0  # how often an episode was removed
        self._rows: dict[str, int] = {}
        self._columns: dict[str, np.ndarray] = {name: np.zeros(64, dtype) for name, dtype in COLUMNS.items()}
        self._alive = np.zeros(64, bool)

    def __len__(self) -> int:
        """Episodes that are there."""
        return len(self._rows)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __getitem__(self, column: str) -> np.ndarray:
        """One of :data:`COLUMNS`, a row per episode ever known."""
        return self._columns[column][: len(self.names)]

    @property
    def alive(self) -> np.ndarray:
        """(rows,) bool: which of them are still there."""
        return self._alive[: len(self.names)]

    def row(self, name: str) -> int | None:
        """The row of an episode that is there."""
        return self._rows.get(name)

    def add(self, summary: EpisodeSummary) -> bool:
        """Take in an episode. False, and no change, if it is known."""
        if summary.name in self._rows:
            return False
        self._append(summary)
        return True

    def remove(self, name: str) -> None:
        """Forget an episode if it is known."""
        row = self._rows.pop(name, None)
        if row is not None:
            self._alive[row] = False
            self.removed += 1

    def classes(self, rows: slice) -> np.ndarray:
        """(n,) int8: the class of each episode, as a number in ``CLASSES``."""
        return CLASS_NUMBERS[self["source"][rows], self["success"][rows].astype(np.int8), (self["invalid"][rows] != 0).astype(np.int8)]

    def summaries(self, rows: np.ndarray, where: Callable[[str], str]) -> list[EpisodeSummary]:
        """The summaries of ``(n,)`` rows; ``where`` tells the file of an episode from its name."""
        c = {name: self._columns[name][rows].tolist() for name in COLUMNS}  # plain numbers, much faster than one by one
        text = {name: [self.tables[name].values[number] for number in c[name]] for name in TABLES}
        out = []
        for i, row in enumerate(rows.tolist()):
            source, state = SOURCES[c["source"][i]], text["initial_state"][i]
            key = EpisodeKey(text["run"][i], text["task"][i], source, c["seed"][i], c["attempt"][i], state)
            out.append(EpisodeSummary(
                key=key, name=self.names[row], path=where(self.names[row]), success=c["success"][i], score=c["score"][i],
                episode_return=c["episode_return"][i], length=c["length"][i], timed_out=c["timed_out"][i], invalid=text["invalid"][i],
                policy_version=c["policy_version"][i], frame_ranges=text["frames"][i], created=c["created"][i], size=c["size"][i],
            ))  # fmt: skip
        return out

    def load(self, names: pa.StringArray, columns: dict[str, np.ndarray], tables: dict[str, list]) -> None:
        """Replace the content by these episodes. ValueError or TypeError, and no change, if the parts do not form an index."""
        known = names.to_pylist()
        _check(known, columns, tables)
        _check_names(names, columns)
        self.names = known
        self.tables = {name: Table(tables[name]) for name in TABLES}
        self._rows = dict(zip(known, range(len(known)), strict=True))
        self._columns = {name: np.array(columns[name], dtype) for name, dtype in COLUMNS.items()}
        self._alive = np.ones(len(known), bool)

    def _append(self, summary: EpisodeSummary) -> int:
        row = len(self.names)
        if row == len(self._alive):
            more = max(64, row)
            self._columns = {name: np.concatenate([values, np.zeros(more, values.dtype)]) for name, values in self._columns.items()}
            self._alive = np.concatenate([self._alive, np.zeros(more, bool)])
        key, table = summary.key, self.tables
        values = {
            "source": SOURCES.index(key.source), "task": table["task"].number(key.task), "run": table["run"].number(key.run),
            "seed": key.seed, "attempt": key.attempt, "initial_state": table["initial_state"].number(key.initial_state),
            "success": summary.success, "score": summary.score, "episode_return": summary.episode_return, "length": summary.length,
            "timed_out": summary.timed_out, "invalid": table["invalid"].number(summary.invalid),
            "policy_version": summary.policy_version, "frames": table["frames"].number(summary.frame_ranges),
            "created": summary.created, "size": summary.size, "order": sort_key(summary),
        }  # fmt: skip
        for name, value in values.items():
            self._columns[name][row] = value
        self.names.append(summary.name)
        self._rows[summary.name] = row
        self._alive[row] = True
        return row


def sort_key(summary: EpisodeSummary) -> int:
    """A 64-bit number from the key alone, by which episodes are ordered wherever the order of their commits must not matter."""
    return int(summary.name[-8:], 16) << 32 | (summary.key.seed * 31 + summary.key.attempt) & 0xFFFFFFFF


def numbers(array: pa.Array, dtype: type) -> np.ndarray:
    """The values of an Arrow array in place. ValueError if they are of another type or some are missing.

    Like ``to_numpy``, which imports pandas where that is installed: that takes longer than to open a store.
    """
    if array.null_count or array.type != pa.from_numpy_dtype(dtype):
        raise ValueError(f"a column of {array.type} instead of {np.dtype(dtype)}")
    at = array.offset * np.dtype(dtype).itemsize
    return np.frombuffer(array.buffers()[1], dtype, len(array), at) if len(array) else np.zeros(0, dtype)


_NAME = r"^(?P<source>[a-z]+)-[A-Za-z0-9_]*-(?P<seed>[0-9]{8,19})-a(?P<attempt>[0-9]{1,19})-(?P<digest>[0-9a-f]{8})$"


def _check(names: list[str], columns: dict[str, np.ndarray], tables: dict[str, list]) -> None:
    """ValueError or TypeError unless these can be the parts of an index: they may come from anywhere."""
    if len(set(names)) != len(names) or any(len(columns[name]) != len(names) for name in COLUMNS):
        raise ValueError("columns of different lengths")
    for name in TABLES:
        values, empty = tables[name], () if name == "frames" else ""
        if not values or values[0] != empty or any(type(v) is not type(empty) for v in values) or len(set(values)) != len(values):
            raise ValueError(f"the table of {name} is none")
    if not names:
        return
    for name, most in {"source": len(SOURCES), **{name: len(tables[name]) for name in TABLES}}.items():
        if not 0 <= columns[name].min() <= columns[name].max() < most:
            raise ValueError(f"{name} outside of its table")
    if columns["length"].min() < 1:
        raise ValueError("impossible values")
    if not ((columns["score"] >= 0) & (columns["score"] <= 1)).all():
        raise ValueError("scores outside of [0, 1]")
    last = np.array([ranges[-1][1] - 1 if ranges else 0 for ranges in tables["frames"]])
    if (last[columns["frames"]] > columns["length"]).any():
        raise ValueError("frames behind the end of an episode")


def _check_names(names: pa.StringArray, columns: dict[str, np.ndarray]) -> None:
    """ValueError unless the names are those of keys with these columns, as far as they tell."""
    parts = pc.extract_regex(names, _NAME)
    if parts.null_count:
        raise ValueError("names that are none of episodes")
    same = parts.field("source").to_pylist() == [SOURCES[number] for number in columns["source"].tolist()]
    for name in ("seed", "attempt"):
        same = same and np.array_equal(numbers(parts.field(name).cast(pa.int64()), np.int64), columns[name])
    if not same:
        raise ValueError("names that do not fit their columns")
    letters = np.frombuffer("".join(parts.field("digest").to_pylist()).encode(), np.uint8).reshape(-1, 8)
    digits = np.where(letters >= ord("a"), letters - ord("a") + 10, letters - ord("0")).astype(np.uint64)
    high = digits @ (np.uint64(16) ** np.arange(7, -1, -1, dtype=np.uint64))
    low = (columns["seed"].astype(np.uint64) * np.uint64(31) + columns["attempt"].astype(np.uint64)) & np.uint64(0xFFFFFFFF)
    if not np.array_equal(columns["order"], high << np.uint64(32) | low):
        raise ValueError("an order that is not that of the keys")
