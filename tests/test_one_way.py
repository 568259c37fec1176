"""One-way attention: given frames see given frames alone, so that one reading serves every sample; nothing sees a hidden frame."""

import dataclasses

import pytest
import torch

from cosmos_ray.config import ModelConfig, PlannerConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.model import sampling, solver
from cosmos_ray.model.checkpoint import load_checkpoint, save_policy
from cosmos_ray.model.denoising import denoise
from cosmos_ray.model.latents import training_latents
from cosmos_ray.model.noise import seeded_noise
from cosmos_ray.model.objective import Objective
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.planning.best_of_n import best_of_n
from jobs.bench import serial_planner
from tests.test_model import batch, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def one_way(**changes):
    """An untrained policy with one-way attention whose blocks and output are not zero."""
    policy, g = tiny(attention="one-way", **changes), torch.Generator().manual_seed(5)
    for name, p in policy.net.named_parameters():
        if name == "final_layer.linear.weight" or ("adaln_modulation" in name and name.endswith(".2.weight")):
            torch.nn.init.normal_(p, std=0.05, generator=g)
    return policy


def observed(policy, n):
    data = batch(n)
    return training_latents(policy, data), policy.embed([f"lift the cube {i}" for i in range(n)]), torch.arange(n) + 7


@pytest.mark.parametrize("sample_type", SampleType)
@pytest.mark.parametrize("changes", [{}, {"residual": False}, {"output": "velocity"}], ids=["residual", "plain", "velocity"])
def test_what_is_read_once_gives_what_the_whole_sequence_gives(sample_type, changes):
    """The sampler on target frames alone, against the network as it trains: the whole sequence, with a mask."""
    policy = one_way(top_share=0, **changes)
    known, text, seeds = observed(policy, 3)
    given = sampling.give(policy, sample_type, known, text)
    made = sampling.generate(policy, given, seeds, 3)
    targets = list(given.targets)
    clean, hidden = policy.clean[int(sample_type)][None], policy.hidden[int(sample_type)][None]
    for other in (0.0, 1.0):  # whatever the hidden frames are
        noise = torch.full_like(known, other)
        noise[:, :, targets] = seeded_noise(seeds, (16, len(targets), 4, 4))
        with torch.no_grad():
            whole = solver.sample(lambda x, sigma: denoise(policy, policy.net, x, sigma, known, clean, hidden, text), noise * 80.0, 3,
                                  policy.spec.sigma_max, policy.spec.sigma_min)
        torch.testing.assert_close(made[:, :, targets], whole[:, :, targets], atol=2e-4, rtol=1e-4)
    assert made[:, :, targets].std() > 0.01  # the network did say something


@pytest.mark.parametrize("sample_type", SampleType)
def test_given_frames_never_see_what_is_generated(sample_type):
    """Keys of given frames in the last block are the same whatever the noise is: with full attention they are not."""
    policy = one_way()
    known, text, _ = observed(policy, 2)
    clean, hidden = policy.clean[int(sample_type)][None], policy.hidden[int(sample_type)][None]
    frames = [i for i in range(9) if clean[0, i]]

    def last_input(noised, hidden):
        seen = []
        hook = policy.net.blocks[-1].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][:, frames]))
        with torch.no_grad():
            denoise(policy, policy.net, noised, 80.0, known, clean, hidden, text)
        hook.remove()
        return seen[0]

    noises = [torch.randn(known.shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    torch.testing.assert_close(*(last_input(noise, hidden) for noise in noises))
    policy.spec = dataclasses.replace(policy.spec, transformer=dataclasses.replace(policy.spec.transformer, one_way=False))
    first, second = (last_input(noise, hidden) for noise in noises)
    assert not torch.allclose(first, second, atol=1e-3)


def test_a_batch_of_all_sample_types_trains_each_row_as_if_alone():
    policy = one_way()
    types = [int(t) for t in SampleType]
    known, text = training_latents(policy, batch(5)), policy.embed(["lift"] * 5)
    noised = 3 * torch.randn(known.shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((5, 1), 3.0)
    together = denoise(policy, policy.net, noised, sigma, known, policy.clean[types], policy.hidden[types], text)
    for row, kind in enumerate(types):
        one = slice(row, row + 1)
        alone = denoise(policy, policy.net, noised[one], sigma[one], known[one], policy.clean[kind][None], policy.hidden[kind][None],
                        text.take(torch.tensor([row])))
        targets = [i for i in range(9) if not policy.clean[kind, i] and not policy.hidden[kind, i]]
        torch.testing.assert_close(together[one][:, :, targets], alone[:, :, targets], atol=1e-5, rtol=1e-5)
    loss, _ = Objective(policy).loss(batch(5, torch.tensor(types).numpy()), torch.Generator().manual_seed(0))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.net.parameters())


@pytest.mark.parametrize("rank_by", ["future", "action", "both", "joint"])
def test_a_plan_is_the_serial_one_and_rejection_changes_no_choice(rank_by):
    policy = one_way()
    policy.serve()
    known, text, seeds = observed(policy, 3)
    config = PlannerConfig(candidates=5, rank_by=rank_by, futures=3, future_steps=5, value_samples=5, value_steps=5)
    plan = best_of_n(policy, known, text, seeds, 3, config)
    for row, seed in enumerate(seeds.tolist()):
        chosen, actions, scores = serial_planner.plan(policy, known[row : row + 1], text.take(torch.tensor([row])), seed, 3, config)
        torch.testing.assert_close(plan.scores[row], torch.tensor(scores), atol=1e-5, rtol=1e-4)
        assert plan.chosen[row] == chosen
        torch.testing.assert_close(plan.actions[row], actions, atol=1e-4, rtol=1e-4)
    rejecting = best_of_n(policy, known, text, seeds, 3, dataclasses.replace(config, early_rejection=True))
    assert torch.equal(rejecting.chosen, plan.chosen)


def test_a_checkpoint_keeps_its_attention(tmp_path):
    policy = one_way()
    save_policy(policy, tmp_path / "policy", 1)
    loaded, _ = load_checkpoint(tmp_path / "policy")
    assert loaded.spec.transformer.one_way and loaded.spec == policy.spec
    with pytest.raises(ConfigError, match="no one-way attention: only networks of model.attention = 'full' can be exchanged"):
        loaded.spec.transformer.diffusers_dimensions()
    assert not tiny().spec.transformer.one_way and ModelConfig().attention == "full"
