"""SIGKILL of the learner and of the command that trains it: the weights are those of a training that nobody disturbed, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil

from cosmos_ray import instants
from cosmos_ray.model.checkpoint import read_description
from tests.conftest import ROOT, command, copy_run, environment, metrics, run_command

WAIT_S = 600.0  #: for what takes seconds on a machine that is not overloaded
FLAGS = ["--learner.loader-threads", "1", "--learner.accumulate", "2", "--learner.latent-cache", "plain", "--learner.ema", "0.9"]


def without_base(run: Path, root: Path) -> Path:
    """A copy of ``run`` whose base policy is still to be trained."""
    folder = copy_run(run, root)
    for part in ("checkpoints/base", "learner", "latents"):
        shutil.rmtree(folder / part, ignore_errors=True)
    return folder


def held(folder: Path, instant: str, driver: subprocess.Popen) -> int:
    """The process that stopped itself at ``instant``."""
    until = time.monotonic() + WAIT_S
    while not (found := list(folder.glob(f"{instant}.*"))):
        assert time.monotonic() < until and driver.poll() is None, driver.communicate()[1]
        time.sleep(0.02)
    return int(found[0].suffix[1:])


def test_pretraining_killed_in_mid_save_and_in_mid_step_ends_with_the_weights_of_one_that_was_not(finished_run, tmp_path):
    (tmp_path / "calm").mkdir()
    (tmp_path / "killed").mkdir()
    calm, killed = without_base(finished_run, tmp_path / "calm"), without_base(finished_run, tmp_path / "killed")
    run_command("pretrain", calm.parent, *FLAGS)

    folder = tmp_path / "instants"
    folder.mkdir()
    (folder / "checkpoint").touch()
    before = len(metrics(killed, "death"))
    driver = subprocess.Popen(command("pretrain", killed.parent, *FLAGS), cwd=ROOT, env={**environment(), instants.VARIABLE: str(folder)},
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        os.kill(held(folder, "checkpoint", driver), signal.SIGKILL)  # the loop starts the learner again
        (folder / "step").touch()
        held(folder, "step", driver)
        processes = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
        for process in processes:
            process.kill()
        driver.communicate(timeout=WAIT_S)
        psutil.wait_procs(processes, timeout=60)
    finally:
        driver.kill()
    (death,) = metrics(killed, "death")[before:]
    assert death["who"] == "learner rank 0" and "started again" in death["then"]
    run_command("pretrain", killed.parent, *FLAGS)
    ours, theirs = (run / "checkpoints" / "base" for run in (killed, calm))
    assert read_description(ours)[2]["step"] == read_description(theirs)[2]["step"] == 30
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
