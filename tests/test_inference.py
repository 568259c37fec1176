"""Inference without Ray: batching, versions, and answers that do not depend on their batch."""

import asyncio
import dataclasses
import threading
import time

import numpy as np
import pytest
import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.errors import CheckpointError, ConfigError
from cosmos_ray.inference.batcher import Batcher
from cosmos_ray.inference.client import LOST, Loads
from cosmos_ray.inference.core import InferenceCore
from cosmos_ray.inference.local import LocalClient
from cosmos_ray.inference.messages import ActingPolicy, ActRequest, Busy, Expired, WrongVersion
from cosmos_ray.weights import pack
from tests.test_planning import demo_policy

LONG = 60.0  #: seconds after which a test that hangs fails


def request(rows: int = 1, seed: int = 0, size: int = 64, *, planner=None, version=None, planning_checkpoint="", **settings) -> ActRequest:
    """A request of random observations, a function of the seed."""
    rng = np.random.default_rng(seed)
    return ActRequest(rng.integers(0, 256, (rows, 2, size, size, 3), dtype=np.uint8), rng.uniform(-1, 1, (rows, 9)).astype(np.float32),
                      tuple(f"lift the cube {i}" for i in range(rows)), rng.integers(0, 2**62, rows),
                      **{"steps": 1, "acting": ActingPolicy(version, planner, planning_checkpoint), **settings})


def assert_same(left, right):
    """Of two replies all but the load, which the actor had besides."""
    for name, value in vars(left).items():
        assert name == "load" or np.array_equal(value, getattr(right, name)), name


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


def test_a_request_goes_to_the_actor_with_least_to_do():
    now = [0.0]
    loads = Loads(3, start=2, clock=lambda: now[0])
    assert [loads.choose(1) for _ in range(4)] == [0, 1, 2, 0]  # in turn while they are equal
    loads.tell(1, 9)
    assert [loads.choose(2) for _ in range(3)] == [2, 0, 2]
    loads.tell(0, LOST)
    loads.tell(2, 20)
    assert loads.choose(1) == 1  # whatever it has to do, it is there
    now[0] = 5.1  # what they told is forgotten, and the actor that failed is asked again
    assert sorted(loads.choose(1) for _ in range(3)) == [0, 1, 2]


def test_a_closed_loop_does_not_settle_at_half_batches():
    """Sixteen clients ask again once they are answered. Without the wait for those just answered, batches of 8 take turns for ever."""
    batches = []

    def answer(requests):
        batches.append(len(requests))
        time.sleep(0.05)
        return rows_of(requests)

    async def client(batcher, later):
        await asyncio.sleep(later)
        for _ in range(30):
            await batcher.submit(request(1))

    async def main():
        batcher = Batcher(answer, max_rows=16, wait_s=0.0)  # half of the clients come while a batch of the others runs
        await asyncio.wait_for(asyncio.gather(*(client(batcher, 0.03 * (i % 2)) for i in range(16))), LONG)

    asyncio.run(main())
    assert np.median(batches) >= 14, batches


def test_a_lone_client_does_not_wait_for_others():
    async def main():
        batcher = Batcher(rows_of, max_rows=16, wait_s=0.01)
        await batcher.submit(request(1))
        batcher.wait_s = batcher._patience = batcher._longest = 3600.0
        for _ in range(3):
            batcher._lately.append(1)
        return await asyncio.wait_for(batcher.submit(request(1)), LONG)

    assert asyncio.run(main()) == 1


def test_waits_that_bring_nobody_get_short():
    """Clients that think for longer than a batch takes: the batcher does not hold batches back for them."""

    async def main():
        batcher = Batcher(lambda requests: time.sleep(0.1) or rows_of(requests), max_rows=16, wait_s=0.001)
        for _ in range(8):
            batcher._lately.extend([8, 8, 8])  # as if many had been there
            await batcher.submit(request(1))
        return batcher._patience

    assert asyncio.run(main()) <= 0.004


@pytest.mark.parametrize("bad", [
    ActRequest(request(1).images, np.zeros((1, 7), np.float32), ("x",), np.zeros(1, np.int64), steps=1),
    request(1, planner=PlannerConfig(candidates=2, aggregate="median")),
], ids=["proprioception", "planner"])  # fmt: skip
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


def test_requests_that_nobody_awaits_any_more_are_dropped():
    """As those of a worker that died are."""
    batches, gate = [], threading.Event()

    def answer(requests):
        batches.append(rows_of(requests))
        gate.wait(LONG)
        return rows_of(requests)

    async def main():
        batcher = Batcher(answer, max_rows=4, wait_s=0.0)
        computed = asyncio.create_task(batcher.submit(request(1), within_s=LONG))
        while not batches:
            await asyncio.sleep(0.001)
        stays = asyncio.create_task(batcher.submit(request(2), within_s=LONG))
        with pytest.raises(Expired, match="nobody awaits"):
            await batcher.submit(request(3), within_s=0.01)
        gate.set()
        return await asyncio.wait_for(asyncio.gather(computed, stays), LONG)

    assert asyncio.run(main()) == [1, 2] and batches == [[1], [2]]


def test_a_full_queue_refuses_further_requests_and_takes_them_later():
    batches, gate = [], threading.Event()

    def answer(requests):
        batches.append(rows_of(requests))
        gate.wait(LONG)
        return rows_of(requests)

    async def main():
        batcher = Batcher(answer, max_rows=1, wait_s=0.0, queue_rows=2)
        calls = [asyncio.create_task(batcher.submit(request(1)))]
        while not batches:
            await asyncio.sleep(0.001)
        calls += [asyncio.create_task(batcher.submit(request(1))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="2 observations wait already"):
            await batcher.submit(request(1))
        gate.set()
        await asyncio.wait_for(asyncio.gather(*calls), LONG)
        return await asyncio.wait_for(batcher.submit(request(3)), LONG)

    assert asyncio.run(main()) == 3 and batches == [[1], [1], [1], [3]]


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
    weights.data[0][0] ^= 255
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


def test_a_request_for_another_planning_network_is_not_answered_by_the_policy_itself(policy):
    core = InferenceCore(policy, 3)
    wanted = request(1, planner=PlannerConfig(candidates=2), version=3, planning_checkpoint="/somewhere/planning")
    (refused,) = core.answer([wanted])
    assert isinstance(refused, WrongVersion) and "network /somewhere/planning, this actor holds (the policy itself)" in str(refused)
    planning = InferenceCore(policy, 3, demo_policy(), "/somewhere/planning")
    own = dataclasses.replace(wanted, acting=dataclasses.replace(wanted.acting, planning_checkpoint=""))
    answered, other = planning.answer([wanted, own])
    assert answered.version == 3 and "asks for the planning network (the policy itself), this actor holds /somewhere/planning" in str(other)
