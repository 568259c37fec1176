"""What the processes of a run are doing at this moment: their stacks, by py-spy, which comes with Ray."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

LOOK_S = 20.0  #: for one process
FRAMES = 6
ACTORS = ("RolloutActor", "DemonstratorActor", "InferenceActor", "LearnerActor", "OracleActor")


@dataclass(frozen=True)
class Doing:
    """One process."""

    pid: int
    name: str
    cpu: float  #: per cent of a core, while its stack was read
    memory_mb: float
    stack: Sequence[str]  #: of the thread that works, innermost first; or why it is not known


def of_run(driver: int) -> list[psutil.Process]:
    """The driver ``driver``'s own processes that act, learn or simulate, with the actors of a private Ray below it."""
    try:
        below = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in below if _plays(process)]


def on_this_machine() -> list[psutil.Process]:
    """The actors of all runs here; for a cluster, whose actors are not below the driver."""
    return [process for process in psutil.process_iter() if _plays(process)]


def look(processes: Sequence[psutil.Process]) -> list[Doing]:
    """What each process does now."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.cpu_percent()  # the next call counts from here
    with ThreadPoolExecutor(4) as threads:
        stacks = list(threads.map(lambda process: _stack(process.pid), processes))
    found = []
    for process, stack in zip(processes, stacks, strict=True):
        try:
            found.append(Doing(process.pid, _name(process), process.cpu_percent(), process.memory_info().rss / 1e6, stack))
        except psutil.NoSuchProcess:
            continue
    return found


def _name(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    return words[0] if words and words[0].startswith("ray::") else "simulators" if "cosmos_ray.sim.child" in " ".join(words) else ""


def _plays(process: psutil.Process) -> bool:
    name = _name(process)
    return name == "simulators" or any(name.startswith(f"ray::{actor}") for actor in ACTORS)


def _stack(pid: int) -> list[str]:
    """The innermost frames of the thread that runs our code."""
    beside = Path(sys.executable).with_name("py-spy")
    spy = str(beside) if beside.exists() else shutil.which("py-spy")
    if spy is None:
        return ["its stack is not known: py-spy is missing (pip install py-spy)"]
    try:
        done = subprocess.run([spy, "dump", "--json", "--pid", str(pid)], capture_output=True, text=True, timeout=LOOK_S)
    except subprocess.TimeoutExpired:
        return [f"its stack is not known: py-spy says nothing within {LOOK_S:g} s"]
    try:
        threads = json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip().splitlines() or [f"nothing, exit code {done.returncode}"])[0]
        return [f"its stack is not known: py-spy says {reason[:160]}"]
    chosen = max(threads, key=lambda thread: (any("cosmos_ray" in f["filename"] for f in thread["frames"]), thread.get("active", False)))
    return [f"{f['name']} ({f.get('short_filename') or f['filename']}:{f['line']})" for f in chosen["frames"][:FRAMES]]
