"""`refine` on two Ray nodes while its parts are killed: a dozen of the 35 cells of `make chaos-loop`, one after the other on one run."""

import os
import signal
import subprocess
import sys
import time

import psutil

from cosmos_ray import instants
from jobs.chaos.watch import gaps


def test_a_process_passes_an_instant_without_a_trace_unless_somebody_watches(tmp_path, monkeypatch):
    monkeypatch.delenv(instants.VARIABLE, raising=False)
    instants.passes("step")
    monkeypatch.setenv(instants.VARIABLE, str(tmp_path))
    instants.passes("step")
    (_, pid, name), = (line.split() for line in (tmp_path / "passed").read_text().splitlines())
    assert (int(pid), name) == (os.getpid(), "step")


def test_a_process_stands_still_at_the_instant_that_is_asked_for(tmp_path):
    (tmp_path / "step").touch()
    code = "from cosmos_ray import instants; instants.passes('push'); instants.passes('step')"
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, instants.VARIABLE: str(tmp_path)})
    try:
        _wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED)
        assert (tmp_path / f"step.{child.pid}").exists() and not (tmp_path / "step").exists()
        child.send_signal(signal.SIGCONT)
        assert child.wait(60) == 0
    finally:
        child.kill()


def test_steps_that_nobody_trained_are_found():
    assert gaps([10, 20, 30, 20, 30, 40], 10) == []
    assert gaps([10, 20, 60, 70], 10) == [20] and gaps([10, 20, 60, 30, 40], 10) == []


def _wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.1)
