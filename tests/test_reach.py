"""A node of the cluster that does not see the run's folder, or cannot open its store, is named before work begins."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from cosmos_ray.config import ReplayConfig, RunConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.reach import check_nodes
from cosmos_ray.run import open_run
from cosmos_ray.supervision import Supervisor
from cosmos_ray.use import Use


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    """A folder that this process sees and the cluster's second node does not."""
    folder = tmp_path_factory.mktemp("hidden")
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("needs the right to mount")
    before = {name: os.environ.pop(name) for name in ("RAY_ADDRESS",) if name in os.environ}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    start = f"{sys.executable} -m ray.scripts.scripts start --address={cluster.address} --num-cpus=1 --block --disable-usage-stats"
    second = subprocess.Popen(["unshare", "-m", "sh", "-c", f"mount -t tmpfs tmpfs {folder} && exec {start}"], env=dict(os.environ),
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        until = time.monotonic() + 120
        while sum(node["Alive"] for node in ray.nodes()) < 2:
            assert time.monotonic() < until and second.poll() is None, "the second node did not join"
            time.sleep(0.2)
        yield folder, cluster.address
    finally:
        ray.shutdown()
        second.terminate()
        second.wait(timeout=60)
        cluster.shutdown()
        os.environ.update(before)


def test_a_node_that_does_not_see_the_run_is_named(hidden, tmp_path):
    folder, _ = hidden
    check_nodes(tmp_path, tmp_path / "replay", Supervisor())  # one that both see
    for place, store in ((folder, folder / "replay"), (tmp_path, folder)):
        with pytest.raises(ConfigError, match=rf"node \S+ does not see {folder}: put --root and --replay.store on storage") as caught:
            check_nodes(place, store, Supervisor())
        assert "\n" not in str(caught.value) and not list(place.glob(".reach*"))


def test_a_store_in_a_bucket_that_a_node_cannot_open_is_one_line(hidden, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"node \S+ cannot open the replay store \(.*\): put"):
        check_nodes(tmp_path, "s3://bucket/runs?scheme=http&endpoint_override=127.0.0.1:9&region=us-east-1", Supervisor())


def test_with_a_store_in_a_bucket_such_a_node_may_still_collect(hidden, tmp_path, caplog, monkeypatch):
    folder, _ = hidden
    monkeypatch.setattr("cosmos_ray.reach._ask", lambda nodes, marks, store, supervisor: [("10.0.0.2", f"does not see {folder}")])
    check_nodes(folder, "s3://bucket/runs", Supervisor())
    assert "node 10.0.0.2 does not see" in caplog.text and "rollout workers work there" in caplog.text


def test_the_command_ends_before_anything_is_made(hidden):
    folder, address = hidden
    ray.shutdown()
    config = RunConfig(root=str(folder), name="new", address=address, replay=ReplayConfig())
    with pytest.raises(ConfigError, match="does not see"), open_run(config, Use()):
        raise AssertionError("work began")
    assert not (folder / "new").exists()
