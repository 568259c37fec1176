"""The shared inference pool: batching, versions, and answers that survive the death of the actor."""

import asyncio
import dataclasses
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

from cosmos_ray.config import InferenceConfig, PlannerConfig
from cosmos_ray.errors import CheckpointError, ConfigError, PoolUnavailable
from cosmos_ray.inference.batcher import Batcher
from cosmos_ray.inference.client import PoolClient
from cosmos_ray.inference.core import InferenceCore
from cosmos_ray.inference.local import LocalClient
from cosmos_ray.inference.messages import ActingPolicy, ActRequest, WrongVersion
from cosmos_ray.inference.pool import InferencePool
from cosmos_ray.model.checkpoint import load_policy, save_policy
from cosmos_ray.weights import pack
from tests.test_model import tiny
from tests.test_planning import demo_policy

LONG = 60.0  #: seconds after which a test that hangs fails


def request(rows: int = 1, seed: int = 0, size: int = 64, *, planner=None, version=None, planning_checkpoint="", **settings) -> ActRequest:
    """A request of random observations, a function of the seed."""
    rng = np.random.default_rng(seed)
    return ActRequest(rng.integers(0, 256, (rows, 2, size, size, 3), dtype=np.uint8), rng.uniform(-1, 1, (rows, 9)).astype(np.float32),
                      tuple(f"lift the cube {i}" for i in range(rows)), rng.integers(0, 2**62, rows),
                      **{"steps": 1, "acting": ActingPolicy(version, planner, planning_checkpoint), **settings})


def assert_same(left, right):
    for name, value in vars(left).items():
        assert np.array_equal(value, getattr(right, name)), name


@pytest.fixture
def policy():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # bit-identity across batch sizes is promised for one thread
    yield demo_policy()
    torch.set_num_threads(before)


# ---------------------------------------------------------------- batcher


def rows_of(requests: list[ActRequest]) -> list[int]:
    return [len(r.seeds) for r in requests]


async def together(batcher: Batcher, requests: list[ActRequest], gate: threading.Event, batches: list) -> list:
    """Submit the first request, the others while its batch is running, and return all answers."""
    calls = [asyncio.create_task(batcher.submit(requests[0]))]
    while not batches:
        await asyncio.sleep(0.001)
    calls += [asyncio.create_task(batcher.submit(r)) for r in requests[1:]]
    await asyncio.sleep(0)  # let them queue up
    gate.set()
    return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), LONG)


@pytest.mark.parametrize("rows, expected", [
    ([1, 2, 2, 2, 2], [[1], [2, 2], [2, 2]]),
    ([1, 3, 2, 1, 1], [[1], [3], [2, 1, 1]]),  # in order of arrival: nothing overtakes the 2 that did not fit
    ([1, 1, 9, 1], [[1], [1], [9], [1]]),  # larger than a batch may be: runs alone
    ([9, 1], [[9], [1]]),
])  # fmt: skip
def test_concurrent_requests_merge_up_to_the_largest_batch(rows, expected):
    batches, gate = [], threading.Event()

    def answer(requests):
        batches.append(rows_of(requests))
        gate.wait(LONG)
        return [len(r.seeds) for r in requests]

    async def main():
        batcher = Batcher(answer, max_rows=4, wait_s=0.0)
        answers = await together(batcher, [request(n) for n in rows], gate, batches)
        return answers, batcher.batches, batcher.rows

    answers, count, total = asyncio.run(main())
    assert answers == rows and batches == expected
    assert (count, total) == (len(expected), sum(rows))


def test_the_deadline_lets_a_lone_request_through():
    async def main():
        batcher = Batcher(rows_of, max_rows=1000, wait_s=0.01)
        return [await asyncio.wait_for(batcher.submit(request(n)), LONG) for n in (1, 2)]

    assert asyncio.run(main()) == [1, 2]


def test_a_full_batch_does_not_wait_for_the_deadline():
    batches = []

    async def main():
        batcher = Batcher(lambda requests: batches.append(rows_of(requests)) or rows_of(requests), max_rows=4, wait_s=3600.0)
        first = asyncio.create_task(batcher.submit(request(1)))
        await asyncio.sleep(0.05)
        assert not first.done()  # it is held back to fill the batch
        return await asyncio.wait_for(asyncio.gather(first, batcher.submit(request(3))), LONG)

    assert asyncio.run(main()) == [1, 3] and batches == [[1, 3]]


@pytest.mark.parametrize("bad", [
    request(1, size=24),
    ActRequest(request(1).images, np.zeros((1, 7), np.float32), ("x",), np.zeros(1, np.int64), steps=1),
    request(1, planner=PlannerConfig(candidates=2, aggregate="median")),
], ids=["image size", "proprioception", "planner"])  # fmt: skip
def test_a_bad_request_fails_alone(policy, bad):
    core, batches, gate = InferenceCore(policy, 1), [], threading.Event()

    def answer(requests):
        batches.append(len(requests))
        gate.wait(LONG)
        return core.answer(requests)

    requests = [request(1, seed=0), request(2, seed=1), bad, request(1, seed=2)]
    answers = asyncio.run(together(Batcher(answer, max_rows=8, wait_s=0.0), requests, gate, batches))
    assert batches == [1, 3]
    assert isinstance(answers[2], ConfigError)
    for i in (0, 1, 3):
        assert_same(answers[i], core.answer([requests[i]])[0])


def test_a_failing_answer_function_does_not_stop_the_batcher():
    failed = []

    def answer(requests):
        if not failed:
            failed.append(True)
            raise RuntimeError("out of memory")
        return rows_of(requests)

    async def main():
        batcher = Batcher(answer, max_rows=4, wait_s=0.0)
        with pytest.raises(RuntimeError, match="out of memory"):
            await asyncio.wait_for(batcher.submit(request(1)), LONG)
        return await asyncio.wait_for(batcher.submit(request(2)), LONG)

    assert asyncio.run(main()) == 2


def test_an_abandoned_request_does_not_stop_the_batcher():
    batches, gate = [], threading.Event()

    def answer(requests):
        batches.append(rows_of(requests))
        gate.wait(LONG)
        return rows_of(requests)

    async def main():
        batcher = Batcher(answer, max_rows=4, wait_s=0.0)
        gone = asyncio.create_task(batcher.submit(request(1)))
        while not batches:
            await asyncio.sleep(0.001)
        gone.cancel()
        gate.set()
        return await asyncio.wait_for(batcher.submit(request(2)), LONG)

    assert asyncio.run(main()) == 2


def test_between_never_overlaps_a_batch():
    running, overlaps, done = [], [], []

    def alone(what):
        running.append(what)
        time.sleep(0.001)
        overlaps.append(len(running) > 1)
        running.remove(what)
        done.append(what)

    async def main():
        batcher = Batcher(lambda requests: alone("batch") or rows_of(requests), max_rows=2, wait_s=0.0)
        calls = [batcher.submit(request(1)) for _ in range(20)] + [batcher.between(alone, "swap") for _ in range(10)]
        await asyncio.wait_for(asyncio.gather(*calls), LONG)

    asyncio.run(main())
    assert not any(overlaps) and done.count("swap") == 10 and done.count("batch") >= 10
    assert done != sorted(done)  # they did alternate


# ---------------------------------------------------------------- core


def test_answers_are_stamped_with_the_version_that_gave_them(policy):
    core = InferenceCore(policy, 3)
    old, newer = core.answer([request()])[0], demo_policy()
    with torch.no_grad():
        for parameter in newer.net.parameters():
            parameter.add_(0.05)
    assert core.set_weights(pack(newer.net.named_parameters(), 5)) == 5
    new = core.answer([request()])[0]
    assert (old.version, new.version) == (3, 5)
    assert not np.array_equal(old.actions, new.actions)


def test_older_weights_are_ignored(policy):
    core = InferenceCore(policy, 3)
    before = core.answer([request()])[0]
    for version in (2, 3):
        assert core.set_weights(pack(demo_policy().net.named_parameters(), version)) == 3
    assert_same(core.answer([request()])[0], before)


def test_damaged_weights_leave_version_and_answers_as_they_were(policy):
    core = InferenceCore(policy, 3)
    before = core.answer([request()])[0]
    weights = pack(demo_policy().net.named_parameters(), 4)
    weights.data[0] ^= 255
    with pytest.raises(CheckpointError, match="damaged"):
        core.set_weights(weights)
    assert_same(core.answer([request()])[0], before)


def test_a_request_for_another_version_is_refused_alone(policy):
    core = InferenceCore(policy, 3)
    wrong, right, whichever = core.answer([request(version=4), request(version=3), request()])
    assert isinstance(wrong, WrongVersion) and "version 4" in str(wrong) and "holds 3" in str(wrong)
    assert_same(right, whichever)
    with pytest.raises(WrongVersion):
        LocalClient(core).result(request(version=4))


@pytest.mark.parametrize("settings", [
    {"steps": 2}, {"steps": 2, "planner": PlannerConfig(candidates=3)},
    {"steps": 1, "planner": PlannerConfig(candidates=2, rank_by="action"), "decode_futures": True},
], ids=["policy alone", "planning", "decoded futures"])  # fmt: skip
def test_answers_do_not_depend_on_the_batch_they_were_in(policy, settings):
    core = InferenceCore(policy, 1)
    requests = [request(rows, seed=rows, **settings) for rows in (1, 2, 3)] + [request(2, seed=9, steps=1)]
    for asked, reply in zip(requests, core.answer(requests), strict=True):
        assert_same(core.answer([asked])[0], reply)
    assert core.answer(requests)[1].actions.shape == (2, 8, 4)


def test_decoded_futures_have_the_shape_of_the_observation(policy):
    reply = InferenceCore(policy, 1).answer([request(2, decode_futures=True)])[0]
    assert reply.futures.shape == (2, 2, 64, 64, 3) and reply.futures.dtype == np.uint8


# ---------------------------------------------------------------- pool


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "base"
    save_policy(demo_policy(), path, version=1)
    return path


@pytest.fixture(scope="module")
def shared_pool(local_ray, checkpoint):
    """One pool for the tests that only raise its version."""
    pool = InferencePool(checkpoint, InferenceConfig(wait_ms=1.0), cpus=0.5)
    yield pool
    pool.close()


def version_of(pool: InferencePool) -> int:
    return pool.status()[0]["version"]


def newer_weights(checkpoint, version: int):
    policy, _ = load_policy(checkpoint)
    with torch.no_grad():
        for parameter in policy.net.parameters():
            parameter.add_(0.01 * version)
    return pack(policy.net.named_parameters(), version)


def test_the_pool_answers_as_a_policy_in_this_process(shared_pool, checkpoint, policy):
    local = LocalClient(InferenceCore(*load_policy(checkpoint)))
    client = PoolClient(shared_pool.actors, LONG)
    requests = [request(2, seed=1), request(1, seed=2, steps=2, planner=PlannerConfig(candidates=3)), request(1, decode_futures=True)]
    pending = [client.submit(r) for r in requests]
    for asked, waiting in zip(requests, pending, strict=True):
        assert_same(client.result(waiting), local.result(local.submit(asked)))
    assert client.retries == 0


def test_a_bad_request_raises_its_own_error_through_the_pool(shared_pool):
    client = PoolClient(shared_pool.actors, LONG)
    with pytest.raises(ConfigError, match="do not fit the model") as caught:
        client.result(client.submit(request(size=24)))
    assert len(str(caught.value).splitlines()) == 1


def test_weights_of_another_model_are_refused_by_the_pool_with_one_line(shared_pool):
    before = version_of(shared_pool)
    wanted = shared_pool._wanted
    with pytest.raises(CheckpointError) as caught:
        shared_pool.push(pack(tiny(layers=3).net.named_parameters(), before + 1))
    shared_pool._wanted = wanted
    assert len(str(caught.value).splitlines()) == 1 and "another model" in str(caught.value)
    assert version_of(shared_pool) == before


def test_pushing_weights_while_requests_are_in_flight(shared_pool, checkpoint):
    client = PoolClient(shared_pool.actors, LONG)
    start = version_of(shared_pool)
    before, after = {}, {}
    for version in range(start + 1, start + 5):
        before[version] = [client.submit(request(2, seed=i, steps=3)) for i in range(8)]
        shared_pool.push(newer_weights(checkpoint, version))
        after[version] = [client.submit(request(2, seed=i, steps=3)) for i in range(4)]
    for version in after:
        assert all(client.result(pending).version >= version - 1 for pending in before[version])  # answered, nothing older than it was
        assert all(client.result(pending).version >= version for pending in after[version])  # a push that returned holds from then on
    assert version_of(shared_pool) == start + 4
    shared_pool.push(newer_weights(checkpoint, start))  # a late message
    assert version_of(shared_pool) == start + 4


def test_the_pool_switches_to_another_checkpoint_whatever_its_version(shared_pool, checkpoint):
    shared_pool.push(newer_weights(checkpoint, version_of(shared_pool) + 1))
    shared_pool.load(checkpoint, ActingPolicy(1))
    assert version_of(shared_pool) == 1
    asked = request(version=1)
    assert_same(PoolClient(shared_pool.actors, LONG).result(PoolClient(shared_pool.actors, LONG).submit(asked)),
                InferenceCore(*load_policy(checkpoint)).answer([asked])[0])


def test_a_request_for_another_planning_network_is_not_answered_by_the_policy_itself(policy):
    core = InferenceCore(policy, 3)
    wanted = request(1, planner=PlannerConfig(candidates=2), version=3, planning_checkpoint="/somewhere/planning")
    (refused,) = core.answer([wanted])
    assert isinstance(refused, WrongVersion) and "network /somewhere/planning, this actor holds (the policy itself)" in str(refused)
    planning = InferenceCore(policy, 3, demo_policy(), "/somewhere/planning")
    own = dataclasses.replace(wanted, acting=dataclasses.replace(wanted.acting, planning_checkpoint=""))
    answered, other = planning.answer([wanted, own])
    assert answered.version == 3 and "asks for the planning network (the policy itself), this actor holds /somewhere/planning" in str(other)


def test_an_actor_restarted_by_sigkill_gets_back_its_planning_network(local_ray, checkpoint, tmp_path):
    network = demo_policy()
    torch.nn.init.normal_(network.net.final_layer.linear.weight, std=0.2, generator=torch.Generator().manual_seed(5))
    save_policy(network, tmp_path / "planning", version=2)
    planner = PlannerConfig(candidates=3)
    pool = InferencePool(checkpoint, InferenceConfig(wait_ms=1.0), cpus=0.5)
    try:
        client = PoolClient(pool.actors, LONG)
        ask = lambda: client.result(client.submit(request(2, seed=3, planner=planner)))  # noqa: E731
        own = ask()
        pool.load(checkpoint, ActingPolicy(1, planning_checkpoint=str(tmp_path / "planning")))  # the version it holds already
        planned = ask()
        assert np.array_equal(own.candidates, planned.candidates) and not np.array_equal(own.scores, planned.scores)
        os.kill(pool.status()[0]["pid"], signal.SIGKILL)
        for _ in range(600):
            pool.repair()
            if pool.restarts and (status := pool.status()) and status[0]["planning_checkpoint"]:
                break
            time.sleep(0.1)
        assert pool.restarts == 1 and np.array_equal(ask().scores, planned.scores)
        pool.load(checkpoint, ActingPolicy(1))
        assert np.array_equal(ask().scores, own.scores)
    finally:
        pool.close()


def test_a_request_survives_sigkill_of_the_only_inference_actor(local_ray, checkpoint):
    # A batch is held back for a second, so the request is waiting in the actor when it is killed.
    pool = InferencePool(checkpoint, InferenceConfig(wait_ms=1000.0), cpus=0.5)
    try:
        pool.push(newer_weights(checkpoint, 7))
        (status,) = pool.status()
        client = PoolClient(pool.actors, LONG)
        pending = client.submit(request(1, seed=3))
        os.kill(status["pid"], signal.SIGKILL)
        reply = client.result(pending)
        assert client.retries >= 1 and reply.actions.shape == (1, 8, 4)
        assert reply.version == 1  # what a restarted actor holds until the driver looks after it
        for _ in range(600):  # each call only looks at what has been answered since the last
            pool.repair()
            if pool.restarts and pool.status()[0]["version"] == 7:
                break
            time.sleep(0.1)
        (status,) = pool.status()
        assert pool.restarts == 1 and status["version"] == 7
        assert client.result(client.submit(request(version=7))).version == 7
    finally:
        pool.close()
    client = PoolClient(pool.actors, timeout_s=1.0)
    with pytest.raises(PoolUnavailable) as caught:  # gone for good
        client.result(client.submit(request()))
    assert len(str(caught.value).splitlines()) == 1


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
    save_policy(load_policy(checkpoint)[0], tmp_path / "torn", 1)
    file = tmp_path / "torn" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is truncated") as caught:
        InferencePool(tmp_path / "torn", InferenceConfig(), cpus=0.5)
    assert len(str(caught.value).splitlines()) == 1
