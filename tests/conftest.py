"""Shared by the system tests: one small run, made once by the commands a user types."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# One thread, and no spinning while waiting: on a busy machine OpenMP's defaults make small models a hundred times slower.
for _name, _value in {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}.items():
    os.environ.setdefault(_name, _value)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402

from cosmos_ray.connection import start_private  # noqa: E402
from cosmos_ray.learner.engine import free_port, rendezvous  # noqa: E402

ROOT = Path(__file__).parents[1]
STATUS = pytest.StashKey[int]()

#: Settings that make every stage small; passed to every command of the small run.
SMALL = ["--sim.task", "Lift", "--demos", "6", "--pretrain-steps", "30", "--rollouts", "4", "--refine-steps", "40",
         "--refine-rollouts", "6", "--publish-every", "10", "--eval-episodes", "2", "--rollout.workers", "1",
         "--rollout.envs-per-worker", "2", "--learner.batch-size", "8", "--learner.checkpoint-every", "10", "--learner.threads", "1",
         "--planner.candidates", "3"]
PLANNING = ["--planning-steps", "10", "--learner.advantage-temperature", "0.1", "--learner.self-imitation", "0.5"]


def environment() -> dict[str, str]:
    """Environment of a child process: without what pytest or a surrounding Ray set."""
    return {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "PYTEST_CURRENT_TEST")}


def command(stage: str, root: Path, *flags: str, name: str = "small") -> list[str]:
    """The command line of a stage of a small run."""
    return [sys.executable, "-m", "cosmos_ray", stage, "--root", str(root), "--name", name, *SMALL, *flags]


def run_command(stage: str, root: Path, *flags: str, name: str = "small", code: int = 0) -> subprocess.CompletedProcess:
    """Run a stage to its end and check its exit code; the output is in the failure message."""
    arguments = command(stage, root, *flags, name=name)
    done = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1100)
    assert done.returncode == code, f"{stage} exited with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def metrics(folder: Path, stage: str) -> list[dict]:
    """Rows of metrics.jsonl of one stage."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage]


def flips_and_cuts(intact: bytes, trials: int = 1500) -> Iterator[bytes]:
    """A file's bytes with one bit flipped, or every fifth time cut short at random."""
    rng = np.random.default_rng(0)
    for trial in range(trials):
        data = bytearray(intact)
        if trial % 5:
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        else:
            data = data[: rng.integers(len(data))]
        yield bytes(data)


@contextlib.contextmanager
def file_system(mounted: Path, size: str) -> Iterator[Path]:
    """A file system of its own at ``mounted``, of ``size`` as mount takes it; skips the test where nobody may mount one."""
    mounted.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mounted]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield mounted
    subprocess.run(["umount", "--lazy", mounted], check=True)


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Leave as the command line does (see :func:`cosmos_ray.commands.cli.entry`): without interpreter teardown, where GL and Ray threads
    that libraries have left running crash the process now and then, after every test has passed."""
    if STATUS in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[STATUS])


@pytest.fixture(scope="session")
def local_ray():
    """A private Ray, started once: every start takes seconds."""
    start_private(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def one_thread():
    """Bit-identity across batch sizes is promised for one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def alone(local_ray):
    """Runs a function in a process that is the only DeepSpeed rank, so that the test process itself never becomes one."""

    @ray.remote(num_cpus=0, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}})
    class Rank:
        def __init__(self):
            os.environ.update(rendezvous(0, 1, "127.0.0.1", free_port()))
            torch.set_num_threads(1)

        def run(self, function, arguments):
            return function(*arguments)

    rank = Rank.remote()
    yield lambda function, *arguments: ray.get(rank.run.remote(function, arguments), timeout=300)
    ray.kill(rank)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """Folder of a run on which `demo` went through every stage, one episode of each arm twice. Do not change it: copy it with
    :func:`copy_run`. Test processes that run side by side share it: the first that needs it makes it, and the others wait."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with open(root / "finished_run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "finished_run").exists():
            run_command("demo", root / "begun", "--repeat", "1", *PLANNING)
            (root / "begun").rename(root / "finished_run")
    return root / "finished_run" / "small"


def copy_run(run: Path, root: Path) -> Path:
    """A private copy of a run."""
    return Path(shutil.copytree(run, root / run.name))
