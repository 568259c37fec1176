"""SIGKILL of the learner and of the command that trains it: the weights are those of a training that nobody disturbed, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from cosmos_ray import instants
from cosmos_ray.config import LearnerConfig, ModelConfig, ReplayConfig, RunConfig, SimConfig
from cosmos_ray.folder import RunFolder
from cosmos_ray.model.checkpoint import read_description
from tests.conftest import ROOT, environment, metrics
from tests.test_learner import fill

WAIT_S = 600.0  #: for what takes seconds on a machine that is not overloaded


def make_run(root: Path) -> Path:
    """A run of synthetic demonstrations; everything that a resume has to bring back is on."""
    learner = LearnerConfig(batch_size=8, accumulate=2, loader_threads=1, latent_cache="plain", ema=0.9, checkpoint_every=10, threads=1)
    config = RunConfig(root=str(root), name="run", sim=SimConfig(task="", image_size=32), model=ModelConfig(
        width=64, heads=2, layers=2, image_size=32), replay=ReplayConfig(gamma=0.98), learner=learner, pretrain_steps=30)
    folder = RunFolder(config)
    fill(folder.replay, demos=3, successes=0, failures=0)
    folder.close()
    return folder.path


def pretrain(run: Path, **variables: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "cosmos_ray", "pretrain", "--root", str(run.parent), "--name", run.name], cwd=ROOT,
                            env={**environment(), **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(driver: subprocess.Popen) -> None:
    _, errors = driver.communicate(timeout=WAIT_S)
    assert driver.returncode == 0, errors[-3000:]


def appears(folder: Path, pattern: str, driver: subprocess.Popen) -> Path:
    """The first file ``pattern`` below ``folder``, once it is there."""
    until = time.monotonic() + WAIT_S
    while not (found := list(folder.glob(pattern))):
        assert time.monotonic() < until and driver.poll() is None, driver.communicate()[1]
        time.sleep(0.02)
    return found[0]


def test_pretraining_killed_in_mid_save_and_in_mid_step_ends_with_the_weights_of_one_that_was_not(tmp_path):
    calm, killed = make_run(tmp_path / "calm"), make_run(tmp_path / "killed")
    finish(pretrain(calm))

    folder = tmp_path / "instants"
    folder.mkdir()
    (folder / "checkpoint").touch()
    driver = pretrain(killed, **{instants.VARIABLE: str(folder)})
    try:
        pid = int(appears(folder, "checkpoint.*", driver).suffix[1:])
        os.kill(pid, signal.SIGKILL)  # the loop starts the learner again
        appears(killed, "learner/base/*/state.json", driver)
        (folder / "step").touch()
        appears(folder, "step.*", driver)
        processes = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
        for process in processes:
            process.kill()
        driver.communicate(timeout=WAIT_S)
        psutil.wait_procs(processes, timeout=60)
    finally:
        driver.kill()
    (death,) = metrics(killed, "death")
    assert death["who"] == "learner rank 0" and "started again" in death["then"]
    finish(pretrain(killed))
    ours, theirs = (run / "checkpoints" / "base" for run in (killed, calm))
    assert read_description(ours)[2]["step"] == read_description(theirs)[2]["step"] == 30
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
