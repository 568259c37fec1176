"""The loop with its root in a bucket: killed, its working copy deleted, and on a node that shares no folder with the driver. A real S3
server in this process, the commands a user types."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from cosmos_ray.config import RunConfig
from cosmos_ray.folder import RunFolder
from tests.conftest import ROOT, SMALL, environment
from tests.s3_server import fresh_uri, running_server

server = pytest.fixture(scope="module")(running_server)


@pytest.fixture
def root(server, tmp_path, monkeypatch):
    return fresh_uri(server, tmp_path, monkeypatch).replace("/replay?", "?")


def run(stage: str, root: str, *flags: str) -> subprocess.CompletedProcess:
    done = subprocess.run(line(stage, root, *flags), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, f"{stage}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def line(stage: str, root: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "cosmos_ray", stage, "--root", root, "--name", "small", *SMALL, *flags]


def rows(root: str, stage: str) -> list[dict]:
    """What the bucket's metrics say, as another machine would read them."""
    folder = RunFolder(RunConfig(root=root, name="small"), create=False)
    try:
        return folder.metrics(stage)
    finally:
        folder.close()


@pytest.mark.slow
def test_a_loop_in_a_bucket_goes_on_after_sigkill_and_the_loss_of_its_machine(root, tmp_path):
    for stage in ("collect", "pretrain", "rollout"):
        assert run(stage, root).returncode == 0
    cache = tmp_path / "cache" / "runs"
    metrics = next(cache.glob("*/small/metrics.jsonl"))
    driver = subprocess.Popen(line("refine", root, "--refine-steps", "60"), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 900
        while not (refined := [row for row in map(json.loads, metrics.read_text().splitlines()) if row["stage"] == "refine"]
                   ) or refined[-1]["step"] < 40:
            assert driver.poll() is None and time.monotonic() < until, driver.stderr.read()[-4000:]
            time.sleep(0.2)
        for process in [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]:
            process.kill()
        driver.communicate(timeout=60)
    finally:
        driver.kill()
    shutil.rmtree(cache)  # the machine and its disk are gone
    done = run("refine", root, "--refine-steps", "60")
    assert "is taken over from process" in done.stderr and "refine goes on from step " in done.stderr
    assert rows(root, "resume")[-1]["step"] >= 10
    acknowledged = [row["name"] for row in rows(root, "refine_episode")]
    assert len(set(acknowledged)) == len(acknowledged) == 6
    folder = RunFolder(RunConfig(root=root, name="small"), create=False)
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


@pytest.mark.slow
def test_actors_on_a_node_that_shares_no_folder_work_with_a_bucket(root, elsewhere):
    for stage in ("collect", "pretrain", "rollout", "refine"):
        run(stage, root, "--address", elsewhere)
    assert rows(root, "refine")[-1]["step"] == 40 and len(rows(root, "refine_episode")) == 6
    folder = RunFolder(RunConfig(root=root, name="small"), create=False)
    assert folder.has_policy("refined") and folder.has_policy("base")
    folder.close()
