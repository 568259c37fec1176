"""`ray job submit` and `ray job stop` on two real nodes that ask for a token."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from jobs.chaos.nodes import TwoNodes, free_port
from tests.conftest import ROOT, SMALL, copy_run, metrics
from tests.test_loop import forget_refinement

pytestmark = pytest.mark.slow
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A cluster whose head takes jobs."""
    with TwoNodes(tmp_path_factory.mktemp("nodes"), dashboard=free_port(), PYTHONPATH=str(ROOT)) as running:
        running.variables["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{running.dashboard}"
        yield running


def call(nodes: TwoNodes, *command: str, code: int | None = 0) -> str:
    """What a command says that a user types beside the cluster."""
    done = subprocess.run(command, cwd=ROOT, env=nodes.variables, capture_output=True, text=True, timeout=900)
    assert code is None or done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def submit(nodes: TwoNodes, job: str, stage: str, *flags: str) -> None:
    """Start a job. The head takes none before its agent has started."""
    command = [sys.executable, "jobs/submit.py", "--no-wait", "--submission-id", job, "--", sys.executable, f"jobs/{stage}.py", *flags]
    end = time.monotonic() + 300
    while "No available agent" in (said := call(nodes, *command, code=None)) and time.monotonic() < end:
        time.sleep(2)
    assert f"Job '{job}' submitted successfully" in said, said


def logs(nodes: TwoNodes, job: str) -> str:
    return call(nodes, *RAY, "job", "logs", job, code=None)


def wait_for_log(nodes: TwoNodes, job: str, words: str) -> str:
    end = time.monotonic() + 600
    while words not in (said := logs(nodes, job)):
        assert time.monotonic() < end, said
        time.sleep(2)
    return said


def test_a_stopped_job_has_saved_its_steps_and_the_same_line_continues(nodes, finished_run, tmp_path):
    run = copy_run(finished_run, tmp_path)
    forget_refinement(run)
    flags = ["--root", str(run.parent), "--name", run.name, *SMALL, "--refine-steps", "60000", "--refine-rollouts", "6000",
             "--learner.checkpoint-every", "50000"]
    submit(nodes, "first", "refine", *flags)
    said = wait_for_log(nodes, "first", "loss")  # progress, as the first burst has been trained
    assert "/60000 steps" in said
    call(nodes, *RAY, "job", "stop", "first", code=None)
    said = logs(nodes, "first")
    assert "interrupted; the same command continues where it stopped" in said
    assert "was stopped" in call(nodes, *RAY, "job", "status", "first", code=None)
    saved = [path for path in (run / "learner").glob("refined*/step_*") if (path / "state.json").exists()]
    assert saved, "the steps since the last checkpoint are lost"
    step = max(int(path.name.removeprefix("step_")) for path in saved)

    submit(nodes, "second", "refine", *flags)
    wait_for_log(nodes, "second", "loss")
    call(nodes, *RAY, "job", "stop", "second", code=None)
    rows = [row for row in metrics(run, "refine") if "step" in row]
    assert max(row["step"] for row in rows) > step
