"""Follows a run's ``metrics.jsonl`` as it grows, and keeps of it what the page draws."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import Any

CURVES = ("pretrain", "planning", "refine")
KEPT = ("loss", "action", "future", "value", "version", "seconds")
MAX_POINTS = 2000  #: of a curve; a longer one loses every second point
MARKS = ("death", "wait", "resume")


class Metrics:
    """What the lines of ``metrics.jsonl`` said so far. :meth:`update` reads only what was added since the last call.

    A file that became shorter is read anew. A line without its end is left for the next call; one that is no JSON object is passed over.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._begin()

    def _begin(self) -> None:
        self._offset = 0
        self.last: dict[str, dict] = {}  #: stage -> its newest row
        self.curves: dict[str, list[dict[str, Any]]] = {}  #: stage -> points {time, step, loss, ...}, oldest first
        self.marks: deque[dict[str, Any]] = deque(maxlen=500)  #: {time, kind, text}, oldest first
        self.staleness: deque[dict[str, Any]] = deque(maxlen=500)  #: {time, versions} of finished episodes
        self.stages: list[dict[str, Any]] = []  #: {name, seconds} of a demo's finished stages
        self._stride = dict.fromkeys(CURVES, 1)
        self._count = dict.fromkeys(CURVES, 0)

    def update(self) -> bool:
        """Take in what is new; whether anything was. OSError where the file cannot be read; a missing one has no lines."""
        try:
            with open(self.file, "rb") as file:
                size = file.seek(0, 2)
                if size < self._offset:
                    self._begin()
                file.seek(self._offset)
                data = file.read(size - self._offset)
        except FileNotFoundError:
            return False
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        for line in data[:whole].splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("stage"), str) and finite(row.get("time")) is not None:
                self._take(row["stage"], row)
        return bool(whole)

    def _take(self, stage: str, row: dict[str, Any]) -> None:
        self.last[stage] = row
        if stage in CURVES and finite(row.get("step")) is not None:
            self._point(stage, row)
        elif stage in MARKS:
            self.marks.append({"time": row["time"], "kind": stage, "text": _mark(stage, row)})
        elif stage == "refine_episode" and isinstance(row.get("version"), int):
            newest = self.last.get("refine", {}).get("version")
            if isinstance(newest, int):
                self.staleness.append({"time": row["time"], "versions": max(0, newest - row["version"])})
        elif stage == "demo":
            self.stages.append({"name": str(row.get("name")), "seconds": finite(row.get("seconds"))})

    def _point(self, stage: str, row: dict[str, Any]) -> None:
        points = self.curves.setdefault(stage, [])
        number = row.get("round", 1)
        while points and points[-1]["round"] == number and points[-1]["step"] >= row["step"]:
            points.pop()  # a resume went back behind it
        self._count[stage] += 1
        if self._count[stage] % self._stride[stage]:
            return
        kept = {key: finite(row.get(key)) for key in KEPT if key in row}
        points.append({"time": row["time"], "step": row["step"], "round": number, **kept})
        if len(points) > MAX_POINTS:
            self._stride[stage] *= 2
            del points[::2]

    def rate(self, stage: str, within: float = 60.0) -> float | None:
        """Steps per second of a stage's learner over its last ``within`` seconds; None without two points."""
        points = self.curves.get(stage, [])
        if len(points) < 2:
            return None
        end = points[-1]
        begin = next((p for p in points if p["round"] == end["round"] and end["time"] - p["time"] <= within and p is not end), points[-2])
        seconds = end["time"] - begin["time"]
        return (end["step"] - begin["step"]) / seconds if seconds > 0 and end["round"] == begin["round"] else None


def finite(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def _mark(stage: str, row: dict[str, Any]) -> str:
    if stage == "death":
        return f"{row.get('who')} died ({row.get('why')}): {row.get('then')}"
    if stage == "wait":
        return f"{row.get('who')} waited {row.get('seconds')} s for {row.get('on')}"
    return f"{row.get('what')} went on from step {row.get('step')}"
