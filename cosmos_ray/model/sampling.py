"""A policy in use: act, imagine and evaluate, which are one sampler with different frames given (method 2.6)."""

from __future__ import annotations

import torch

from cosmos_ray.model import solver
from cosmos_ray.model.denoising import denoise
from cosmos_ray.model.latents import read_value
from cosmos_ray.model.noise import seeded_noise
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.transformer import Modulation


def act(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int) -> torch.Tensor:
    """The policy: from the state s to latents with action, future and value. Arguments and result as for :func:`generate`."""
    return generate(policy, SampleType.POLICY, known, text, seeds, steps)


def imagine(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int) -> torch.Tensor:
    """The world model: from state and ACTION to latents with future and value. Arguments and result as for :func:`generate`."""
    return generate(policy, SampleType.WORLD_MODEL, known, text, seeds, steps)


def evaluate(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int,
             sample_type: SampleType) -> torch.Tensor:
    """The value function: (B,) float32 values in [-1, 1]. ``sample_type`` is one of the VALUE types; the rest as for :func:`generate`."""
    return read_value(policy, generate(policy, sample_type, known, text, seeds, steps))


@torch.no_grad()
def generate(policy: CosmosPolicy, sample_type: SampleType, known: torch.Tensor, text: Prompts, seeds: torch.Tensor,
             steps: int) -> torch.Tensor:
    """Sample the frames that ``sample_type`` does not give, jointly. Returns latents (B, C, T, h, w) float32.

    Row i uses noise of ``seeds[i]`` alone. Where training used ``spec.top_share``, a single evaluation of world model or value starts from
    zeros: the result is the expectation, whatever the seed.

    Args:
        known: (B, C, T, h, w) float32 latents; the clean frames are filled.
        text: B rows of prompts.
        seeds: (B,) int64.
        steps: network evaluations.
    """
    from_zeros = policy.spec.top_share and sample_type != SampleType.POLICY and solver.evaluations(steps, policy.reference_steps) == 1
    noise = torch.zeros_like(known) if from_zeros else seeded_noise(seeds, known.shape[1:]).to(known)
    if text.keys is None:
        text = policy.net.attend_to(text)
    if policy.accelerated is not None:
        return policy.accelerated(policy, sample_type, known, text, noise, steps)
    return sample(policy, sample_type, known, text, noise, steps)


@torch.no_grad()
def sample(policy: CosmosPolicy, sample_type: SampleType, known: torch.Tensor, text: Prompts, noise: torch.Tensor,
           steps: int) -> torch.Tensor:
    """:func:`generate` from given standard-normal noise (B, C, T, h, w). All work is on the device: nothing random, nothing read back."""
    spec = policy.spec
    clean = policy.clean[int(sample_type)][None]
    return solver.sample(
        lambda x, sigma: denoise(policy, policy.net, x, sigma, known, clean, text, _modulation(policy, sample_type, clean, sigma)),
        noise * spec.sigma_max, solver.evaluations(steps, policy.reference_steps), spec.sigma_max, spec.sigma_min)


def _modulation(policy: CosmosPolicy, sample_type: SampleType, clean: torch.Tensor, sigma: float) -> Modulation:
    """AdaLN of one sampler step. All rows of a batch share sigma and mask, so one row serves them all."""
    kept = {} if policy.cache is None else policy.cache.modulations
    key = (sample_type, sigma)
    if key not in kept:
        kept[key] = policy.net.modulate((1 - clean) * (sigma / (1 + sigma)))
    return kept[key]
