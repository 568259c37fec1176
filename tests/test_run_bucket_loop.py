"""The loop with its root in a bucket: killed, its working copy deleted, and on a node that shares no folder with the driver. A real S3
server in this process, the commands a user types."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from cosmos_ray.bucket_run import fetch_settings
from cosmos_ray.config import RunConfig
from cosmos_ray.config.stored import stored_config
from cosmos_ray.folder import RunFolder
from cosmos_ray.replay.files.working_copy import WorkingCopy
from cosmos_ray.uri import below
from tests.conftest import ROOT, SMALL, environment
from tests.s3_server import fresh_uri, running_server

LESS = ["--demos", "2", "--pretrain-steps", "6", "--refine-steps", "20", "--refine-rollouts", "2", "--rollouts", "1",
        "--publish-every", "10", "--learner.batch-size", "2", "--learner.checkpoint-every", "5",
        "--model.width", "64", "--model.layers", "2"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

server = pytest.fixture(scope="module")(running_server)


@pytest.fixture
def root(server, tmp_path, monkeypatch):
    return fresh_uri(server, tmp_path, monkeypatch).replace("/replay?", "?")


def run(stage: str, root: str, *flags: str) -> subprocess.CompletedProcess:
    done = subprocess.run(line(stage, root, *flags), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{stage}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def line(stage: str, root: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "cosmos_ray", stage, "--root", root, "--name", "small", *SMALL, *LESS, *flags]


def opened(root: str) -> RunFolder:
    """The run as another command opens it."""
    fetch_settings(root, "small")
    return RunFolder(stored_config(RunConfig(root=root, name="small")), create=False)


def rows(root: str, stage: str) -> list[dict]:
    """What the bucket's metrics say, as another machine would read them."""
    folder = opened(root)
    try:
        return folder.metrics(stage)
    finally:
        folder.close()


def test_a_loop_in_a_bucket_goes_on_after_sigkill_and_the_loss_of_its_machine(root, tmp_path):
    for stage in ("collect", "pretrain"):
        run(stage, root)
    cache = tmp_path / "cache" / "runs"
    copy = WorkingCopy(below(root, "small"), tmp_path / "nowhere")
    driver = subprocess.Popen(line("refine", root), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 1800
        while not any("/step_" in name and name.endswith("/state.json") for name in copy._below("learner/refined_from_1")):
            assert driver.poll() is None and time.monotonic() < until, driver.stderr.read()[-4000:]
            time.sleep(0.2)
        for process in [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]:
            process.kill()
        driver.communicate(timeout=60)
    finally:
        driver.kill()
    shutil.rmtree(cache)  # the machine and its disk are gone
    done = run("refine", root)
    assert "is taken over from process" in done.stderr and "refine goes on from step " in done.stderr
    assert rows(root, "resume")[-1]["step"] >= 5
    acknowledged = [row["name"] for row in rows(root, "refine_episode")]
    assert len(set(acknowledged)) == len(acknowledged) == 2
    folder = opened(root)
    assert folder.has_policy("refined") and set(acknowledged) <= set(folder.store().keys())
    folder.close()


@pytest.fixture
def elsewhere(tmp_path):
    """A cluster whose only CPUs are on a node that does not see this machine's working copies."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("needs the right to mount")
    (tmp_path / "cache").mkdir()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    start = f"{sys.executable} -m ray.scripts.scripts start --address={cluster.address} --num-cpus=4 --block --disable-usage-stats"
    second = subprocess.Popen(["unshare", "-m", "sh", "-c", f"mount -t tmpfs tmpfs {tmp_path / 'cache'} && exec {start}"],
                              env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        until = time.monotonic() + 120
        while not ray.cluster_resources().get("CPU"):
            assert time.monotonic() < until and second.poll() is None, "the second node did not join"
            time.sleep(0.2)
        ray.shutdown()
        yield cluster.address
    finally:
        second.terminate()
        second.wait(timeout=60)
        cluster.shutdown()


def test_actors_on_a_node_that_shares_no_folder_work_with_a_bucket(root, elsewhere):
    for stage in ("collect", "pretrain", "refine"):
        run(stage, root, "--address", elsewhere)
    assert rows(root, "refine")[-1]["step"] == 20 and len(rows(root, "refine_episode")) == 2
    folder = opened(root)
    assert folder.has_policy("refined") and folder.has_policy("base")
    folder.close()
