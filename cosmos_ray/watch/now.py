"""What a run does at the moment: stage, progress, rates, success by policy version, deaths."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_ray.config import RunConfig
from cosmos_ray.diagnosis.pulse import PULSE_S, lives, read_pulse
from cosmos_ray.diagnosis.why import row_text
from cosmos_ray.evidence import wilson
from cosmos_ray.replay.format.episode import SOURCES
from cosmos_ray.watch.episodes import Episodes
from cosmos_ray.watch.metrics import CURVES, Metrics

RECENT_S = 120.0  #: over which rates are counted
BINS = 60  #: of the chart of episodes over time
RESULTS = ("collect", "rollout", "refine_result", "evaluate")  #: rows that end a stage
STAGE_OF = {"demo": "collect", "rollout": "rollout", "eval": "evaluate"}  #: source of the newest episode -> stage


class Now:
    """The snapshot that the page follows, of a run (``folder`` and ``config``) or of a bare store (None, None)."""

    def __init__(self, episodes: Episodes, folder: Path | None, config: RunConfig | None, clock: Callable[[], float] = time.time) -> None:
        self.episodes, self.folder, self.config, self._clock = episodes, folder, config, clock
        self.metrics = Metrics(folder / "metrics.jsonl") if folder else None
        self._wilson: dict[tuple[int, int], tuple[float, float]] = {}
        self._report: tuple[float, dict[str, Any] | None] = (0.0, None)
        self._pulse: dict[str, Any] | None = None

    def update(self) -> bool:
        """Read what was added to the run's metrics, and the pulse of the command that works on it; whether anything was new. OSError."""
        if self.folder is None or self.metrics is None:
            return False
        before, self._pulse = self._pulse, read_pulse(self.folder)
        return self.metrics.update() or self._pulse != before

    def snapshot(self) -> dict[str, Any]:
        """Everything that the panel shows, as plain JSON."""
        metrics, now = self.metrics, self._clock()
        index = self.episodes.store.index
        rows = np.flatnonzero(index.alive)
        created = index["created"][rows]
        recent = rows[created > now - RECENT_S]
        rates = {"episodes_per_min": len(recent) * 60 / RECENT_S, "env_steps_per_s": float(index["length"][recent].sum()) / RECENT_S}
        command = self._command(now)
        stage = self._stage(rows, created, now) if command is None else command.pop("stage") or self._stage(rows, created, now)
        if metrics and stage and stage["name"] in CURVES:
            rates["learner_steps_per_s"] = metrics.rate(stage["name"]) or 0.0
        return {"time": now, "name": self.config.name if self.config else "", "store": str(self.episodes.store.root),
                "task": ", ".join(self.config.sim.names) if self.config else "", "process": owner(self.folder) if self.folder else None,
                "episodes": len(rows), "unread": self.episodes.unread, "counts": self.episodes.counts(),
                "quarantined": len(self.episodes.store.quarantine.entries()) + len(self.episodes.store.catalog.stuck),
                "stage": stage, "stages": metrics.stages if metrics else [], "rates": rates,
                "versions": self._versions(rows), "over_time": _over_time(created, index["success"][rows], index["source"][rows]),
                "curves": {name: _thin(points) for name, points in metrics.curves.items()} if metrics else {},
                "marks": list(metrics.marks) if metrics else [], "staleness": list(metrics.staleness) if metrics else [],
                "version": metrics.last.get("refine", {}).get("version") if metrics else None, "evaluation": self._evaluation(),
                "command": command}

    def _command(self, now: float) -> dict[str, Any] | None:
        """{words, age, waiting, processes, stage} of the command that works on the run, as it says itself; None where none does, or where
        its last sign is old. ``stage`` as of :meth:`_stage`, None between two stages."""
        pulse = self._pulse
        if pulse is None or lives(pulse) is False or now - pulse["time"] > 10 * PULSE_S:
            return None
        views = dict(pulse["views"])
        row = next(iter(views.pop("progress", ())), None)
        stage = row and {"name": row["what"].split()[0], "done": row["done"], "total": row["total"], "left": row["left_s"],
                         "since": pulse["time"], "ended": False}
        return {"words": pulse["command"], "age": max(0.0, now - pulse["time"]), "stage": stage,
                "waiting": [f"{wait['who']}: {wait['on']}, {wait['seconds']:.0f} s" for wait in pulse["waiting"] if wait["seconds"] > 2.0],
                "processes": [row_text(row) for rows in views.values() for row in rows]}

    def _stage(self, rows: np.ndarray, created: np.ndarray, now: float) -> dict[str, Any] | None:
        """{name, done, total, left, since, ended} of what happened last: ``left`` in seconds, ``since`` when anything last happened."""
        index, newest = self.episodes.store.index, int(created.argmax()) if len(rows) else None
        source = SOURCES[index["source"][rows[newest]]] if newest is not None else ""
        name, at = STAGE_OF.get(source, ""), float(created[newest]) if newest is not None else 0.0
        last = self.metrics.last if self.metrics else {}
        of_source = rows[index["source"][rows] == SOURCES.index(source)] if source else rows[:0]
        done, rate, ended = len(of_source), float((index["created"][of_source] > now - RECENT_S).sum()) / RECENT_S, False
        for stage in CURVES:
            row = last.get(stage)
            if row and (row["time"] >= at or (stage == "refine" and last.get("refine_episode", {}).get("time", 0.0) >= at - 5.0)):
                name, at, done, rate = stage, max(at, row["time"]), row["step"], (self.metrics.rate(stage) if self.metrics else 0) or 0.0
        for result in RESULTS:
            if result in last and last[result]["time"] >= at - 1.0:
                name, at, ended = result.removesuffix("_result"), last[result]["time"], True
        if not name:
            return None
        total = self._total(name)
        left = (total - done) / rate if total and rate and not ended and done < total and now - at < RECENT_S else None
        return {"name": name, "done": done, "total": total, "left": left, "since": at, "ended": ended}

    def _total(self, stage: str) -> int | None:
        c = self.config
        if c is None:
            return None
        return {"collect": c.demos * max(1, len(c.sim.names)), "pretrain": c.pretrain_steps, "rollout": c.rollouts,
                "planning": c.planning_steps, "refine": c.refine_steps}.get(stage) or None

    def _versions(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Success of rollouts by the policy version that began them, ascending."""
        index = self.episodes.store.index
        rows = rows[(index["source"][rows] == SOURCES.index("rollout")) & (index["invalid"][rows] == 0)]
        versions, inverse = np.unique(index["policy_version"][rows], return_inverse=True)
        wins = np.bincount(inverse, index["success"][rows], len(versions))
        played = np.bincount(inverse, minlength=len(versions))
        return [{"version": int(v), **self._counted(int(w), int(n))} for v, w, n in zip(versions, wins, played, strict=True)]

    def _counted(self, wins: int, played: int) -> dict[str, Any]:
        if (wins, played) not in self._wilson:
            self._wilson[wins, played] = wilson(wins, played)
        low, high = self._wilson[wins, played]
        return {"successes": wins, "episodes": played, "low": low, "high": high}

    def _evaluation(self) -> list[dict[str, Any]]:
        """The arms of ``evaluation.json``, read again where it changed."""
        if self.folder is None:
            return []
        try:
            file = self.folder / "evaluation.json"
            stamp = file.stat().st_mtime
            if stamp != self._report[0]:
                held = json.loads(file.read_text())
                self._report = stamp, held if isinstance(held, dict) else None
        except (OSError, ValueError):
            return []
        arms = (self._report[1] or {}).get("arms", {})
        return [{"arm": name, **{key: arm.get(key) for key in ("successes", "episodes", "low", "high")}} for name, arm in arms.items()]


def owner(folder: Path) -> dict[str, Any] | None:
    """{pid, host, alive} of the process that took the run's lock last; ``alive`` is None of another machine. Takes no lock itself."""
    try:
        pid, _, host = (folder / ".lock").read_text().partition(" on ")
        number = int(pid)
    except (OSError, ValueError):
        return None
    alive = os.path.exists(f"/proc/{number}") if host.strip() == socket.gethostname() and os.path.isdir("/proc/self") else None
    return {"pid": number, "host": host.strip(), "alive": alive}


def _thin(points: list[dict[str, Any]], most: int = 300) -> list[dict[str, Any]]:
    stride = -(-len(points) // most) or 1
    return points[::-1][::stride][::-1]


def _over_time(created: np.ndarray, success: np.ndarray, source: np.ndarray) -> dict[str, Any] | None:
    """Episodes of policies over the time of the store: {begin, end, episodes, successes}, in :data:`BINS` bins."""
    acted = (source != SOURCES.index("demo")) & (created > 0)
    if not acted.any():
        return None
    created, success = created[acted], success[acted]
    begin, end = float(created.min()), float(created.max()) + 1.0
    played = np.histogram(created, BINS, (begin, end))[0]
    won = np.histogram(created[success], BINS, (begin, end))[0]
    return {"begin": begin, "end": end, "episodes": played.tolist(), "successes": won.tolist()}
