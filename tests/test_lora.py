"""Low-rank adaptation: what it starts from, what it trains, what it publishes, and that it resumes."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from cosmos_ray.inference.core import InferenceCore
from cosmos_ray.learner.core import LearnerCore
from cosmos_ray.model import sampling
from cosmos_ray.model.checkpoint import load_checkpoint
from cosmos_ray.model.latents import training_latents
from cosmos_ray.model.lora import AdaptedLinear, adapt, merged_parameters
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.transformer import Transformer, TransformerConfig
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.weights import fingerprint, pack
from tests import test_learner
from tests.test_inference import assert_same, request
from tests.test_learner import CONFIG, losses, source
from tests.test_model import batch, tiny

store = test_learner.store  # the fixtures

RANK = 4
ADAPTED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.output_proj", "cross_attn.q_proj", "cross_attn.k_proj",
           "cross_attn.v_proj", "cross_attn.output_proj", "mlp.layer1", "mlp.layer2")  # fmt: skip


def randomised() -> CosmosPolicy:
    """A small policy none of whose outputs is zero, as it is before training (AdaLN-zero)."""
    policy = tiny(world_weight=1.0)  # the future frames of synthetic episodes are noise that nothing predicts
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def adapted(rank: int = RANK, trained: bool = True) -> tuple[CosmosPolicy, CosmosPolicy]:
    """(policy, the same with adapters, as if they had been trained)."""
    plain = randomised()
    policy = copy.deepcopy(plain)
    adapt(policy.net, rank, seed=7)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in policy.net.named_parameters():
        if trained and name.endswith("lora_up"):
            parameter.data.normal_(0, 0.1, generator=generator)
    return plain, policy


def output(policy: CosmosPolicy) -> torch.Tensor:
    data = batch(3)
    with torch.no_grad():
        known = training_latents(policy, data)
        return sampling.act(policy, known, policy.embed(data.instructions), torch.arange(3), steps=2)


# ---------------------------------------------------------------- the network


def test_an_adapted_network_starts_exactly_equal():
    plain, policy = adapted(trained=False)
    assert torch.equal(output(policy), output(plain))
    plain, policy = adapted(trained=True)
    assert not torch.equal(output(policy), output(plain))


def test_every_projection_of_attention_and_mlp_is_adapted_and_nothing_else_trains():
    _, policy = adapted()
    wanted = {f"blocks.{i}.{name}.{part}" for i in range(2) for name in ADAPTED for part in ("lora_down", "lora_up")}
    assert {name for name, p in policy.net.named_parameters() if p.requires_grad} == wanted


def test_few_numbers_train():
    net = adapted()[1].net
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    width, text, layers = 64, 64, 2
    attention = 6 * 2 * width + 2 * (text + width)  # two attentions: six layers on the width, keys and values of the text
    assert trained == layers * RANK * (attention + 2 * (width + 4 * width))
    with torch.device("meta"):
        large = Transformer(TransformerConfig())
    adapt(large, 16, seed=0)
    assert sum(p.numel() for p in large.parameters() if p.requires_grad) == 22_937_600  # of 1,956,413,440: 1.2 %


def test_merged_parameters_are_named_shaped_and_ordered_as_an_unadapted_network_s():
    plain, policy = adapted()
    merged = list(merged_parameters(policy.net))
    assert [(name, p.shape, p.dtype) for name, p in merged] == [(name, p.shape, p.dtype) for name, p in plain.net.named_parameters()]
    assert fingerprint(merged) == fingerprint(plain.net.named_parameters())
    assert [n for n, p in merged_parameters(plain.net)] == [n for n, _ in plain.net.named_parameters()]  # without adapters: as it is
    for (name, value), original in zip(merged, plain.net.parameters(), strict=True):
        assert torch.equal(value, original) != any(name.endswith(f"{part}.weight") for part in ADAPTED), name


def test_the_merged_network_computes_what_the_adapted_one_does():
    plain, policy = adapted()
    before, wanted = output(plain), output(policy)
    plain.net.load_state_dict(dict(merged_parameters(policy.net)))
    torch.testing.assert_close(output(plain), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - before).abs().max() > 0.1  # it is the adapters' doing


def test_a_merge_adds_in_float32():
    """So that only the sum is rounded, to half a unit of bfloat16's last place; its own arithmetic rounds the product as well."""
    layer = torch.nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    layer.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    adapter = AdaptedLinear(layer, 8, torch.Generator().manual_seed(0))
    adapter.lora_up.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    exact = layer.weight.double() + adapter.lora_up.double() @ adapter.lora_down.double()
    assert adapter.merged().dtype == torch.bfloat16
    assert ((adapter.merged().double() - exact).abs() <= 2**-8 * exact.abs() + 1e-7).all()


def test_the_adapters_of_two_ranks_start_alike():
    first, second = adapted(trained=False)[1], adapted(trained=False)[1]
    for (name, left), right in zip(first.net.named_parameters(), second.net.parameters(), strict=True):
        assert torch.equal(left, right), name


# ---------------------------------------------------------------- the learner


def lora_core(root, **changes) -> LearnerCore:
    config = dataclasses.replace(CONFIG, lora_rank=RANK, **changes)
    return LearnerCore(config, randomised(), source(ReplayStore(root, create=False)), peak_lr=2e-3, total_steps=40, seed=3)


def test_only_the_adapters_change_in_training(alone, store):
    def run(root):
        core = lora_core(root)
        before = {name: p.detach().clone() for name, p in core.policy.net.named_parameters()}
        first, last = core.train(5), core.train(25)
        return {name: torch.equal(p, before[name]) for name, p in core.policy.net.named_parameters()}, first["loss"], last["loss"]

    same, first, last = alone(run, store.root)
    assert all(unchanged != ("lora_" in name) for name, unchanged in same.items()), same
    assert sum("lora_" in name for name in same) == 2 * 2 * len(ADAPTED) and last < first


def test_an_unadapted_policy_takes_the_published_weights_and_acts_as_the_learner_s(alone, store, tmp_path):
    def run(root, path):
        core = lora_core(root, ema=0.0)
        losses(core, 6)
        core.export(path, 5)
        return core.weights(5), InferenceCore(core.policy, 5).answer([request(3, size=32)])[0]

    weights, wanted = alone(run, store.root, tmp_path / "policy")
    inference = InferenceCore(randomised(), 1)
    before = inference.answer([request(3, size=32)])[0]
    assert inference.set_weights(weights) == 5
    reply = inference.answer([request(3, size=32)])[0]
    np.testing.assert_allclose(reply.actions, wanted.actions, rtol=0, atol=1e-5)
    assert np.abs(reply.actions - before.actions).max() > 1e-3
    loaded, version = load_checkpoint(tmp_path / "policy")
    assert version == 5 and pack(loaded.net.named_parameters(), 5).checksum == weights.checksum
    assert_same(InferenceCore(loaded, 5).answer([request(3, size=32)])[0], reply)


@pytest.mark.parametrize("changes", [
    {"ema": 0.9}, {"ema": 0.0, "precision": "bf16"}, {"ema": 0.0, "zero_stage": 3, "activation_checkpointing": True},
], ids=["averaged", "bf16", "ZeRO-3"])  # fmt: skip
def test_a_resumed_learner_with_adapters_is_bit_identical_to_one_that_never_stopped(alone, store, tmp_path, changes):
    def run(root, folder):
        whole = lora_core(root, **changes)
        before = losses(whole, 3)
        whole.save(folder)
        after = losses(whole, 4)
        resumed = lora_core(root, **changes)
        assert resumed.load(folder) and resumed.step_count == 3
        return before, after, losses(resumed, 4), whole.weights(1), resumed.weights(1)

    before, after, again, weights, weights_again = alone(run, store.root, tmp_path / "state")
    assert after == again and before != after[:3]
    assert weights.checksum == weights_again.checksum


def test_the_frozen_weights_are_not_in_the_saved_state(alone, store, tmp_path):
    def run(root, folder):
        core = lora_core(root)
        core.step()
        core.save(folder)

    alone(run, store.root, tmp_path / "state")
    (file,) = (tmp_path / "state").glob("*/*.safetensors")
    assert file.stat().st_size < 4 * sum(p.numel() for p in tiny().net.parameters()) / 2
