"""The whole loop in one command: every stage in order, timed, then the report."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec

import psutil

from cosmos_ray.run import Run
from cosmos_ray.stages.collect import collect
from cosmos_ray.stages.evaluate import evaluate
from cosmos_ray.stages.pretrain import pretrain
from cosmos_ray.stages.refine import refine
from cosmos_ray.stages.report import report
from cosmos_ray.stages.rollout import rollout

STAGES = (collect, pretrain, rollout, refine, evaluate)


def demo(run: Run) -> dict:
    """Run every stage and return the report. A stage that is already done takes no time. The live page is there meanwhile."""
    with live_page(run):
        return _stages(run)


def _stages(run: Run) -> dict:
    for stage in STAGES:
        began, memory, did_something = time.monotonic(), PeakMemory(), True
        try:
            with memory:
                did_something = bool(stage(run).get("new", 1))
        finally:  # an interrupted stage counts too; one that had nothing to do does not
            if did_something:
                run.tracker.log("demo", name=stage.__name__, seconds=round(time.monotonic() - began, 1), peak_memory_mb=round(memory.peak))
    return report(run)


@contextlib.contextmanager
def live_page(run: Run) -> Iterator[None]:
    """The run's live page beside the work, in a process of its own that says its address. None where the extra `serve` is not installed,
    or the run is quiet."""
    if run.quiet or find_spec("fastapi") is None or find_spec("uvicorn") is None:
        yield
        return
    run.folder.store()  # the page takes one that is there
    child = subprocess.Popen([sys.executable, "-m", "cosmos_ray", "watch", "--root", run.config.root, "--name", run.config.name,
                              "--port", "0"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class PeakMemory:
    """Peak private memory of this process and all its children, in MB, sampled once a second."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(1.0):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    memory = process.memory_info()
                except psutil.NoSuchProcess:
                    continue
                total += memory.rss - memory.shared
            self.peak = max(self.peak, total / 2**20)
