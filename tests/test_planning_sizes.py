"""Every batch that a planner makes is known beforehand, so that it can be compiled or captured before the first request."""

import pytest
import torch

from cosmos_ray.config import InferenceConfig, PlannerConfig
from cosmos_ray.inference.core import InferenceCore, load_core
from cosmos_ray.model.checkpoint import save_policy
from cosmos_ray.model.speed.accelerate import PaddedSampler, accelerate, padded_rows, take_over
from cosmos_ray.planning.sizes import Batches, batches_of
from tests.test_inference import assert_same, request
from tests.test_model import tiny
from tests.test_planning import demo_policy
from tests.test_serving import changed, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

PLANNERS = {
    "policy alone": None,
    "V(s')": PlannerConfig(candidates=3),
    "ensembles of both": PlannerConfig(candidates=3, rank_by="both", futures=2, future_steps=3, value_samples=3, value_steps=2),
    "early rejection": PlannerConfig(candidates=5, futures=2, future_steps=2, value_samples=3, value_steps=3, early_rejection=True),
    "Q(s, a)": PlannerConfig(candidates=3, rank_by="action", value_samples=2),
    "joint": PlannerConfig(candidates=5, rank_by="joint"),
    "consensus": PlannerConfig(candidates=3, rank_by="consensus"),
    "random": PlannerConfig(candidates=3, rank_by="random"),
    "depth 2": PlannerConfig(candidates=3, depth=2, branch=2, futures=2),
    "depth 3 with a beam": PlannerConfig(candidates=3, depth=3, branch=2, beam=2),
}  # fmt: skip


class Noted(PaddedSampler):
    """Notes what is sampled, as far as compiled code and graphs depend on it."""

    def __init__(self):
        super().__init__(graphs=False)
        self.sizes = set()

    def __call__(self, policy, given, noise, steps):
        self.sizes.add((given.sample_type, padded_rows(len(given)), steps, len(given.text.tokens)))
        return super().__call__(policy, given, noise, steps)


@pytest.mark.parametrize("name, judged", [*((name, True) for name in PLANNERS), ("ensembles of both", False)])
def test_no_request_samples_a_size_that_was_not_prepared(name, judged):
    """Alone and with a planning network."""
    planner = PLANNERS[name]
    networks = [changed(demo_policy()) for _ in range(1 + judged)]
    core = InferenceCore(networks[0], 1, *networks[1:])
    for network in networks:
        network.accelerated = Noted()
    core.prepare(planner, 3, steps=2, instructions=request(3).instructions)
    prepared = [set(network.accelerated.sizes) for network in networks]
    for n in (1, 2, 3):
        core.answer([request(n, seed=n, steps=2, planner=planner), request(3 - n, seed=9, steps=2, planner=planner)][: 1 + (n < 3)])
    core.set_weights(weights_of(changed(demo_policy()), 2))
    core.answer([request(2, steps=2)])
    for network, before in zip(networks, prepared, strict=True):
        assert network.accelerated.sizes == before


def test_an_instruction_that_only_stood_in_is_no_prompt_of_the_requests_that_come():
    core = InferenceCore(changed(demo_policy()), 1)
    core.policy.accelerated = Noted()
    core.prepare(None, 2, steps=1)
    before = set(core.policy.accelerated.sizes)
    core.answer([request(1)])
    assert core.policy.accelerated.sizes == before


def test_sizes_of_few_observations():
    assert Batches(None, 1, 3).sizes(4) == [4, 8, 16]  # 3, 6, 9 and 12 rows
    assert Batches(None, 1, 8).sizes(4) == [8, 16, 24, 32]
    assert Batches(None, 1, 5, fewer=True).sizes(2) == [1, 2, 4, 8, 16]
    assert len(list(batches_of(PlannerConfig(deadline_ms=5), 5))) == 8  # four kinds, one evaluation and five


def test_a_network_that_is_not_compiled_prepares_nothing():
    policy = demo_policy()
    calls = []
    policy.net.register_forward_hook(lambda *_: calls.append(1))
    InferenceCore(policy, 1).prepare(PlannerConfig(), 4, 2)
    assert not calls


def compiled():
    """A policy that will compile its network at its first call."""
    policy = changed(demo_policy())
    accelerate(policy, "compile")
    return policy


def test_another_checkpoint_of_the_same_kind_takes_the_compiled_network_over_with_its_own_weights():
    before, after, plain = compiled(), compiled(), changed(demo_policy())
    with torch.no_grad():
        for policy in (after, plain):
            next(policy.net.parameters()).mul_(1.5)
    for policy in (before, after):
        policy.net._compiled_call_impl = None  # computes as it is: real code takes a minute to compile
    network = before.net
    cores = [InferenceCore(policy, version) for policy, version in ((before, 1), (after, 2), (plain, 2))]
    cores[1].take_over(cores[0])
    assert cores[1].policy.net is network
    assert_same(cores[1].answer([request(2, steps=2)])[0], cores[2].answer([request(2, steps=2)])[0])


def test_networks_of_another_kind_are_not_taken_over():
    after = compiled()
    smaller = tiny(width=32)
    accelerate(smaller, "compile")
    for before in (smaller, changed(demo_policy())):  # of another size, and not compiled
        own = after.net
        take_over(after, before)
        assert after.net is own


def test_a_core_in_this_process_is_prepared_for_one_observation(tmp_path):
    """As `load_policy` and the policy server do: what is loaded acts at once."""
    save_policy(demo_policy(), tmp_path / "policy", version=3)
    core = load_core(tmp_path / "policy", InferenceConfig(), "cpu")
    core.policy.accelerated = Noted()
    core.prepare(PlannerConfig(candidates=2), 1, 2)
    before = set(core.policy.accelerated.sizes)
    core.answer([request(1, steps=2, planner=PlannerConfig(candidates=2))])
    assert core.policy.accelerated.sizes == before != set()


@pytest.mark.slow
def test_no_request_compiles_after_a_core_was_prepared_nor_after_another_checkpoint_was_loaded():
    from torch._dynamo.utils import counters

    planner = PlannerConfig(candidates=2, early_rejection=True, value_samples=2, value_steps=2)
    counters.clear()
    before = InferenceCore(compiled(), 1)
    before.prepare(planner, 3, steps=2)
    programs = counters["stats"]["unique_graphs"]
    assert programs == 4  # rows of 1, 2, 4 and 8, for whatever is sampled
    core = InferenceCore(compiled(), 2)
    core.take_over(before)
    core.prepare(planner, 3, steps=2)
    for n in (1, 2, 3):
        core.answer([request(1, seed=n, steps=2, planner=planner)] * n)
        core.answer([request(1, seed=n, steps=2)] * n)
    core.set_weights(weights_of(changed(demo_policy()), 3))
    core.answer([request(1, steps=2)])
    assert counters["stats"]["unique_graphs"] == programs
