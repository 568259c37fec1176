"""The training objective: noise levels, weights of frames and samples, imagined futures, and that a small network learns."""

import dataclasses

import numpy as np
import pytest
import torch

from cosmos_ray.errors import ConfigError
from cosmos_ray.model import sampling
from cosmos_ray.model.checkpoint import load_checkpoint, save_policy
from cosmos_ray.model.latents import training_latents
from cosmos_ray.model.noise import hybrid_sigma
from cosmos_ray.model.objective import HEAVIEST, Objective, advantage_weights
from cosmos_ray.model.sample_types import SampleType
from tests.test_model import batch, tiny


def test_another_world_weight_is_of_the_future_frames_of_world_model_samples_alone(tmp_path):
    def losses(policy):
        return [Objective(policy).loss(batch(4, sample_type), torch.Generator().manual_seed(0))[0].item() for sample_type in SampleType]

    policy = tiny(world_weight=1.0)
    with torch.no_grad():
        policy.net.final_layer.linear.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    before, after = losses(policy), []
    for weight in (8.0, 15.0):
        policy.spec = dataclasses.replace(policy.spec, world_weight=weight)
        after.append(losses(policy))
    world = [row.pop(SampleType.WORLD_MODEL) for row in (before, *after)]  # with their value, whose weight stays
    assert world[1] - world[0] == pytest.approx(world[2] - world[1]) and world[1] > world[0]
    assert after == [before, before]
    save_policy(policy, tmp_path / "policy", 1)
    assert losses(load_checkpoint(tmp_path / "policy")[0])[SampleType.WORLD_MODEL] == pytest.approx(world[2])


@pytest.mark.parametrize("frames, quantiles", [(9, [2.07, 7.5, 21.3, 79, 218]), (11, [2.29, 8.3, 23.5, 87, 241])])
def test_training_sigma_has_the_quantiles_of_the_method(frames, quantiles):
    sigma = hybrid_sigma(400_000, frames, True, torch.Generator().manual_seed(0), 0.3).numpy()
    np.testing.assert_allclose(np.quantile(sigma, [0.05, 0.25, 0.5, 0.75, 0.95]), quantiles, rtol=0.02)


@pytest.mark.parametrize("share, quantiles", [(0.0, [0.56, 1.78, 4.0, 9.0, 28.8]), (1.0, [5.2, 22, 43, 64, 80.8])])
def test_training_sigma_without_the_uniform_part_and_of_it_alone(share, quantiles):
    sigma = hybrid_sigma(400_000, 9, False, torch.Generator().manual_seed(0), share).numpy()
    np.testing.assert_allclose(np.quantile(sigma, [0.05, 0.25, 0.5, 0.75, 0.95]), quantiles, rtol=0.02)


def test_the_share_of_uniform_noise_is_what_the_loss_draws():
    def loss(policy):
        return Objective(policy).loss(batch(32), torch.Generator().manual_seed(0))[0].item()

    losses = {share: loss(tiny(uniform_share=share)) for share in (0.0, 0.3, 1.0)}
    assert len(set(losses.values())) == 3 and losses[0.3] == loss(tiny())


@pytest.mark.parametrize("output", ["x0", pytest.param("velocity", marks=pytest.mark.slow)])
def test_a_tiny_model_overfits_one_batch(output):
    policy = tiny(output=output, patch=2)  # patches of 64 numbers: noise tokens fit through the width
    data = batch(5, np.arange(5) % 2)
    optimizer = torch.optim.AdamW(policy.net.parameters(), 4e-3)
    losses = []
    for step in range(400):
        generator = torch.Generator().manual_seed(step % 5)  # five fixed draws of sigma and noise: a fixed training set
        loss, _ = Objective(policy).loss(data, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) / 10


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_world_model_and_value_samples_are_trained_where_the_planner_evaluates_once(share):
    policy = tiny(top_share=share)
    types = np.repeat([int(sample_type) for sample_type in SampleType], 40)
    seen = []

    def net(x, clean, noise, *_):
        at_top = noise.max(1).values == policy.spec.sigma_max / (1 + policy.spec.sigma_max)  # t = sigma / (1 + sigma) of each row
        value = x[:, :, policy.layout.value].flatten(1)  # no sample is given it
        assert torch.equal(at_top, ~value.any(1))  # from zeros
        seen.append(at_top)
        return torch.zeros_like(x)

    Objective(policy).loss(batch(200, types), torch.Generator().manual_seed(0), net)
    top = seen[0].view(len(SampleType), 40).float().mean(1)
    assert top[0] == 0 and ((top[1:] - share).abs() < 0.25).all() and (share == 0.5 or (top[1:] == share).all())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_values_are_trained_on_what_the_world_model_imagines(share):
    policy, types = tiny(imagined_share=share), np.repeat([int(sample_type) for sample_type in SampleType], 2)
    torch.nn.init.normal_(policy.net.final_layer.linear.weight, std=0.05, generator=torch.Generator().manual_seed(5))
    data, future, given = batch(10, types), list(policy.layout.future), []

    def net(x, *arguments):
        given.append(x)
        return policy.net(x, *arguments)

    loss, _ = Objective(policy).loss(data, torch.Generator().manual_seed(0), net)
    real = training_latents(policy, data)
    rows = torch.as_tensor(types) == int(SampleType.VALUE_FUTURE)
    same = torch.isclose(given[0], real, atol=1e-6)[:, :, future].flatten(1).all(1)
    assert same[rows].tolist() == [share == 0] * 2
    assert same[torch.as_tensor(types) == int(SampleType.VALUE_FULL)].all()  # of all others, none
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in policy.net.parameters())


def test_what_was_executed_weighs_by_how_much_the_value_of_the_state_rose():
    policy, data = tiny(), batch(6, np.zeros(6, np.int64))
    torch.nn.init.normal_(policy.net.final_layer.linear.weight, std=0.05, generator=torch.Generator().manual_seed(5))
    latents, text = training_latents(policy, data), policy.embed(data.instructions)
    later = sampling.evaluate(policy, sampling.give(policy, SampleType.VALUE_FUTURE, latents, text), torch.zeros(6, dtype=torch.int64), 1)
    stayed = latents.clone()
    stayed[:, :, list(policy.layout.future)] = latents[:, :, list(policy.layout.current)]
    now = sampling.evaluate(policy, sampling.give(policy, SampleType.VALUE_FUTURE, stayed, text), torch.zeros(6, dtype=torch.int64), 1)
    weights = advantage_weights(policy, latents, data.instructions, 0.1)
    torch.testing.assert_close(weights, torch.exp((later - now) / 0.1).clamp(max=HEAVIEST))
    assert weights.std() > 0.01 and torch.equal(advantage_weights(policy, stayed, data.instructions, 0.1), torch.ones(6))
    assert advantage_weights(policy, latents, data.instructions, 1e-6).max() == HEAVIEST

    learner = tiny()  # another network: the planning network does not train

    def loss(own, advantage):
        data.own = own
        return Objective(learner, policy, advantage).loss(data, torch.Generator().manual_seed(0))[0].item()

    plain, nobody, first = loss(None, 0.0), loss(np.zeros(6, bool), 0.1), loss(np.arange(6) == 0, 0.1)
    assert plain == nobody != first
    whole = [loss(np.arange(6) == i, 0.1) - plain for i in range(6)]
    assert [change > 0 for change in whole] == [float(weight) > 1 for weight in weights]
    assert loss(np.ones(6, bool), 0.1) == pytest.approx(plain + sum(whole), rel=1e-4)


def test_own_samples_without_a_planning_network_are_refused():
    data = batch(3)
    data.own = np.array([True, False, False])
    with pytest.raises(ConfigError, match="weighted by the value of the planning network, but there is none"):
        Objective(tiny(), advantage_temperature=0.1).loss(data, torch.Generator().manual_seed(0))
