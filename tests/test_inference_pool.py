"""The shared pool of real actors: pushes while it serves, actors that die, checkpoints that are damaged."""

import dataclasses
import json
import os
import signal
import time
import urllib.request

import numpy as np
import pytest
import ray
import torch

from cosmos_ray.config import InferenceConfig, PlannerConfig
from cosmos_ray.errors import CheckpointError, ConfigError, PoolUnavailable
from cosmos_ray.inference.client import PoolClient
from cosmos_ray.inference.core import InferenceCore
from cosmos_ray.inference.local import LocalClient
from cosmos_ray.inference.messages import ActingPolicy
from cosmos_ray.inference.pool import InferencePool
from cosmos_ray.model.checkpoint import load_checkpoint, save_policy
from cosmos_ray.planning.costs import costs_file
from cosmos_ray.weights import pack
from tests.test_inference import assert_same, policy, request  # noqa: F401 - a fixture among them
from tests.test_model import tiny
from tests.test_planning import demo_policy

LONG = 60.0  #: seconds after which a test that hangs fails


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "base"
    save_policy(demo_policy(), path, version=1)
    return path


@pytest.fixture(scope="module")
def shared_pool(local_ray, checkpoint):
    """One pool for the tests that only raise its version."""
    pool = InferencePool(checkpoint, InferenceConfig(wait_ms=1.0), options=[{"num_cpus": 0.5}]).start()
    yield pool
    pool.close()


def version_of(pool: InferencePool) -> int:
    return pool.status()[0]["version"]


def newer_weights(checkpoint, version: int):
    newer, _ = load_checkpoint(checkpoint)
    with torch.no_grad():
        for parameter in newer.net.parameters():
            parameter.add_(0.01 * version)
    return pack(newer.net.named_parameters(), version, put=ray.put)


def settle(pool: InferencePool) -> None:
    """Poll until every actor holds what was pushed or loaded last."""
    poll_until(pool, lambda: pool.holders == len(pool.actors))


def poll_until(pool: InferencePool, done) -> None:
    until = time.monotonic() + 3 * LONG
    while not done():
        assert time.monotonic() < until, f"{pool.holders} of {len(pool.actors)} actors hold what is wanted"
        pool.poll()
        time.sleep(0.02)


def test_the_pool_answers_as_a_policy_in_this_process(shared_pool, checkpoint, policy):  # noqa: F811
    local = LocalClient(InferenceCore(*load_checkpoint(checkpoint)))
    client = PoolClient(shared_pool.actors, LONG)
    requests = [request(2, seed=1), request(1, seed=2, steps=2, planner=PlannerConfig(candidates=3)), request(1, decode_futures=True)]
    pending = [client.submit(r) for r in requests]
    for asked, waiting in zip(requests, pending, strict=True):
        assert_same(client.result(waiting), local.result(local.submit(asked)))
    assert client.retries == 0


def test_an_answer_tells_how_much_its_actor_has_to_do(shared_pool):
    client = PoolClient(shared_pool.actors, LONG)
    pending = [client.submit(request(8, seed=i)) for i in range(8)]
    loads = [client.result(one).load for one in pending]
    assert max(loads) >= 8 and loads[-1] == 0 and client.retries == 0


def test_a_long_wait_for_an_answer_is_said_and_what_nobody_awaits_is_not_computed(local_ray, checkpoint, caplog, monkeypatch):
    """The pool hangs until a request's patience is over; then it answers the next request alone."""
    monkeypatch.setattr("cosmos_ray.supervision.SAY_AFTER_S", 0.5)
    monkeypatch.setattr("cosmos_ray.inference.client.SAY_AFTER_S", 0.2)
    pool = InferencePool(checkpoint, InferenceConfig(wait_ms=1000.0), options=[{"num_cpus": 0.5}]).start()
    try:
        with caplog.at_level("WARNING"), pytest.raises(PoolUnavailable):  # wait_ms holds the batch back for longer than it is awaited
            impatient = PoolClient(pool.actors, timeout_s=0.8)
            impatient.result(impatient.submit(request(3)))
        assert "waiting for an answer of an inference actor" in caplog.text
        patient = PoolClient(pool.actors, LONG)
        patient.result(patient.submit(request(2)))
        assert pool.status()[0]["rows"] == 2
    finally:
        pool.close()


def test_prometheus_sees_queue_fill_waits_and_version(shared_pool):
    client = PoolClient(shared_pool.actors, LONG)
    for asked in [client.submit(request(2, seed=i)) for i in range(4)]:
        client.result(asked)
    node = ray.nodes()[0]
    names = {f"ray_cosmos_ray_inference_{name}" for name in ("rows", "queue_rows", "batch_fill", "policy_version", "wait_ms_bucket")}
    until, text = time.monotonic() + LONG, ""
    while not all(name in text for name in names):  # a node collects its metrics every ten seconds
        assert time.monotonic() < until, text
        time.sleep(0.5)
        with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10) as reply:
            text = reply.read().decode()
    values = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("ray_cosmos_ray_inference_batch_fill{")]
    assert values and all(0 < value <= 1 for value in values)


def test_a_bad_request_raises_its_own_error_through_the_pool(shared_pool):
    client = PoolClient(shared_pool.actors, LONG)
    asked = request()
    with pytest.raises(ConfigError, match="does not fit the model") as caught:
        client.result(client.submit(dataclasses.replace(asked, proprio=asked.proprio[:, :5])))
    assert len(str(caught.value).splitlines()) == 1


def test_weights_of_another_model_are_refused_by_the_pool_with_one_line(shared_pool):
    before = version_of(shared_pool)
    shared_pool.push(pack(tiny(layers=3).net.named_parameters(), before + 1, put=ray.put))
    with pytest.raises(CheckpointError) as caught:
        settle(shared_pool)
    settle(shared_pool)  # raised once
    assert len(str(caught.value).splitlines()) == 1 and "another model" in str(caught.value)
    assert version_of(shared_pool) == before


def test_pushing_weights_while_requests_are_in_flight(shared_pool, checkpoint):
    client = PoolClient(shared_pool.actors, LONG)
    start = version_of(shared_pool)
    before, after = {}, {}
    for version in range(start + 1, start + 5):
        before[version] = [client.submit(request(2, seed=i, steps=3)) for i in range(8)]
        shared_pool.push(newer_weights(checkpoint, version))
        settle(shared_pool)
        after[version] = [client.submit(request(2, seed=i, steps=3)) for i in range(4)]
    for version in after:
        assert all(client.result(pending).version >= version - 1 for pending in before[version])  # answered, nothing older than it was
        assert all(client.result(pending).version >= version for pending in after[version])
    assert version_of(shared_pool) == start + 4
    shared_pool.push(newer_weights(checkpoint, start))  # a late message
    settle(shared_pool)
    assert version_of(shared_pool) == start + 4


def test_the_pool_switches_to_another_checkpoint_whatever_its_version(shared_pool, checkpoint):
    shared_pool.push(newer_weights(checkpoint, version_of(shared_pool) + 1))
    settle(shared_pool)
    assert version_of(shared_pool) > 1
    shared_pool.load(checkpoint, ActingPolicy(1))
    settle(shared_pool)
    assert version_of(shared_pool) == 1
    asked = request(version=1)
    assert_same(PoolClient(shared_pool.actors, LONG).result(PoolClient(shared_pool.actors, LONG).submit(asked)),
                InferenceCore(*load_checkpoint(checkpoint)).answer([asked])[0])


def test_a_pool_that_loads_for_a_deadline_is_measured_before_it_is_asked(shared_pool, checkpoint, tmp_path):
    """And it says what it chose: the actor reads the speed that lies beside the checkpoint, here an impossible one."""
    path = tmp_path / "timed"
    save_policy(demo_policy(), path, version=1)
    acting = ActingPolicy(1, PlannerConfig(candidates=3, deadline_ms=60_000.0))
    shared_pool.load(path, acting)
    settle(shared_pool)
    (entry,) = json.loads(costs_file(path).read_text()).values()
    client = PoolClient(shared_pool.actors, LONG)
    told = [client.result(client.submit(dataclasses.replace(request(2, seed=5), acting=acting))).autopilot]
    for table in ("first", "each"):
        entry[table] = {kind: [1e6] * len(entry["rows"]) for kind in entry[table]}
    where = next(iter(json.loads(costs_file(path).read_text())))
    costs_file(path).write_text(json.dumps({where: entry}))
    shared_pool.load(path, acting)
    settle(shared_pool)
    told.append(client.result(client.submit(dataclasses.replace(request(2, seed=5), acting=acting))).autopilot)
    assert [(choice["gear"], choice["candidates"]) for choice in told] == [("full", 3), ("policy first", 1)]
    shared_pool.load(checkpoint, ActingPolicy(1))
    settle(shared_pool)


def test_an_actor_restarted_by_sigkill_gets_back_its_planning_network(local_ray, checkpoint, tmp_path):
    network = demo_policy()
    torch.nn.init.normal_(network.net.final_layer.linear.weight, std=0.2, generator=torch.Generator().manual_seed(5))
    save_policy(network, tmp_path / "planning", version=2)
    planner = PlannerConfig(candidates=3)
    pool = InferencePool(checkpoint, InferenceConfig(wait_ms=1.0), options=[{"num_cpus": 0.5}]).start()
    try:
        client = PoolClient(pool.actors, LONG)
        ask = lambda: client.result(client.submit(request(2, seed=3, planner=planner)))  # noqa: E731
        own = ask()
        pool.load(checkpoint, ActingPolicy(1, planning_checkpoint=str(tmp_path / "planning")))  # the version it holds already
        settle(pool)
        planned = ask()
        assert np.array_equal(own.candidates, planned.candidates) and not np.array_equal(own.scores, planned.scores)
        os.kill(pool.status()[0]["pid"], signal.SIGKILL)
        poll_until(pool, lambda: pool.restarts)
        settle(pool)
        assert pool.restarts == 1 and np.array_equal(ask().scores, planned.scores)
        pool.load(checkpoint, ActingPolicy(1))
        settle(pool)
        assert np.array_equal(ask().scores, own.scores)
    finally:
        pool.close()


def test_a_request_survives_sigkill_of_the_only_inference_actor(local_ray, checkpoint):
    # A batch is held back for a second, so the request is waiting in the actor when it is killed.
    pool = InferencePool(checkpoint, InferenceConfig(wait_ms=1000.0), options=[{"num_cpus": 0.5}]).start()
    try:
        pool.push(newer_weights(checkpoint, 7))
        settle(pool)
        (status,) = pool.status()
        client = PoolClient(pool.actors, LONG)
        pending = client.submit(request(1, seed=3))
        os.kill(status["pid"], signal.SIGKILL)
        reply = client.result(pending)
        assert client.retries >= 1 and reply.actions.shape == (1, 8, 4)
        assert reply.version == 1  # what a restarted actor holds until the driver looks after it
        poll_until(pool, lambda: pool.restarts)
        settle(pool)
        (status,) = pool.status()
        assert pool.restarts == 1 and status["version"] == 7
        assert client.result(client.submit(request(version=7))).version == 7
    finally:
        pool.close()
    client = PoolClient(pool.actors, timeout_s=1.0)
    with pytest.raises(PoolUnavailable) as caught:  # gone for good
        client.result(client.submit(request()))
    assert len(str(caught.value).splitlines()) == 1


def test_an_actor_killed_under_load_loses_no_request_and_changes_no_answer(local_ray, checkpoint, policy):  # noqa: F811
    """Directly and with planning, in one pool; the other actor answers meanwhile, and the killed one comes back."""
    local = LocalClient(InferenceCore(*load_checkpoint(checkpoint)))
    pool = InferencePool(checkpoint, InferenceConfig(), options=[{"num_cpus": 0.25}] * 2).start()
    try:
        client = PoolClient(pool.actors, LONG)
        asked = [request(2, seed=i, planner=PlannerConfig(candidates=3) if i % 2 else None) for i in range(24)]
        pending = [client.submit(one) for one in asked]
        first = client.result(pending[0])
        victim = pending[-1].actor
        os.kill(ray.get(victim.status.remote())["pid"], signal.SIGKILL)
        replies = [first, *map(client.result, pending[1:])]
        for one, reply in zip(asked, replies, strict=True):
            assert_same(reply, local.result(one))
        assert client.retries >= 1
        poll_until(pool, lambda: pool.restarts == 1)
        settle(pool)
    finally:
        pool.close()


def test_no_actor_that_answers_is_pool_unavailable(shared_pool):
    client = PoolClient(shared_pool.actors, timeout_s=1.0)
    (status,) = shared_pool.status()
    os.kill(status["pid"], signal.SIGSTOP)  # hangs
    try:
        with pytest.raises(PoolUnavailable, match="none of 1 inference actors answered within 1 s"):
            client.result(client.submit(request()))
    finally:
        os.kill(status["pid"], signal.SIGCONT)


def test_a_version_nobody_holds_is_pool_unavailable(shared_pool):
    patient = PoolClient(shared_pool.actors, LONG)
    patient.result(patient.submit(request()))  # the actor is up
    client = PoolClient(shared_pool.actors, timeout_s=10.0)
    with pytest.raises(PoolUnavailable, match="asks for policy version 999, this actor holds"):
        client.result(client.submit(request(version=999)))


def test_a_damaged_checkpoint_is_reported_when_the_pool_starts(local_ray, checkpoint, tmp_path):
    save_policy(load_checkpoint(checkpoint)[0], tmp_path / "torn", 1)
    file = tmp_path / "torn" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is truncated") as caught:
        InferencePool(tmp_path / "torn", InferenceConfig(), options=[{"num_cpus": 0.5}]).start()
    assert len(str(caught.value).splitlines()) == 1
