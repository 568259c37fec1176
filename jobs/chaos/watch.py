"""What a run under chaos does: its processes, the instants that they pass, and its books (acknowledged, stored, trained)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.replay.upkeep.repair import verify
from jobs.chaos.nodes import TwoNodes

ROOT = Path(__file__).parents[2]
ACTORS = {"rollout worker": "ray::RolloutActor", "inference actor": "ray::InferenceActor", "learner rank": "ray::LearnerActor"}
#: The instant whose passing shows that a part works.
SIGNS = {"rollout worker": "commit", "simulator child": "chunk", "inference actor": "answer", "learner rank": "step"}
PATIENCE_S = 400.0  #: for anything to happen, on a busy machine


class Stuck(Exception):
    """What was waited for did not happen."""


@dataclass(frozen=True)
class Passed:
    """A process was at an instant."""

    time: float  #: Unix seconds
    pid: int
    name: str


class Instants:
    """The folder that cosmos_ray/instants.py writes to."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._read, self._rest = 0, ""
        self.passed: list[Passed] = []

    def update(self) -> list[Passed]:
        """All that passed so far."""
        file = self.folder / "passed"
        if file.exists():
            with open(file) as opened:
                opened.seek(self._read)
                text = opened.read()
                self._read = opened.tell()
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                seconds, pid, name = line.split()
                self.passed.append(Passed(float(seconds), int(pid), name))
        return self.passed

    def first(self, name: str, after: float, pids: Callable[[int], bool]) -> Passed | None:
        """The first passing of instant ``name`` later than ``after`` by one of ``pids``."""
        return next((p for p in self.update() if p.name == name and p.time > after and pids(p.pid)), None)

    def arm(self, name: str) -> None:
        """The next process at instant ``name`` stops there."""
        (self.folder / name).touch()

    def disarm(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def held(self, name: str) -> int | None:
        """The process that stands still at instant ``name``."""
        for file in self.folder.glob(f"{name}.*"):
            pid = int(file.suffix[1:])
            try:
                if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                    return pid
            except psutil.NoSuchProcess:
                file.unlink()
        return None

    def release(self, name: str) -> None:
        """Let whoever stands still at instant ``name`` go on."""
        self.disarm(name)
        for file in self.folder.glob(f"{name}.*"):
            try:
                os.kill(int(file.suffix[1:]), signal.SIGCONT)
            except ProcessLookupError:
                pass
            file.unlink()


class Command:
    """A command of the loop on a cluster, and the processes behind it."""

    def __init__(self, nodes: TwoNodes, run: Path, stage: str, *flags: str):
        self.nodes, self.folder, self.began = nodes, run, time.time()
        self.log = nodes.folder / f"{stage}{int(1000 * self.began)}.log"
        with open(self.log, "w") as file:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "cosmos_ray", stage, "--root", str(run.parent), "--name", run.name,
                 *(["--address", nodes.address] if stage != "report" else []), *flags],
                cwd=ROOT, env=nodes.variables, stdout=file, stderr=file)

    def actors(self, part: str) -> list[psutil.Process]:
        """The running processes of a part ("rollout worker", "inference actor", "learner rank"), on all nodes."""
        return [p for node in self.nodes.nodes() for p in node.processes() if _title(p).startswith(ACTORS[part])]

    def ended(self) -> bool:
        return self.driver.poll() is not None

    def said(self) -> str:
        """The end of what the command has said."""
        return self.log.read_text()[-3000:]

    def until(self, what: str, condition: Callable[[], Any], seconds: float = PATIENCE_S, ends: bool = False) -> Any:
        """Wait for ``condition()``; Stuck when it does not come, or the command ends first (unless it may: ``ends``)."""
        limit = time.monotonic() + seconds
        while not (value := condition()):
            if self.ended() and not ends:
                raise Stuck(f"the command ended with {self.driver.returncode} before {what}:\n{self.said()}")
            if time.monotonic() > limit:
                raise Stuck(f"no {what} within {seconds:g} s:\n{self.said()}")
            time.sleep(0.05)
        return value

    def interrupt(self) -> int:
        """Ctrl-C; the exit code."""
        self.driver.send_signal(signal.SIGINT)
        return self.driver.wait(PATIENCE_S)

    def kill(self) -> None:
        """SIGKILL the driver."""
        self.driver.kill()
        self.driver.wait()


def _title(process: psutil.Process) -> str:
    try:
        return (process.cmdline() or [""])[0] if process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.NoSuchProcess:
        return ""


def rows(folder: Path, stage: str) -> list[dict]:
    """Rows of the run's metrics of one stage."""
    file, out = folder / "metrics.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # torn by a kill
        if row["stage"] == stage:
            out.append(row)
    return out


@dataclass(frozen=True)
class Books:
    """What a run says that it did, against what is there."""

    acknowledged: int  #: rows of finished episodes in metrics.jsonl
    stored: int  #: episodes in the store
    lost: tuple[str, ...]  #: acknowledged and not in the store
    doubled: tuple[str, ...]  #: acknowledged twice, or in the store twice
    damaged: tuple[str, ...]  #: files of the store that cannot be read, states and files in quarantine
    untrained: tuple[int, ...]  #: learner steps that no burst, not superseded by a later one, accounts for

    @property
    def right(self) -> bool:
        return not (self.lost or self.doubled or self.damaged or self.untrained)

    @staticmethod
    def of(folder: Path, burst: int = 10, whole: bool = False) -> Books:
        """The books of the run in ``folder``; ``whole`` reads every stored byte."""
        store = ReplayStore(folder / "replay", create=False)
        store.refresh()
        names = Counter(file.stem for file in (folder / "replay").rglob("episodes/**/*.arrow"))
        acknowledged = [row["name"] for row in rows(folder, "refine_episode")]
        damaged = [f"{p.path}: {p.reason}" for p in verify(store).problems if p.fault != "stray"] if whole else []
        damaged += [str(file) for file in (folder / "replay" / "quarantine" / "log.jsonl", folder / "quarantined.jsonl") if file.exists()]
        twice = [name for counted in (Counter(acknowledged), names) for name, n in counted.items() if n > 1]
        return Books(len(acknowledged), len(names), tuple(sorted(set(acknowledged) - set(names))), tuple(sorted(twice)), tuple(damaged),
                     tuple(gaps([row["step"] for row in rows(folder, "refine") if "step" in row], burst)))


def gaps(steps: list[int], burst: int) -> list[int]:
    """Steps after which a training skipped some, of its rows in the order of writing. A row that a later one sets back does not count;
    a burst whose row was lost with the driver leaves at most twice a burst between two rows."""
    kept: list[int] = []
    for step in steps:
        while kept and kept[-1] >= step:
            kept.pop()
        kept.append(step)
    return [a for a, b in zip([0, *kept], kept, strict=False) if b - a > 2 * burst]
