"""The episodes of a store for the page: followed as it grows, filtered, paged, and one of them in full."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.replay.format.episode import CLASSES, SOURCES, spoken
from cosmos_ray.replay.format.schema import DamagedEpisode
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.index import Table
from cosmos_ray.replay.store import ReplayStore

OPEN = 64  #: episodes kept mapped
PAGE = 48  #: episodes of one page
OUTCOMES = ("success", "failure", "invalid")
SHOWN = ("arm", "noise_seed", "candidates", "steps", "action_noise", "chunk_noise", "seconds", "horizon")  #: of an episode's info
NONE = -1  #: in :attr:`Episodes.arms`: not known yet


@dataclass(frozen=True)
class Filter:
    """Which episodes; an empty value lets all through. ``low`` and ``high`` are of the values of their decisions, in [0, 1]."""

    source: str = ""
    task: str = ""
    outcome: str = ""
    arm: str = ""
    version: int | None = None
    low: float = 0.0
    high: float = 1.0


class Episodes:
    """Everything that the page tells of a store's episodes. One thread calls :meth:`update`, any may read.

    The index of the store tells task, outcome and version. The arm and the values of the decisions lie in each episode's header, which
    :meth:`update` reads newest first, some at a time. StoreError if ``root`` is no store.
    """

    def __init__(self, root: str) -> None:
        self.store = ReplayStore(root, open_limit=OPEN, read_only=True)
        self.arm_names = Table([""])
        self.arms = np.zeros(0, np.int32)  #: (rows,) number in :attr:`arm_names`, or NONE
        self._decisions = np.zeros((0, 3))  # row, step, value
        self.damaged: dict[str, str] = {}  #: name -> reason, of episodes whose header could not be read

    # ---------------------------------------------------------------- following

    def update(self, budget_s: float = 0.5) -> bool:
        """Look for new episodes, then read headers for ``budget_s`` seconds; whether anything is new. StoreError."""
        index = self.store.index
        before = len(index.names), index.removed
        self.store.update()
        rows = len(index.names)
        if rows > len(self.arms):
            self.arms = np.concatenate([self.arms, np.full(rows - len(self.arms), NONE, np.int32)])
        return self._read_headers(budget_s) or (rows, index.removed) != before

    def _read_headers(self, budget_s: float) -> bool:
        until, found, read = time.monotonic() + budget_s, [], False
        for row in np.flatnonzero((self.arms == NONE) & self.store.index.alive[: len(self.arms)])[::-1].tolist():
            if read and time.monotonic() > until:
                break
            read = True
            info = self._info(self.store.index.names[row])
            found += [(row, d["step"], (d["value"] + 1) / 2) for d in decisions(info)]
            self.arms[row] = self.arm_names.number(str(info.get("arm") or "")[:200])
        if found:
            self._decisions = np.concatenate([self._decisions, np.array(found, np.float64)])
        return read

    def _info(self, name: str) -> dict[str, Any]:
        try:
            return self.view(name).header["info"]
        except (StoreError, OSError) as error:
            self.damaged[name] = str(error)
            return {}

    @property
    def unread(self) -> int:
        """Episodes whose header is not read yet."""
        alive = self.store.index.alive
        return int(((self.arms == NONE) & alive[: len(self.arms)]).sum()) + int(alive[len(self.arms):].sum())

    # ---------------------------------------------------------------- listing

    def rows(self, chosen: Filter) -> np.ndarray:
        """(n,) rows of the index that the filter lets through, newest first. ConfigError for a word that it does not know."""
        index = self.store.index
        known = min(len(index.names), len(self.arms))
        mask = index.alive[:known].copy()
        if chosen.source:
            mask &= index["source"][:known] == _number(SOURCES, chosen.source, "source")
        if chosen.outcome:
            broken, success = index["invalid"][:known] != 0, index["success"][:known]
            mask &= (~broken & success, ~broken & ~success, broken)[_number(OUTCOMES, chosen.outcome, "outcome")]
        if chosen.task:
            mask &= index["task"][:known] == _value(index.tables["task"], chosen.task)
        if chosen.arm:
            mask &= self.arms[:known] == _value(self.arm_names, chosen.arm)
        if chosen.version is not None:
            mask &= index["policy_version"][:known] == chosen.version
        if chosen.low > 0 or chosen.high < 1:
            held = self._decisions
            inside = (held[:, 2] >= chosen.low) & ((held[:, 2] < chosen.high) | (chosen.high >= 1))
            some = np.zeros(known, bool)
            some[held[inside, 0].astype(np.int64)] = True
            mask &= some
        rows = np.flatnonzero(mask)
        return rows[np.lexsort((rows, index["created"][rows]))[::-1]]

    def page(self, chosen: Filter, number: int = 0) -> dict[str, Any]:
        """{total, page, pages, episodes, choices}: one page of what the filter lets through, newest first."""
        rows = self.rows(chosen)
        pages = max(1, -(-len(rows) // PAGE))
        number = min(max(0, number), pages - 1)
        return {"total": len(rows), "page": number, "pages": pages, "unread": self.unread,
                "episodes": self.brief(rows[number * PAGE : (number + 1) * PAGE]), "choices": self.choices()}

    def brief(self, rows: Iterable[int]) -> list[dict[str, Any]]:
        """One line of each episode."""
        out, index = [], self.store.index
        for s, row in zip(index.summaries(np.array(rows, np.int64), str), rows, strict=True):
            last = range(*s.frame_ranges[-1])[-1] if s.frame_ranges else None
            out.append({"name": s.name, "task": s.task, "source": s.source, "seed": s.key.seed, "initial_state": s.key.initial_state,
                        "outcome": "invalid" if s.invalid else "success" if s.success else "failure", "length": s.length,
                        "version": s.policy_version, "created": s.created, "frame": last, "arm": self._arm(int(row))})
        return out

    def _arm(self, row: int) -> str:
        return self.arm_names.values[self.arms[row]] if row < len(self.arms) and self.arms[row] > 0 else ""

    def choices(self) -> dict[str, list]:
        """What a filter can name."""
        index, alive = self.store.index, self.store.index.alive
        of = {name: np.unique(index[name][alive]) for name in ("task", "policy_version", "source")}
        return {"task": sorted(str(index.tables["task"].values[i]) for i in of["task"]), "source": [SOURCES[i] for i in of["source"]],
                "version": [int(v) for v in of["policy_version"]], "outcome": list(OUTCOMES), "arm": sorted(self.arm_names.values[1:])}

    def counts(self) -> dict[str, int]:
        """Episodes by class."""
        index = self.store.index
        numbers = index.classes(slice(None))[index.alive]
        return {name: int((numbers == i).sum()) for i, name in enumerate(CLASSES)}

    def decisions(self, rows: np.ndarray) -> np.ndarray:
        """(n, 3) float64 of these episodes: row, step, value in [0, 1] of each decision read so far."""
        held = self._decisions
        return held[np.isin(held[:, 0].astype(np.int64), rows)]

    # ---------------------------------------------------------------- one episode

    def view(self, name: str) -> EpisodeView:
        """The episode. StoreError where there is none that can be read."""
        if self.store.index.row(name) is None:
            raise StoreError(f"the store has no episode {name!r}: it may have been evicted")
        try:
            return self.store.view(name)
        except FileNotFoundError as error:
            raise StoreError(f"the file of episode {name} is gone") from error
        except DamagedEpisode as error:
            self.store.discard(name, str(error))
            raise

    def detail(self, name: str) -> dict[str, Any]:
        """Everything that the page shows of an episode but its pictures. StoreError."""
        view = self.view(name)
        s, info = view.summary, view.header["info"]
        shown = {key: str(info[key])[:200] for key in SHOWN if key in info}
        rewards = view.column("reward")
        return {**self.brief([self.store.index.row(name) or 0])[0], "run": s.key.run, "attempt": s.key.attempt, "invalid": s.invalid,
                "timed_out": s.timed_out, "return": number(s.episode_return), "score": number(s.score),
                "instructions": spoken({"instructions": view.spoken}, view.instruction), "cameras": list(view.cameras),
                "frames": s.frame_steps.tolist(), "rate": view.embodiment.control_freq or 20.0,
                "decisions": [{"step": d["step"], "value": (d["value"] + 1) / 2, "chosen": d.get("chosen", 0),
                               "scores": [number(score) for score in d.get("scores", [])]} for d in decisions(info)],
                "rewards": [number(float(r)) for r in rewards], "info": shown,
                "replay": f"python -m cosmos_ray replay replay-episode --store {shlex.quote(str(self.store.root))} {name}"}

    def frame(self, name: str, camera: int, step: int) -> bytes | None:
        """The JPEG stored of a step, None where there is none; camera -1 is the last one, which looks at the whole scene. StoreError."""
        view = self.view(name)
        camera += len(view.cameras) if camera == -1 else 0
        if not 0 <= camera < len(view.cameras) or not 0 <= step <= view.length:
            return None
        jpeg = view.frame(view.cameras[camera], step)
        return None if jpeg is None else jpeg.tobytes()


def decisions(info: dict[str, Any]) -> list[dict[str, Any]]:
    """The decisions of an episode that have a step and a finite value; those of a foreign file may be anything."""
    held = info.get("decisions")
    return [d for d in held if isinstance(d, dict) and isinstance(d.get("step"), int) and number(d.get("value")) is not None] \
        if isinstance(held, list) else []


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _number(known: Iterable[str], word: str, what: str) -> int:
    words = list(known)
    if word not in words:
        raise ConfigError(f"{what} {word!r} is unknown: use one of {', '.join(words)}")
    return words.index(word)


def _value(table: Table, value: str) -> int:
    """The number of a value in the table; one that no row has where it is not there."""
    return table.values.index(value) if value in table.values else -2
