"""A node of the cluster that does not see the run's folder, or cannot open its store, is named before work begins."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from cosmos_ray.config import RunConfig
from cosmos_ray.diagnosis import nodes as nodes_module
from cosmos_ray.diagnosis.nodes import examine
from cosmos_ray.errors import ConfigError
from cosmos_ray.reach import Reach
from cosmos_ray.replay.store import ReplayStore
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


def reach(folder: Path | None, store: Path | str) -> Reach:
    if folder:
        (folder / ".lock").write_text("1 on here")
    return Reach(folder, store, Supervisor())


def second_node() -> tuple[str, str]:
    return next((node["NodeID"], node["NodeManagerAddress"]) for node in ray.nodes()
                if node["NodeID"] != ray.get_runtime_context().get_node_id())


def taken(reach: Reach) -> bool:
    """What comes of the second node, as of one that joins."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if reach.takes(*second_node()):
            return True
        if second_node()[0] in reach._known:
            return False
        time.sleep(0.1)
    raise AssertionError("the node was not asked in time")


def test_a_node_that_does_not_see_the_run_is_named(hidden, tmp_path):
    folder, _ = hidden
    ReplayStore(folder)
    reach(tmp_path, tmp_path / "replay").check()  # one that both see
    for place, store in ((folder, folder / "replay"), (tmp_path, folder)):
        with pytest.raises(ConfigError, match=rf"node \S+ does not see .*{folder}: put --root and --replay.store on storage") as caught:
            reach(place, store).check()
        assert "\n" not in str(caught.value)


def test_a_node_that_joins_is_used_once_it_reaches_the_run_and_else_left_alone(hidden, tmp_path, caplog):
    folder, _ = hidden
    assert taken(reach(tmp_path, tmp_path / "replay")) and not caplog.records
    assert not taken(reach(folder, folder / "replay"))
    assert [r.getMessage() for r in caplog.records] == [
        f"node {second_node()[1]} has joined and does not see {folder}: the run does without it"]


def test_doctor_names_what_a_node_does_not_see_and_finds_the_rest_of_it_well(hidden, tmp_path):
    folder, _ = hidden
    for root, seen in ((tmp_path, True), (folder, False)):
        found = examine(str(root), Supervisor())
        own, other = found.values()
        assert len(found) == 2 and second_node()[0][:6] in list(found)[1]
        by_check = [{finding.check: finding for finding in findings} for findings in (own, other)]
        for findings in by_check:
            assert {"python", "packages", "rendering", "disk of Ray", "/dev/shm", "GPU", "runs", "clock", "ports"} <= set(findings)
            assert findings["packages"].good and findings["clock"].good and findings["ports"].said == "reaches 2 nodes"
        assert by_check[0]["shared runs"].good and by_check[1]["shared runs"].good is seen
        assert seen or by_check[1]["shared runs"].todo == "mount the same storage there, or give a bucket as --root (s3://, gs://)"
        assert not list(root.glob(".doctor*"))


def test_doctor_says_which_node_does_not_answer(hidden, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes_module, "ANSWER_S", 8.0)
    raylets = [p for p in psutil.process_iter() if p.name() == "raylet" and second_node()[0] in " ".join(p.cmdline())]
    assert len(raylets) == 1
    raylets[0].suspend()
    try:
        own, other = examine(str(tmp_path), Supervisor()).values()
    finally:
        raylets[0].resume()
    assert [(f.check, f.good, f.said) for f in other] == [("answer", False, "no answer within 8 s")] and "ray status" in other[0].todo
    assert own[0].good and "ports" not in {f.check for f in own}


def test_another_folder_at_the_same_path_is_not_the_run(hidden, tmp_path):
    (tmp_path / ".lock").write_text("1 on here")
    wrong = Reach(tmp_path, tmp_path / "replay", Supervisor())
    (tmp_path / ".lock").write_text("2 on there")
    with pytest.raises(ConfigError, match=f"sees another folder at {tmp_path}: put"):
        wrong.check()


def test_a_store_in_a_bucket_that_a_node_cannot_open_is_one_line(hidden):
    nowhere = "s3://bucket/runs?scheme=http&endpoint_override=127.0.0.1:9&region=us-east-1"
    with pytest.raises(ConfigError, match=r"node \S+ cannot open the replay store \(.*\): put") as caught:
        reach(None, nowhere).check()
    assert "\n" not in str(caught.value)


def test_with_a_store_in_a_bucket_a_node_without_the_folder_may_still_collect(hidden, tmp_path, caplog):
    folder, _ = hidden
    found = reach(folder, tmp_path)
    found._folder_only_warns = True  # as for a store in a bucket
    assert taken(found)
    assert f"does not see {folder}: rollout workers work there" in caplog.text


def test_the_command_ends_before_anything_is_made(hidden):
    folder, address = hidden
    ray.shutdown()
    config = RunConfig(root=str(folder), name="new", address=address)
    with pytest.raises(ConfigError, match="does not see"), open_run(config, Use()):
        raise AssertionError("work began")
    assert not (folder / "new").exists()
