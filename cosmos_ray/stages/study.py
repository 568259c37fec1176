"""A study as work of a Ray cluster: a process for each run of each task and training seed, spread over the nodes.

A cell (:mod:`cosmos_ray.stages.cell`) is a driver like that of any command, so it goes on where it stopped and survives what a command
survives. The study itself keeps nothing but its file of results: after any death, the same command continues.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

import cosmos_ray
from cosmos_ray.config.study import Cell, Study
from cosmos_ray.errors import CosmosRayError
from cosmos_ray.progress import Progress, say
from cosmos_ray.remote import first_line
from cosmos_ray.stages.cell import LEAVE_S, MARK, description, refuse_other_settings
from cosmos_ray.stages.study_results import StudyResults
from cosmos_ray.supervision import RestartBudget, Supervisor

logger = logging.getLogger(__name__)

LOOK_S = 1.0  #: between two looks at the cells
CELL_STARTS, CELL_STARTS_S = 4, 900.0  #: of one cell, within so many seconds

#: What a cell's process takes over from the study's: Ray's own worker has other values of these, or none.
INHERITED = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RAY_JOB_CONFIG_JSON_ENV_VAR", "MUJOCO_GL", "PYOPENGL_PLATFORM")


class StudyFailed(CosmosRayError):
    """Cells of a study ended with an error."""


def run_study(study: Study, to: Path, at_once: int | None = None, quiet: bool = False) -> StudyResults:
    """Run what is missing of a study on the cluster that this process is part of; returns its results.

    Args:
        to: folder of the file of results and of the log.
        at_once: cells that run at the same time [one for each node].
    StudyFailed, once all other cells are done, when some failed.
    """
    results, cells = StudyResults(study, to), study.cells()
    for cell in cells:
        refuse_other_settings(cell)
    todo = _todo(cells, results)
    to.mkdir(parents=True, exist_ok=True)
    crew = _Crew(cells, todo, results, at_once or sum(node["Alive"] for node in ray.nodes()), quiet)
    try:
        crew.run()
    finally:
        crew.close()
    if crew.failed:
        name, why = next(iter(crew.failed.items()))
        raise StudyFailed(f"{len(crew.failed)} of {len(cells)} cells failed, {name} first: {why}; the other results are in {results.file}, "
                          f"and the same command tries again ({crew.log} has the log)")
    return results


def _todo(cells: list[Cell], results: StudyResults) -> list[Cell]:
    """Cells whose arms are missing, and those that they need, however far these are."""
    wanted = {cell.config.name for cell in cells if cell.arms and results.missing(cell)}
    for cell in reversed(cells):
        if cell.config.name in wanted:
            wanted |= set(cell.needs)
    return [cell for cell in cells if cell.config.name in wanted]


class _Crew:
    """The cells that run, and those that wait for others or for their turn."""

    def __init__(self, cells: list[Cell], todo: list[Cell], results: StudyResults, at_once: int, quiet: bool):
        self._waiting, self._results, self._at_once, self._quiet = list(todo), results, at_once, quiet
        self._running: dict[Any, Cell] = {}  #: by the stream of what the cell says
        self._steps = {cell.config.name: 0 for cell in todo}  #: stages and arms that are done
        self._budgets = {cell.config.name: RestartBudget(CELL_STARTS, CELL_STARTS_S) for cell in todo}
        self._ended: dict[str, str] = {}  #: the error of a cell that said one
        self._done: set[str] = {cell.config.name for cell in cells} - set(self._steps)
        self._supervisor, self._note = Supervisor(), ""
        self.failed: dict[str, str] = {}
        self.log = results.file.with_suffix(".log")
        self._total, there = _steps(cells), _steps(cells) - _steps(todo)
        self._there = there
        self._progress = Progress("study", self._total, there, "steps", quiet=quiet)
        self._log = open(self.log, "a") if todo else None  # noqa: SIM115 - held until close()

    def run(self) -> None:
        """Until no cell is left that could run."""
        while self._start() or self._running:
            ready, _ = ray.wait(list(self._running), timeout=LOOK_S)
            for stream in ready:
                self._take(stream)
            done = self._there + sum(self._steps.values())
            self._progress.update(done, f"{len(self._running)} cells run{self._note}")
        if self._steps:
            self._progress.finish(self._there + sum(self._steps.values()), "")

    def close(self) -> None:
        """Have the cells that still run save what they have and leave."""
        for stream in self._running:
            ray.cancel(stream)
        end = time.monotonic() + LEAVE_S
        while self._running and time.monotonic() < end:
            self._supervisor.waits("study", f"{len(self._running)} cells to save what they have")
            for stream in ray.wait(list(self._running), timeout=LOOK_S)[0]:
                try:
                    ray.get(next(stream))
                except (RayError, StopIteration):
                    del self._running[stream]
        if self._log is not None:
            self._log.close()

    def _start(self) -> bool:
        """Start the cells whose turn it is; whether there were any to start."""
        started = False
        for cell in list(self._waiting):
            if lost := [name for name in cell.needs if name in self.failed]:
                self._waiting.remove(cell)
                self.failed[cell.config.name] = f"it needs {lost[0]}"
            elif len(self._running) < self._at_once and set(cell.needs) <= self._done:
                self._waiting.remove(cell)
                self._launch(cell)
                started = True
        return started

    def _launch(self, cell: Cell) -> None:
        name, chain = cell.config.name, cell.chain
        base = ""
        if chain.base_of:
            other = Study.run_name(cell.task, cell.seed, chain.base_of)
            base = str(Path(cell.config.root) / other / "checkpoints" / "base")
        told = json.dumps(description(cell, ray.get_runtime_context().gcs_address, base))
        self._steps[name] = 0
        self._budgets[name].take()
        environment = {key: os.environ[key] for key in INHERITED if key in os.environ}
        self._running[run_cell.remote(told, environment)] = cell

    def _take(self, stream: Any) -> None:
        """Take in what a cell says, or its end."""
        cell = self._running[stream]
        name = cell.config.name
        try:
            line = ray.get(next(stream))
        except StopIteration:
            del self._running[stream]
            if name in self._ended:
                self.failed[name] = self._ended.pop(name)
            else:
                self._done.add(name)
            return
        except RayError as error:
            del self._running[stream]
            self._again(cell, first_line(error))
            return
        if not line.startswith(MARK):
            if self._log is not None:
                self._log.write(f"{name}: {line}\n")
                self._log.flush()
            self._note = f"; {name}: {line.strip()[:60]}"
            return
        event = json.loads(line.removeprefix(MARK))
        if "error" in event:
            self._ended[name] = event["error"]
        else:
            self._steps[name] += 1
        if "arm" in event:
            self._results.add(cell, {event["arm"]: event["outcomes"]})

    def _again(self, cell: Cell, why: str) -> None:
        """A cell's process or node is gone: the same cell goes on elsewhere, unless that happens again and again."""
        name = cell.config.name
        if self._budgets[name].take():
            self._supervisor.died(f"cell {name}", why, "it starts again and goes on where it stopped")
            self._waiting.insert(0, cell)
        else:
            self.failed[name] = f"it died {CELL_STARTS} times within {CELL_STARTS_S:.0f} s, last: {why}"
            say(f"cell {name} failed: {self.failed[name]}", self._quiet)


def _steps(cells: list[Cell]) -> int:
    return sum(len(cell.chain.stages) + len(cell.arms) for cell in cells)


class CellDied(RuntimeError):
    """A cell's process ended without a word."""


@ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="SPREAD", num_returns="streaming")
def run_cell(told: str, environment: dict[str, str]) -> Iterator[str]:
    """Run a cell in a process of its own, which is a driver of this cluster; yields the lines that it says. CellDied."""
    inherited = {key: value for key, value in os.environ.items() if key not in (*INHERITED, "RAY_ADDRESS", "RAY_RUNTIME_ENV_HOOK")}
    package = str(Path(cosmos_ray.__file__).parents[1])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH", "")])])
    usual = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, "-m", "cosmos_ray.stages.cell", str(os.getpid())], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               env={**usual, **inherited, **environment, "PYTHONPATH": paths})
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_pump, args=(process, lines), daemon=True).start()
    try:
        assert process.stdin is not None
        process.stdin.write(told)
        process.stdin.close()
        failed, last = False, ""
        while True:
            try:
                line = lines.get(timeout=LOOK_S)  # a cancelled task is interrupted between two waits
            except queue.Empty:
                continue
            if line is None:
                break
            failed, last = failed or line.startswith(f'{MARK}{{"error"'), line
            yield line
        code = process.wait()
        if code and not failed:
            raise CellDied(f"it ended with code {code} after: {last[:200]}")
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(LEAVE_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _pump(process: subprocess.Popen, lines: queue.Queue) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line.rstrip("\n"))
    lines.put(None)
