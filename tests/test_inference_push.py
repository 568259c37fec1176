"""Pushes to real actors that die, hang or lose the learner: no push hangs, and the actors serve what they hold until the next one."""

import dataclasses
import os
import signal
import time

import pytest
import ray
from ray.exceptions import OwnerDiedError, RayActorError

from cosmos_ray.config import InferenceConfig
from cosmos_ray.errors import CheckpointError, PoolUnavailable
from cosmos_ray.inference import pool as pool_module
from cosmos_ray.inference.client import PoolClient
from cosmos_ray.inference.messages import ActingPolicy
from cosmos_ray.inference.pool import InferencePool
from cosmos_ray.model.checkpoint import save_policy
from cosmos_ray.supervision import Supervisor
from cosmos_ray.weights import Weights
from tests import test_inference_pool
from tests.test_inference import request
from tests.test_inference_pool import LONG, newer_weights, poll_until, settle
from tests.test_planning import demo_policy

checkpoint = test_inference_pool.checkpoint


@pytest.fixture(scope="module")
def said() -> list[dict]:
    """What the pool's supervisor recorded."""
    return []


@pytest.fixture(scope="module")
def pool(local_ray, checkpoint, said):  # noqa: F811 - a fixture
    pool = InferencePool(checkpoint, InferenceConfig(wait_ms=1.0, actors=2), [{"num_cpus": 0.5}] * 2,
                         Supervisor(lambda kind, **values: said.append({"kind": kind, **values}))).start()
    yield pool
    pool.close()


def states(pool: InferencePool) -> list[dict]:
    return ray.get([actor.status.remote() for actor in pool.actors], timeout=LONG)


def next_version(pool: InferencePool) -> int:
    return 1 + max(status["version"] for status in states(pool))


def deaths(said: list[dict]) -> list[str]:
    return [row["who"] for row in said if row["kind"] == "death"]


@ray.remote(num_cpus=0)
class Publisher:
    """A process that puts weights as a learner does, and owns them."""

    def pid(self) -> int:
        return os.getpid()

    def weights(self, checkpoint, version: int) -> Weights:
        return newer_weights(checkpoint, version)


def lost(weights: Weights) -> bool:
    try:
        ray.get(weights.data, timeout=LONG)
    except OwnerDiedError:
        return True
    return False


@pytest.mark.parametrize("noticed", [False, True], ids=["a moment ago", "and Ray has noticed"])
def test_a_learner_killed_in_mid_push_is_no_error_and_the_next_push_mends_it(pool, checkpoint, caplog, noticed):  # noqa: F811
    """For a second or so its node's store still gives out what it put."""
    version, publisher = next_version(pool), Publisher.remote()
    weights = ray.get(publisher.weights.remote(checkpoint, version))
    held, pids = [status["version"] for status in states(pool)], [status["pid"] for status in states(pool)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    pool.push(weights)
    pool.poll()
    os.kill(ray.get(publisher.pid.remote()), signal.SIGKILL)
    with pytest.raises(RayActorError):
        ray.get(publisher.pid.remote(), timeout=LONG)
    until = time.monotonic() + LONG
    while noticed and not lost(weights):
        assert time.monotonic() < until
        time.sleep(0.2)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    poll_until(pool, lambda: all(seat.delivery is None for seat in pool._seats))  # and no error
    now = [status["version"] for status in states(pool)]
    assert now == held if noticed else set(now) <= {*held, version}
    assert ("keeps what it holds: policy version" in caplog.text) == (now == held)
    client = PoolClient(pool.actors, LONG)
    assert client.result(client.submit(request())).version in now
    pool.push(newer_weights(checkpoint, version + 1))
    settle(pool)
    assert [status["version"] for status in states(pool)] == [version + 1] * 2


def test_an_actor_killed_in_mid_push_takes_the_weights_after_its_restart(pool, checkpoint, said):  # noqa: F811
    version, restarts = next_version(pool), pool.restarts
    victim = states(pool)[0]["pid"]
    os.kill(victim, signal.SIGSTOP)
    pool.push(newer_weights(checkpoint, version))
    poll_until(pool, lambda: pool.holders == 1)  # the other one has them meanwhile
    os.kill(victim, signal.SIGKILL)
    poll_until(pool, lambda: pool.restarts > restarts)
    settle(pool)
    assert [status["version"] for status in states(pool)] == [version] * 2 and pool.restarts == restarts + 1
    assert deaths(said).count("inference actor 0") == 1


def test_a_hung_actor_holds_up_nobody_and_is_killed_and_started_again(pool, checkpoint, said, monkeypatch):  # noqa: F811
    monkeypatch.setattr(pool_module, "SILENT_S", 5.0)
    version, restarts, before = next_version(pool), pool.restarts, len(deaths(said))
    os.kill(states(pool)[1]["pid"], signal.SIGSTOP)
    pool.push(newer_weights(checkpoint, version))
    poll_until(pool, lambda: pool.holders == 1)
    client = PoolClient(pool.actors[:1], LONG)
    assert client.result(client.submit(request(version=version))).version == version
    poll_until(pool, lambda: pool.restarts > restarts)
    settle(pool)
    assert [status["version"] for status in states(pool)] == [version] * 2
    assert deaths(said)[before:] == ["inference actor 1"] 


def test_a_late_push_is_cancelled_and_only_the_newest_is_given_after_it(pool, checkpoint, caplog, monkeypatch):  # noqa: F811
    version, given, give = next_version(pool), [], pool_module.PushedWeights.give

    def noted(self, actor):
        given.append((pool.actors.index(actor), self.version))
        return give(self, actor)

    monkeypatch.setattr(pool_module.PushedWeights, "give", noted)
    late = states(pool)[0]["pid"]
    os.kill(late, signal.SIGSTOP)
    try:
        for newer in range(version, version + 4):
            pool.push(newer_weights(checkpoint, newer))
            poll_until(pool, lambda: pool.holders == 1)
        pool._seats[0].given = dataclasses.replace(pool._seats[0].given, within_s=0.0)  # as if a minute had passed
        poll_until(pool, lambda: len(given) == 6)
    finally:
        os.kill(late, signal.SIGCONT)
    settle(pool)
    assert given == [(0, version), *((1, newer) for newer in range(version, version + 4)), (0, version + 3)]
    assert f"inference actor 0 has not taken policy version {version} within" in caplog.text
    assert [status["version"] for status in states(pool)] == [version + 3] * 2


def test_a_damaged_buffer_is_refused_once_and_the_actors_go_on_serving(pool, checkpoint):  # noqa: F811
    version = next_version(pool)
    weights = newer_weights(checkpoint, version)
    damaged = [buffer.copy() for buffer in ray.get(weights.data)]
    damaged[-1][3] ^= 1
    pool.push(dataclasses.replace(weights, data=ray.put(tuple(damaged))))
    with pytest.raises(CheckpointError, match="damaged in transit") as caught:
        settle(pool)
    assert len(str(caught.value).splitlines()) == 1
    poll_until(pool, lambda: all(seat.delivery is None for seat in pool._seats))
    assert max(status["version"] for status in states(pool)) == version - 1
    pool.push(weights)
    settle(pool)
    assert [status["version"] for status in states(pool)] == [version] * 2


def test_a_checkpoint_that_cannot_be_read_is_one_line_from_poll_and_the_old_policy_serves(pool, checkpoint, tmp_path):  # noqa: F811
    version = states(pool)[0]["version"]
    pool.load(tmp_path / "nothing", ActingPolicy(3))
    assert pool.holders == 0
    with pytest.raises(CheckpointError) as caught:
        settle(pool)
    assert len(str(caught.value).splitlines()) == 1
    client = PoolClient(pool.actors, LONG)
    assert client.result(client.submit(request(version=version))).version == version


def test_a_pool_whose_actors_do_not_come_back_is_one_clear_error(local_ray, tmp_path, monkeypatch):
    save_policy(demo_policy(), tmp_path / "policy", version=1)
    pool = InferencePool(tmp_path / "policy", InferenceConfig(), [{"num_cpus": 0.5}]).start()
    try:
        os.rename(tmp_path / "policy", tmp_path / "elsewhere")
        monkeypatch.setattr(pool, "_start_s", 3.0)
        os.kill(pool.status()[0]["pid"], signal.SIGKILL)
        with pytest.raises(PoolUnavailable, match="no inference actor has come back for 3 s") as caught:
            poll_until(pool, lambda: False)
        assert len(str(caught.value).splitlines()) == 1
    finally:
        pool.close()
