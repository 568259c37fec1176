"""Kills of one part at one instant of a running `refine`, one after the other on one run, and what each cost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from jobs.chaos.nodes import TwoNodes
from jobs.chaos.watch import PATIENCE_S, SIGNS, Books, Command, Instants, Stuck, rows

PARTS = ("rollout worker", "simulator child", "inference actor", "learner rank", "raylet", "driver", "everything")
MOMENTS = ("idle", "mid-batch", "mid-commit", "mid-checkpoint", "mid-push")
#: The point in the code at which a process stands still while a part is killed. The part itself stands there, if it comes by.
POINTS = {"mid-batch": "answer", "mid-commit": "commit", "mid-checkpoint": "checkpoint", "mid-push": "push"}
OWN_POINTS = {("rollout worker", "mid-batch"): "chunk", ("simulator child", "mid-batch"): "chunk", ("learner rank", "mid-batch"): "step",
              ("learner rank", "mid-push"): "publish"}
QUIET_S = 2.0  #: after the driver stood still, nobody works any more
#: Short episodes and bursts, so that every instant comes by often; far more of both than a campaign lasts.
FLAGS = ["--sim.task", "Lift", "--rollout.workers", "2", "--rollout.envs-per-worker", "2", "--rollout.horizon", "30",
         "--learner.batch-size", "8", "--learner.checkpoint-every", "10", "--publish-every", "10", "--planning-steps", "0",
         "--learner.advantage-temperature", "0", "--learner.self-imitation", "0", "--replay.samples-per-insert", "1"]
ENDLESS = ["--refine-steps", "60000", "--refine-rollouts", "6000"]


@dataclass
class Cell:
    """One kill and what came of it."""

    part: str
    moment: str
    recovered: bool = False
    seconds: float = float("nan")  #: from the kill to the next progress of all that died
    start: float = float("nan")  #: of these, from the beginning of the slowest new process to its first progress, and the cluster's own
    restarted: bool = False  #: the command ended, and was started again
    lost: int = 0
    doubled: int = 0
    problem: str = ""

    @property
    def name(self) -> str:
        return f"{self.part} {self.moment}"


class Campaign:
    """A run, its command, and the cells one after the other; use it with ``with``.

    Args:
        run: folder of a finished small run, in which `refine` begins anew. It is changed.
        work: folder for logs and instants.
    """

    def __init__(self, run: Path, work: Path, *flags: str):
        self.run, self.flags = run, [*FLAGS, *ENDLESS, *flags]
        self.instants = Instants(work / "instants")
        self.nodes = TwoNodes(work / "nodes", COSMOS_RAY_INSTANTS=str(self.instants.folder))
        self.command: Command | None = None
        self.cells: list[Cell] = []
        self.killed = 0

    def __enter__(self) -> Campaign:
        self.nodes.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.command is not None and not self.command.ended():
            self.command.kill()
        self.nodes.close()

    def begin(self) -> float:
        """Start the command and wait until every part works. Seconds that this took."""
        began = time.time()
        self.command = Command(self.nodes, self.run, "refine", *self.flags)
        self.wait_for_all(began)
        return time.time() - began

    def wait_for_all(self, after: float) -> None:
        """Wait until every part has shown a sign of its work after ``after``, and every worker is there."""
        for part, sign in SIGNS.items():
            self.command.until(f"sign of a {part}", lambda s=sign: self.instants.first(s, after, psutil.pid_exists))
        self.command.until("two rollout workers", lambda: len(self.command.actors("rollout worker")) == 2)

    def cell(self, part: str, moment: str) -> Cell:
        """Kill ``part`` at ``moment``, wait for its recovery, and balance the books."""
        cell = Cell(part, moment)
        self.cells.append(cell)
        try:
            if self.command is None or self.command.ended():
                self.begin()
            self.wait_for_all(time.time())
            self._kill(cell)
        except (Stuck, subprocess.TimeoutExpired) as stuck:
            cell.problem = str(stuck)
            for point in (*POINTS.values(), *OWN_POINTS.values()):
                self.instants.release(point)
        books = Books.of(self.run)
        cell.lost, cell.doubled = len(books.lost), len(books.doubled)
        if not books.right:
            cell.problem += f" {books}"
        return cell

    def _kill(self, cell: Cell) -> None:
        with self._held(cell) as (point, standing):
            known = {process.pid for process in self._all()}
            dying = self._victims(cell.part, standing)
            died = [part for part in SIGNS if any(p.pid in dying for p in self._of(part))]
            killed, acknowledged = time.time(), self._acknowledged()
            self._strike(cell.part, dying)
            self.killed += 1
        if cell.part in ("driver", "everything"):
            self.command.driver.wait(PATIENCE_S)
        cluster = 0.0
        if cell.part == "everything":
            self.nodes.start()
            cluster = time.time() - killed
        signs: dict[str, tuple[float, float]] = {}
        while missing := [part for part in died if part not in signs]:
            if self.command.ended():
                cell.restarted = cell.restarted or cell.part not in ("driver", "everything")
                self.command = Command(self.nodes, self.run, "refine", *self.flags)
            try:
                self.command.until(f"sign of a new {missing[0]}", lambda: self._note(signs, missing, killed, known))
            except Stuck:
                if not self.command.ended():
                    raise
        if cell.part in ("driver", "everything"):
            self.command.until("acknowledgement", lambda: self._acknowledged() > acknowledged)
        cell.recovered, cell.seconds = True, max([time.time() - killed] if not signs else [at for at, _ in signs.values()])
        cell.start = cluster + max([min(start, at) for at, start in signs.values()], default=0.0)  # Ray keeps idle processes for later
        if cell.part == "raylet":
            self.nodes.second.kill()
            self.nodes.add_second()

    def _note(self, signs: dict[str, tuple[float, float]], parts: list[str], killed: float, known: set[int]) -> bool:
        """Note which of ``parts`` have given a sign from a new process: after how many seconds, and how old the process was."""
        for part in parts:
            passed = self.instants.first(SIGNS[part], killed, lambda pid: pid not in known)
            if passed is not None and part not in signs:
                with contextlib.suppress(psutil.NoSuchProcess):
                    signs[part] = passed.time - killed, passed.time - psutil.Process(passed.pid).create_time()
        return parts[0] in signs

    @contextlib.contextmanager
    def _held(self, cell: Cell) -> Iterator[tuple[str, int]]:
        """The moment of ``cell``: a process stands still at the point. Without a point the driver does, and nobody works."""
        driver = self.command.driver
        if cell.moment == "idle":
            driver.send_signal(signal.SIGSTOP)
            time.sleep(QUIET_S)
            try:
                yield "", 0
            finally:
                driver.send_signal(signal.SIGCONT)
            return
        point = OWN_POINTS.get((cell.part, cell.moment), POINTS[cell.moment])
        self.instants.arm(point)
        try:
            yield point, self.command.until(f"process at instant {point!r}", lambda: self.instants.held(point))
        finally:
            self.instants.release(point)

    def _victims(self, part: str, standing: int) -> set[int]:
        """Process ids of what dies at once."""
        if part == "everything":
            return {process.pid for process in self._all()} | {self.command.driver.pid}
        if part == "driver":
            return {process.pid for process in self._all()}  # Ray ends the actors of a dead driver
        if part == "raylet":
            return {p.pid for p in self.nodes.second.raylet.children(recursive=True)}
        own = self._of(part)
        chosen = next((p for p in own if p.pid == standing or any(c.pid == standing for c in p.children(recursive=True))), own[0])
        return {p.pid for p in (chosen, *chosen.children(recursive=True))}

    def _strike(self, part: str, dying: set[int]) -> None:
        if part == "everything":
            self.command.driver.kill()
            self.nodes.kill()
        elif part == "driver":
            self.command.driver.kill()
        elif part == "raylet":
            self.nodes.kill_second_raylet()
        else:
            first = min(dying, key=lambda pid: psutil.Process(pid).create_time())
            os.kill(first, signal.SIGKILL)

    def _of(self, part: str) -> list[psutil.Process]:
        """Processes of a part, the longest-running first."""
        if part != "simulator child":
            return self.command.actors(part)
        pids = {p.pid for p in self.instants.update() if p.name == SIGNS[part]}
        below = [q for actor in self.command.actors("rollout worker") for q in (actor, *actor.children(recursive=True))]
        return [p for p in below if p.pid in pids]

    def _all(self) -> list[psutil.Process]:
        return [p for node in self.nodes.nodes() for p in node.processes()]

    def _acknowledged(self) -> int:
        return len(rows(self.run, "refine")) + len(rows(self.run, "refine_episode"))

    def finish(self) -> None:
        """Interrupt the command, have a shorter one come to its end, and write the report. Stuck when one of them fails."""
        if self.command is not None and not self.command.ended():
            if (code := self.command.interrupt()) != 130:
                raise Stuck(f"Ctrl-C ended the command with {code}:\n{self.command.said()}")
        stored = len(rows(self.run, "refine_episode"))
        reached = max((row["step"] for row in rows(self.run, "refine")), default=0)
        self._to_end("refine", *self.flags, "--refine-steps", str(reached + 20), "--refine-rollouts", str(stored))
        self._to_end("report")

    def _to_end(self, stage: str, *flags: str) -> None:
        self.command = command = Command(self.nodes, self.run, stage, *flags)
        command.until(f"end of `{stage}`", command.ended, ends=True)
        if command.driver.returncode:
            raise Stuck(f"`{stage}` ended with {command.driver.returncode}:\n{command.said()}")


def campaign(folder: Path, work: Path, cells: list[tuple[str, str]],
             say: Callable[[Cell], None] = lambda cell: None) -> tuple[list[Cell], Books]:
    """Run ``cells`` on the run in ``folder`` and bring its refinement to an end."""
    with Campaign(folder, work) as run:
        for part, moment in cells:
            say(run.cell(part, moment))
        run.finish()
        return run.cells, Books.of(folder, whole=True)
