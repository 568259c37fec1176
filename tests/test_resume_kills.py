"""SIGKILL of the driver in the middle of `refine`: the same command goes on, and every episode has one row and one file."""

from __future__ import annotations

import json

import psutil
import pytest

from tests.conftest import copy_run, metrics, run_command
from tests.test_loop import start_refine, stored, wait_for

MORE = ["--refine-rollouts", "12", "--refine-steps", "60", "--learner.checkpoint-every", "10"]


@pytest.mark.slow
def test_refine_goes_on_after_sigkill_of_everything(finished_run, tmp_path):
    folder = copy_run(finished_run, tmp_path)
    (folder / "manifest.json").unlink()
    old, rows = len(metrics(folder, "refine_episode")), len(metrics(folder, "refine"))
    driver = start_refine(folder, *MORE)
    try:
        wait_for(lambda: len(metrics(folder, "refine")) >= rows + 3 and len(metrics(folder, "refine_episode")) > old, driver)
        processes = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
        for process in processes:
            process.kill()
        driver.communicate(timeout=60)
        psutil.wait_procs(processes, timeout=60)
    finally:
        driver.kill()
    manifest = json.loads((folder / "manifest.json").read_text())
    reached, version = metrics(folder, "refine")[-1]["step"], manifest["version"]
    done = run_command("refine", tmp_path, *MORE)
    began = metrics(folder, "resume")[-1]["step"]
    assert f"refine goes on from step {began} of 60 (policy version {version}, " in done.stderr and 0 < began <= reached
    acknowledged = [row["name"] for row in metrics(folder, "refine_episode")]
    assert len(set(acknowledged)) == len(acknowledged)
    names = {s.name for s in stored(folder, "rollout")}
    assert set(acknowledged) <= names and len(names) == 4 + 12  # all that was asked for, once
    again = json.loads((folder / "manifest.json").read_text())
    assert again["version"] > version
    assert max(map(int, next(points for name, points in again["states"].items() if name.startswith("refined")))) == 60
