"""Serving: what is kept between calls, mixed instructions, step counting, precision and acceleration."""

import dataclasses

import numpy as np
import pytest
import torch

from cosmos_ray.config import InferenceConfig, PlannerConfig, RunConfig, check
from cosmos_ray.errors import ConfigError
from cosmos_ray.inference.core import InferenceCore, load_core
from cosmos_ray.inference.messages import ActingPolicy, ActRequest
from cosmos_ray.model import policy as policy_module
from cosmos_ray.model.checkpoint import load_checkpoint, save_policy
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.speed.accelerate import PaddedSampler, accelerate, padded_rows
from cosmos_ray.planning.best_of_n import act_directly, best_of_n
from cosmos_ray.weights import Weights, pack
from tests.test_inference import assert_same, request
from tests.test_model import tiny
from tests.test_planning import demo_policy, observed

pytestmark = pytest.mark.usefixtures("one_thread")

PLANNER = PlannerConfig(candidates=3, futures=2, future_steps=3, value_samples=3, value_steps=2)


def decide(policy: CosmosPolicy, n: int = 3, planner: PlannerConfig | None = None, steps: int = 3, seed: int = 0):
    known, text, seeds = observed(policy, n, seed)
    if planner is None:
        return act_directly(policy, known, text, seeds, steps)
    return best_of_n(policy, known, text, seeds, steps, planner)


def changed(policy: CosmosPolicy, by: float = 0.05) -> CosmosPolicy:
    """The same policy with other weights, AdaLN and text projections included."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in policy.net.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return policy


def weights_of(policy: CosmosPolicy, version: int) -> Weights:
    return pack(policy.net.named_parameters(), version)


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("planner", [None, PLANNER], ids=["policy alone", "planning"])
def test_what_is_kept_between_calls_changes_no_bit(planner):
    wanted, served = changed(demo_policy()), changed(demo_policy())
    served.serve()
    for seed in (0, 0, 1):  # what is kept fills up, is used, and is used for other observations
        assert_same(decide(served, planner=planner, seed=seed), decide(wanted, planner=planner, seed=seed))


def test_keys_and_modulation_are_computed_once():
    policy = demo_policy()
    policy.serve()
    calls = {"keys": 0, "modulation": 0}
    policy.net.blocks[0].cross_attn.k_proj.register_forward_hook(lambda *_: calls.update(keys=calls["keys"] + 1))
    policy.net.t_embedder[1].register_forward_hook(lambda *_: calls.update(modulation=calls["modulation"] + 1))
    for _ in range(3):
        decide(policy, steps=3)
    assert calls == {"keys": 1, "modulation": 3}
    for instruction in ("close", "open", "close", "lift the cube 0"):
        policy.embed([instruction])
    assert calls == {"keys": 3, "modulation": 3}  # two new instructions
    policy.serve()
    decide(policy, steps=3)
    assert calls == {"keys": 4, "modulation": 6}


@pytest.mark.parametrize("planner", [None, PLANNER], ids=["policy alone", "planning"])
def test_answers_after_a_push_are_those_of_a_fresh_policy_with_these_weights(planner):
    core, newer = InferenceCore(demo_policy(), 1), changed(demo_policy())
    asked = request(2, steps=2, planner=planner)
    before = core.answer([asked])[0]
    core.set_weights(weights_of(newer, 2))
    after = core.answer([asked])[0]
    assert_same(after, InferenceCore(newer, 2).answer([asked])[0])
    assert not np.array_equal(after.actions, before.actions)


def test_more_instructions_than_are_kept_are_answered_all_the_same(monkeypatch):
    monkeypatch.setattr(policy_module, "PROMPTS_KEPT", 4)
    core, plain = InferenceCore(demo_policy(), 1), demo_policy()
    for names in (["a b", "c"], ["d", "e f g"], ["h", "c", "h"], ["i", "j"], ["k"], ["l", "m"], ["a b"]):
        known, text, seeds = observed(plain, len(names))
        wanted = act_directly(plain, known, plain.embed(names), seeds, 2)
        assert_same(act_directly(core.policy, known, core.policy.embed(names), seeds, 2), wanted)
        assert len(core.policy.embed(names).tokens) < 4 + len(names)


# ---------------------------------------------------------------- mixed instructions

INSTRUCTIONS = ("lift the red cube", "close", "lift the red cube", "stack the red cube on the green one and then open the drawer below",
                "", " ".join(f"word{i}" for i in range(40)))  # the last fills all 16 tokens: nothing of it is padding


def asking(instructions, rows) -> ActRequest:
    whole = request(len(INSTRUCTIONS), seed=4, steps=2)
    return ActRequest(whole.images[rows], whole.proprio[rows], tuple(instructions), whole.seeds[rows], steps=2)


@pytest.mark.parametrize("planner", [None, PLANNER], ids=["policy alone", "planning"])
def test_every_row_gets_what_it_gets_alone_whatever_the_others_are_told(planner):
    together = dataclasses.replace(asking(INSTRUCTIONS, list(range(6))), acting=ActingPolicy(planner=planner))
    reply = InferenceCore(changed(demo_policy()), 1).answer([together])[0]
    shared = InferenceCore(changed(demo_policy()), 1)  # one after another: more prompts are known each time
    for i, instruction in enumerate(INSTRUCTIONS):
        asked = dataclasses.replace(asking([instruction], [i]), acting=ActingPolicy(planner=planner))
        alone, later = InferenceCore(changed(demo_policy()), 1).answer([asked])[0], shared.answer([asked])[0]
        for answer in (alone, later):
            assert np.array_equal(answer.actions[0], reply.actions[i]) and np.array_equal(answer.scores[0], reply.scores[i]), instruction


def test_another_instruction_is_another_answer():
    core = InferenceCore(changed(demo_policy()), 1)
    answers = [core.answer([asking([instruction], [0])])[0].actions for instruction in INSTRUCTIONS]
    assert len({a.tobytes() for a in answers}) == 5  # the first and the third are the same


# ---------------------------------------------------------------- steps


def test_two_reference_steps_are_one_evaluation():
    policy = demo_policy()
    one, two, three = (decide(policy, steps=n).actions for n in (1, 2, 3))
    assert not torch.equal(one, two)
    policy.reference_steps = True
    assert torch.equal(decide(policy, steps=2).actions, one)
    assert torch.equal(decide(policy, steps=1).actions, one) and torch.equal(decide(policy, steps=3).actions, three)


# ---------------------------------------------------------------- precision


def test_bfloat16_on_a_cpu_answers_nearly_the_same():
    exact, half = changed(demo_policy()), changed(demo_policy()).place("cpu", torch.bfloat16)
    assert {p.dtype for p in half.net.parameters()} == {torch.bfloat16} and half.action_low.dtype == torch.float32
    wanted, found = decide(exact), decide(half)
    assert found.actions.dtype == torch.float32
    error = (found.actions - wanted.actions).abs()
    spread = wanted.actions.std()
    assert 0 < error.mean() < 0.05 * spread, (error.mean(), spread)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "base"
    save_policy(changed(demo_policy()), path, version=1)
    return path


def test_a_checkpoint_is_served_with_the_precision_and_steps_of_the_config(checkpoint):
    core, asked = load_core(checkpoint, InferenceConfig(precision="bf16", reference_steps=True), "cpu"), request(2, seed=1, steps=2)
    policy, version = load_checkpoint(checkpoint, torch.bfloat16)
    one = dataclasses.replace(asked, steps=1)
    assert_same(core.answer([asked])[0], InferenceCore(policy, version).answer([one])[0])
    newer = changed(demo_policy(), by=0.1)
    core.set_weights(weights_of(newer, 2))  # a learner in float32 pushes to a policy in bfloat16
    assert core.policy.net.dtype == torch.bfloat16
    assert_same(core.answer([asked])[0], InferenceCore(newer.place("cpu", torch.bfloat16), 2).answer([one])[0])
    plain = load_core(checkpoint, InferenceConfig(), "cpu")  # "auto" is full precision on a CPU, and two steps are two
    assert_same(plain.answer([asked])[0], InferenceCore(*load_checkpoint(checkpoint)).answer([asked])[0])


# ---------------------------------------------------------------- acceleration


@pytest.mark.parametrize("how", ["graphs", "both"])
def test_graphs_without_a_gpu_are_refused_before_anything_starts(how):
    config = RunConfig(inference=InferenceConfig(accelerate=how))
    with pytest.raises(ConfigError, match=f"inference.accelerate = '{how}' needs a GPU.*inference.gpus, or take 'compile'") as caught:
        check(config)
    assert len(str(caught.value).splitlines()) == 1
    check(dataclasses.replace(config, inference=InferenceConfig(accelerate=how, gpus=1.0)))
    check(dataclasses.replace(config, inference=InferenceConfig(accelerate="compile")))


@pytest.mark.parametrize("how", ["graphs", "both"])
def test_graphs_on_a_cpu_are_refused_with_one_clear_line(how):
    policy = tiny()
    with pytest.raises(ConfigError, match=f"inference.accelerate = '{how}' needs a GPU.*or take 'compile'") as caught:
        accelerate(policy, how)
    assert len(str(caught.value).splitlines()) == 1
    assert policy.accelerated is None  # left as it was
    assert all(module._compiled_call_impl is None for module in policy.net.modules())


@pytest.mark.parametrize("planner", [None, PLANNER], ids=["policy alone", "planning"])
def test_rows_padded_to_few_shapes_change_no_bit(planner):
    """Compilation and graphs pad rows to few sizes. On a GPU the same sampler replays graphs, see test_gpu.py."""
    core, plain = InferenceCore(changed(demo_policy()), 1), InferenceCore(changed(demo_policy()), 1)
    core.policy.accelerated = PaddedSampler(graphs=False)
    rows = set()
    core.policy.net.x_embedder.register_forward_hook(lambda module, arguments, _: rows.add(len(arguments[0])))
    for n in (1, 2, 3, 5):
        asked = request(n, seed=n, steps=2, planner=planner)
        assert_same(core.answer([asked])[0], plain.answer([asked])[0])
    assert rows <= {1, 2, 4, 8, 16, 24, 32, 48, 64}, rows
    assert [padded_rows(n) for n in (1, 3, 12, 16, 17, 24, 25, 40)] == [1, 4, 16, 16, 24, 24, 32, 48]


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_actions_and_is_compiled_once_per_padded_batch_size():
    from torch._dynamo.utils import counters

    plain, compiled = changed(demo_policy()), changed(demo_policy())
    accelerate(compiled, "compile")
    cores = [InferenceCore(policy, 1) for policy in (plain, compiled)]

    def compare(rows: int, planner: PlannerConfig | None) -> int:
        """Programs so far, after both have answered alike."""
        wanted, found = (core.answer([request(rows, seed=rows, steps=2, planner=planner)])[0] for core in cores)
        for name in ("actions", "scores", "candidates"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=0, atol=1e-4)
        return counters["stats"]["unique_graphs"]

    counters.clear()
    assert compare(3, None) == 1  # four rows, four prompts
    assert compare(4, None) == 1
    programs = compare(1, PLANNER)  # proposals and futures of 4 rows, values of 8 and 16
    assert programs == 3
    newer = weights_of(changed(demo_policy(), by=0.06), 2)
    for core in cores:
        core.set_weights(newer)
    assert compare(4, None) == compare(1, PLANNER) == programs  # new weights and new caches, the same code
    assert compare(1, None) > programs  # the count does count
