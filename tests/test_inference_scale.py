"""The pool grows while requests queue, and shrinks when its actors are idle; no client loses a request, no answer changes."""

import logging
import os
import signal
import time

import pytest
import ray

from cosmos_ray.config import InferenceConfig, RunConfig, check
from cosmos_ray.errors import ConfigError
from cosmos_ray.inference import demand as demand_module
from cosmos_ray.inference import pool as pool_module
from cosmos_ray.inference.client import PoolClient
from cosmos_ray.inference.demand import GROW_S, SHRINK_S, Demand
from cosmos_ray.inference.pool import InferencePool
from cosmos_ray.model.checkpoint import save_policy
from tests.test_inference import assert_same, request
from tests.test_inference_pool import LONG, newer_weights, poll_until
from tests.test_planning import demo_policy


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def looked(demand: Demand, clock: Clock, seconds: float, waiting, computing) -> list[int]:
    """What is wanted, look by look, a second apart."""
    out = []
    for _ in range(round(seconds)):
        clock.now += 1
        out.append(demand.look(waiting, computing))
    return out


def test_one_more_is_wanted_once_queues_stay_long_and_never_more_than_the_most():
    clock = Clock()
    demand = Demand(1, 2, max_batch=16, clock=clock)
    assert looked(demand, clock, 30, [8], [16])[-1] == 1  # half a batch waits: it is the next one that fills
    found = looked(demand, clock, GROW_S + 1, [9], [16])
    assert found[:-1] == [1] * int(GROW_S) and found[-1] == 2
    assert looked(demand, clock, 60, [40, 40], [16, 16])[-1] == 2


def test_a_burst_starts_nobody():
    clock = Clock()
    demand = Demand(1, 4, 16, clock)
    for _ in range(10):
        looked(demand, clock, GROW_S - 1, [50], [16])
        assert looked(demand, clock, 1, [0], [16]) == [1]


def test_one_less_is_wanted_once_the_others_suffice_and_never_fewer_than_the_least():
    clock = Clock()
    demand = Demand(2, 4, 16, clock)
    demand.wanted = 3  # and there are as many
    assert looked(demand, clock, 2 * SHRINK_S, [0, 0, 0], [12, 12, 0])[-1] == 3  # two would be full
    found = looked(demand, clock, SHRINK_S + 1, [0, 0, 0], [8, 8, 0])
    assert set(found[:-1]) == {3} and found[-1] == 2
    assert looked(demand, clock, SHRINK_S + 1, [0, 0], [0, 0])[-1] == 2


def test_room_that_was_not_found_is_not_waited_for_after_the_queue_has_gone():
    clock = Clock()
    demand = Demand(1, 3, 16, clock)
    assert looked(demand, clock, GROW_S + 1, [20], [16])[-1] == 2
    assert looked(demand, clock, 1, [0], [16]) == [1]


def test_fewer_at_most_than_at_first_are_refused():
    with pytest.raises(ConfigError, match="inference.max_actors = 2 is less than inference.actors = 3: raise it, or set it to 0"):
        check(RunConfig(inference=InferenceConfig(actors=3, max_actors=2)))
    check(RunConfig(inference=InferenceConfig(actors=3)))


# ---------------------------------------------------------------- real actors


class Room:
    """Room for any number of further actors."""

    def __init__(self, make):
        self.make, self.count = make, 0

    def resize(self, count):
        self.count = count

    def start(self, index):
        assert index < self.count
        return self.make(index, {"num_cpus": 0.25})


@pytest.fixture
def pool(local_ray, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(demand_module, "GROW_S", 1.0)
    monkeypatch.setattr(demand_module, "SHRINK_S", 1.0)
    monkeypatch.setattr(pool_module, "PROBE_S", 0.1)
    monkeypatch.setattr(pool_module, "LEAVE_S", 1.0)
    caplog.set_level(logging.INFO, logger="cosmos_ray")
    save_policy(demo_policy(), tmp_path / "base", version=1)
    pool = InferencePool(tmp_path / "base", InferenceConfig(max_actors=2, max_batch=2), [{"num_cpus": 0.25}], more=Room).start()
    yield pool
    pool.close()


def flood(pool, client, until, seconds=2 * LONG) -> list:
    """Keep twelve requests in flight until ``until()``; the (request, reply) pairs."""
    end, flying, answered = time.monotonic() + seconds, [], []
    while not until():
        assert time.monotonic() < end
        flying += [client.submit(request(1, seed=len(answered) + i)) for i in range(12 - len(flying))]
        pool.poll()
        answered.append((flying[0].request, client.result(flying.pop(0))))
    return answered + [(pending.request, client.result(pending)) for pending in flying]


def rows(pool) -> list[int]:
    return [status["rows"] for status in pool.status()]


def test_a_pool_grows_under_load_with_the_newest_weights_and_shrinks_when_idle(pool, tmp_path):
    client = PoolClient(pool.actors, LONG)
    pool.push(newer_weights(tmp_path / "base", 2))
    poll_until(pool, lambda: pool.holders == 1)
    answered = flood(pool, client, lambda: len(pool.actors) == 2 and len(client.actors) == 2 and min(rows(pool)) > 5)
    assert [status["version"] for status in pool.status()] == [2, 2] and pool.holders == 2
    assert {reply.version for _, reply in answered} == {2} and client.retries == 0

    first = pool.actors[0]
    poll_until(pool, lambda: len(pool.actors) == 1)
    assert pool.actors == [first] and pool._more.count == 1  # the one that leaves has its place until clients have heard
    second = next(actor for actor in client.actors if actor != first)
    assert client.result(client.submit(request(1))).version == 2  # also while it still knows both
    poll_until(pool, lambda: not pool._leaving)
    assert pool._more.count == 0
    replies = [client.result(client.submit(request(1, seed=i))) for i in range(4)]
    assert client.actors == [first] and {reply.version for reply in replies} == {2}
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(second.status.remote(), timeout=LONG)

    asked, reply = answered[0]
    again = client.result(client.submit(asked))
    assert (again.actions == reply.actions).all()  # whoever answers


def test_a_further_actor_that_is_killed_costs_no_request_and_another_one_takes_its_place(pool, caplog):
    client = PoolClient(pool.actors, LONG)
    flood(pool, client, lambda: len(pool.actors) == 2 and len(client.actors) == 2)
    first, second = pool.actors
    pid = ray.get(second.status.remote())["pid"]
    pending = [client.submit(request(1, seed=i)) for i in range(12)]
    os.kill(pid, signal.SIGKILL)
    asked = [client.result(one) for one in pending]
    alone = PoolClient([first], LONG)
    for one, reply in zip(pending, asked, strict=True):
        found = alone.result(alone.submit(one.request))
        assert (found.actions == reply.actions).all() and found.version == reply.version
    flood(pool, client, lambda: len(pool.actors) == 2 and second not in pool.actors)
    assert "requests queue: inference actor 1 starts, of at most 2" in caplog.text


def test_a_pool_without_max_actors_stays_as_it_is(local_ray, tmp_path):
    save_policy(demo_policy(), tmp_path / "base", version=1)
    pool = InferencePool(tmp_path / "base", InferenceConfig(max_batch=2), [{"num_cpus": 0.25}]).start()
    try:
        began, client = time.monotonic(), PoolClient(pool.actors, LONG)
        flood(pool, client, lambda: time.monotonic() - began > 3)
        assert len(pool.actors) == 1 and not pool.changes
        assert_same(client.result(client.submit(request(1))), client.result(client.submit(request(1))))
    finally:
        pool.close()
