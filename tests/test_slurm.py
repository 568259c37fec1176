"""cluster/slurm.sbatch on a real Slurm of one node: its own munge, controller and node daemon, from Debian's `slurm-wlm`."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cosmos_ray.replay import ReplayStore
from jobs.chaos.nodes import environment, free_port
from tests.conftest import ROOT

PROGRAMS = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("munged", "slurmctld", "slurmd", "sbatch")}
MISSING = sorted(name for name, path in PROGRAMS.items() if path is None)
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(bool(MISSING or os.geteuid()), reason=f"needs root and Debian's slurm-wlm; missing: {', '.join(MISSING)}")]
CONFIG = """
ClusterName=test
SlurmctldHost={host}({address})
SlurmUser=root
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SelectType=select/cons_tres
NodeName={host} NodeAddr={address} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(what: str, holds, seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def slurm():
    """Environment in which Slurm's commands reach a node of our own."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="slurm"))
    (folder / "key").write_bytes(secrets.token_bytes(128))
    (folder / "key").chmod(0o400)
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(host=socket.gethostname().split(".")[0], address="127.0.0.1", folder=folder,
                                                     controller=free_port(), daemon=free_port(), cpus=os.cpu_count()))
    variables = environment(SLURM_CONF=str(folder / "slurm.conf"), PYTHONPATH=str(ROOT), VENV=sys.prefix)
    commands = [[PROGRAMS["munged"], "--foreground", "--force", f"--key-file={folder}/key", f"--socket={folder}/munge.socket",
                 f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed"],
                [PROGRAMS["slurmctld"], "-D"], [PROGRAMS["slurmd"], "-D"]]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for command in commands:
            log = stack.enter_context(open(folder / f"{Path(command[0]).name}.log", "w"))
            process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            if command is commands[0]:
                wait_for("munge", (folder / "munge.socket").exists, 60)

        def ready() -> bool:
            return subprocess.run(["sinfo", "-h", "-o", "%T"], env=variables, capture_output=True, text=True).stdout.strip() == "idle"

        wait_for("an idle node", ready, 120)
        yield variables


def submit(slurm: dict[str, str], log: Path, *command: str) -> str:
    log.touch()
    done = subprocess.run(["sbatch", "--parsable", "--nodes=1", f"--output={log}", "cluster/slurm.sbatch", *command], cwd=ROOT, env=slurm,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def state(slurm: dict[str, str], job: str) -> str:
    shown = subprocess.run(["scontrol", "show", "job", job], env=slurm, capture_output=True, text=True).stdout
    return shown.split("JobState=")[1].split()[0] + " " + shown.split("ExitCode=")[1].split()[0]


def test_a_command_runs_on_the_allocation_and_saves_when_slurm_ends_it(slurm, tmp_path):
    flags, run = ["--name", "lift", "--root", str(tmp_path)], tmp_path / "lift"
    small = ["--sim.task", "Lift", "--demos", "2", "--rollout.workers", "1", "--learner.batch-size", "8", "--learner.threads", "1",
             "--learner.checkpoint-every", "100000", "--pretrain-steps", "100000"]
    job = submit(slurm, tmp_path / "collect.log", "collect", *flags, *small)
    wait_for("collect", lambda: state(slurm, job).split()[0] not in ("PENDING", "RUNNING", "COMPLETING"))
    said = (tmp_path / "collect.log").read_text()
    assert state(slurm, job) == "COMPLETED 0:0", said
    assert len(ReplayStore(run / "replay").refresh()) == 2

    job = submit(slurm, tmp_path / "pretrain.log", "pretrain", *flags)
    wait_for("the first steps", lambda: "loss" in (tmp_path / "pretrain.log").read_text())
    subprocess.run(["scancel", "--signal=TERM", "--batch", job], env=slurm, check=True)
    wait_for("pretrain to end", lambda: state(slurm, job).split()[0] not in ("RUNNING", "COMPLETING"))
    said = (tmp_path / "pretrain.log").read_text()
    assert "interrupted; the same command continues where it stopped" in said and state(slurm, job) == "FAILED 130:0"
    assert [path for path in (run / "learner" / "base").iterdir() if path.is_dir()], "no state was saved"
    assert not list(ROOT.glob(".ray-token-*"))
