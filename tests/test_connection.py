"""Starting a private Ray on a machine that is too busy for it."""

import subprocess
import time

import psutil
import pytest
import ray

from cosmos_ray.connection import STARTS, connect
from cosmos_ray.errors import ConfigError

#: What Ray raises, word for word.
LATE = "The current node timed out during startup. This could happen because some of the raylet failed to startup or the GCS has become " \
       "overloaded."


@pytest.fixture
def slow_machine(monkeypatch):
    """Ray's start leaves a process behind and gives up, as often as the test says; then it succeeds. The processes."""
    started: list[subprocess.Popen] = []

    def use(failures: int, error: Exception) -> list[subprocess.Popen]:
        def init(**options):
            assert options["address"] == "local"
            started.append(subprocess.Popen(["sleep", "600"]))
            if len(started) <= failures:
                raise error

        monkeypatch.setattr(ray, "init", init)
        return started

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield use
    for process in started:
        process.kill()
        process.wait()


def gone(process: subprocess.Popen) -> bool:
    end = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    return process.poll() is not None


def test_a_ray_that_timed_out_while_starting_is_started_again_and_its_processes_end(slow_machine):
    started = slow_machine(2, Exception(LATE))
    connect()
    assert len(started) == 3 and gone(started[0]) and gone(started[1])
    assert psutil.Process(started[2].pid).is_running() and started[2].poll() is None


def test_a_ray_that_never_starts_is_one_clear_line(slow_machine):
    started = slow_machine(99, Exception(LATE))
    with pytest.raises(ConfigError, match="Ray did not start on this machine: it timed out 3 times: the machine is too busy") as caught:
        connect()
    assert len(str(caught.value).splitlines()) == 1 and len(started) == STARTS and all(map(gone, started))


def test_another_error_of_ray_is_not_tried_again(slow_machine):
    started = slow_machine(99, Exception("something else"))
    with pytest.raises(Exception, match="something else"):
        connect()
    assert len(started) == 1
