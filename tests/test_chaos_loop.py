"""`refine` on two Ray nodes while its parts are killed: a dozen of the 35 cells of `make chaos-loop`, one after the other on one run."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cosmos_ray import instants
from jobs.chaos.cells import ENDLESS, FLAGS, MOMENTS, PARTS, Campaign
from jobs.chaos.nodes import TwoNodes, free_port
from jobs.chaos.watch import Books, Command, gaps, rows
from tests.conftest import copy_run
from tests.test_loop import forget_refinement

#: Every part at two moments or one, every moment at two parts or more; the driver begins anew twice.
CHEAP = [("rollout worker", "mid-batch"), ("simulator child", "mid-commit"), ("inference actor", "mid-push"), ("learner rank", "mid-batch"),
         ("raylet", "mid-batch"), ("driver", "mid-commit"), ("rollout worker", "mid-commit"), ("inference actor", "mid-batch"),
         ("learner rank", "mid-checkpoint"), ("learner rank", "mid-push"), ("everything", "mid-checkpoint"), ("simulator child", "idle")]


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


@pytest.fixture(scope="module")
def chaos(finished_run, tmp_path_factory):
    """Two nodes on which `refine` runs until the cells are through."""
    work = tmp_path_factory.mktemp("chaos")
    run = copy_run(finished_run, work)
    forget_refinement(run)
    with Campaign(run, work) as running:
        running.begin()
        yield running


@pytest.mark.parametrize(("part", "moment"), CHEAP)
def test_refine_survives_the_kill_of(chaos, part, moment):
    cell = chaos.cell(part, moment)
    assert cell.recovered and not cell.restarted, cell.problem
    assert (cell.lost, cell.doubled, cell.problem) == (0, 0, "")


def test_after_the_kills_refine_ends_with_every_episode_once_and_a_report_that_names_the_deaths(chaos):
    chaos.finish()
    books = Books.of(chaos.run, whole=True)
    assert books.right and books.acknowledged > len(CHEAP), books
    deaths = rows(chaos.run, "death")
    page = (chaos.run / "report.html").read_text()
    assert len(deaths) >= 8 and not [row for row in deaths if row["who"] not in page]
    assert not [line for log in chaos.nodes.folder.glob("refine*.log") for line in log.read_text().splitlines() if "(raylet)" in line]


def test_the_cells_are_those_of_the_page():
    assert len(PARTS) * len(MOMENTS) == 35 and set(CHEAP) <= {(part, moment) for part in PARTS for moment in MOMENTS}
    assert {part for part, _ in CHEAP} == set(PARTS) and {moment for _, moment in CHEAP} == set(MOMENTS)


@pytest.fixture
def redis(tmp_path):
    """Address of a Redis server of this test."""
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("needs redis-server (Debian: apt-get install redis-server)")
    port = free_port()
    process = subprocess.Popen([server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)],
                               stdout=subprocess.DEVNULL)
    yield f"127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.mark.slow
def test_refine_goes_on_when_the_head_restarts_with_gcs_fault_tolerance(finished_run, tmp_path, redis):
    """First the control store alone dies, which the driver and all actors survive; then the whole head, and the same command continues."""
    run = copy_run(finished_run, tmp_path)
    forget_refinement(run)
    with TwoNodes(tmp_path / "nodes", redis=redis) as nodes:
        command = Command(nodes, run, "refine", *FLAGS, *ENDLESS)
        progress = _progress(run)
        command.until("progress", lambda: _progress(run) > progress + 2)
        workers = {p.pid for p in command.actors("rollout worker")}
        nodes.restart_gcs()
        progress = _progress(run)
        command.until("progress without the control store", lambda: _progress(run) > progress + 5)
        assert workers & {p.pid for p in command.actors("rollout worker")}
        second = nodes.second.raylet.pid
        nodes.kill_head()
        nodes.start_head()
        command.until("the end of a command without its node", command.ended, ends=True)
        assert command.driver.returncode == 1 and "run the same command again" in command.said()
        command, progress = Command(nodes, run, "refine", *FLAGS, *ENDLESS), _progress(run)
        command.until("progress with another head", lambda: _progress(run) > progress + 5)
        assert nodes.second.raylet.pid == second
        assert command.interrupt() == 130
    assert Books.of(run, whole=True).right


def _progress(run) -> int:
    return len(rows(run, "refine")) + len(rows(run, "refine_episode"))


def _wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.1)
