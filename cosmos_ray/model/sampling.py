"""A policy in use: act, imagine and evaluate, which are one sampler with different frames given (method 2.6).

A network whose attention is one-way reads the given frames once (:func:`give`). The sampler then evaluates the target frames alone, and
any number of samples share one reading.
"""

from __future__ import annotations

from functools import partial

import torch

from cosmos_ray.model import solver
from cosmos_ray.model.denoising import denoise, denoise_targets
from cosmos_ray.model.given import Given
from cosmos_ray.model.latents import read_value
from cosmos_ray.model.noise import seeded_noise
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType, clean_frames, target_frames
from cosmos_ray.model.transformer import Modulation


def act(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int) -> torch.Tensor:
    """The policy: from the state s to latents with action, future and value. Arguments as for :func:`give` and :func:`generate`."""
    return generate(policy, give(policy, SampleType.POLICY, known, text), seeds, steps)


def imagine(policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int) -> torch.Tensor:
    """The world model: from state and ACTION to latents with future and value. Arguments as for :func:`give` and :func:`generate`."""
    return generate(policy, give(policy, SampleType.WORLD_MODEL, known, text), seeds, steps)


def evaluate(policy: CosmosPolicy, given: Given, seeds: torch.Tensor, steps: int) -> torch.Tensor:
    """The value function: (B*n,) float32 values in [-1, 1]. ``given`` is of one of the VALUE types; the rest as for :func:`generate`."""
    return read_value(policy, generate(policy, given, seeds, steps))


@torch.no_grad()
def give(policy: CosmosPolicy, sample_type: SampleType, known: torch.Tensor, text: Prompts) -> Given:
    """The frames that ``sample_type`` gives, ready to be sampled from. A one-way network reads them here.

    Args:
        known: (B, C, T, h, w) float32 latents; the clean frames are filled.
        text: B rows of prompts.
    """
    if text.keys is None:
        text = policy.net.attend_to(text)
    if not policy.spec.transformer.one_way:
        targets = tuple(frame for frame in range(policy.layout.frames) if frame not in clean_frames(policy.layout, sample_type))
        return Given(sample_type, targets, known, text, None)
    frames = tuple(sorted(clean_frames(policy.layout, sample_type)))
    keys = policy.net.read(known[:, :, list(frames)], frames, text, _modulation(policy, None, known.new_ones(1, 1), 0.0))
    return Given(sample_type, target_frames(policy.layout, sample_type), known, text, keys)


@torch.no_grad()
def generate(policy: CosmosPolicy, given: Given, seeds: torch.Tensor, steps: int) -> torch.Tensor:
    """Sample the frames that are not given, jointly. Returns latents (B*n, C, T, h, w) float32.

    Row i uses noise of ``seeds[i]`` alone. Where training used ``spec.top_share``, a single evaluation of world model or value starts from
    zeros: the result is the expectation, whatever the seed. Frames that are hidden from the samples hold anything.

    Args:
        given: B rows.
        seeds: (B*n,) int64: n samples of every row, which are neighbours.
        steps: network evaluations.
    """
    given = given.repeat_interleave(len(seeds) // len(given)) if len(given) else given
    from_zeros = (policy.spec.top_share and given.sample_type != SampleType.POLICY
                  and solver.evaluations(steps, policy.reference_steps) == 1)
    b, c, frames, h, w = given.known.shape
    shape = (c, frames if given.keys is None else len(given.targets), h, w)
    noise = given.known.new_zeros(b, *shape) if from_zeros else seeded_noise(seeds, shape).to(given.known)
    if policy.accelerated is not None:
        return policy.accelerated(policy, given, noise, steps)
    return sample(policy, given, noise, steps)


@torch.no_grad()
def sample(policy: CosmosPolicy, given: Given, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """:func:`generate` from given standard-normal noise: (B, C, T, h, w), or of the target frames alone for a one-way network.

    All work is on the device: nothing random, nothing read back. The policy's ``watch`` may end the sampling early.
    """
    spec, known = policy.spec, given.known
    noised, count = noise * spec.sigma_max, solver.evaluations(steps, policy.reference_steps)
    ends = None if policy.watch is None else partial(policy.watch, given.sample_type, len(noise))
    if given.keys is not None:
        still = known.new_zeros(1, 1)
        made = solver.sample(
            lambda x, sigma: denoise_targets(policy, x, sigma, given, _modulation(policy, None, still, sigma)),
            noised, count, spec.sigma_max, spec.sigma_min, ends)
        return torch.cat((known[:, :, :given.targets[0]], made), 2)
    clean, hidden = (mask[int(given.sample_type)][None] for mask in (policy.clean, policy.hidden))
    return solver.sample(
        lambda x, sigma: denoise(policy, policy.net, x, sigma, known, clean, hidden, given.text,
                                 _modulation(policy, given.sample_type, clean, sigma)),
        noised, count, spec.sigma_max, spec.sigma_min, ends)


def _modulation(policy: CosmosPolicy, sample_type: SampleType | None, clean: torch.Tensor, sigma: float) -> Modulation:
    """AdaLN of one sampler step for the frames of a ``clean`` mask (1, T). All rows of a batch share sigma and mask, so one row serves them
    all. A one-way network needs a single frame, as all frames that it evaluates together have one sigma (``sample_type`` None)."""
    kept = {} if policy.cache is None else policy.cache.modulations
    key = (sample_type, sigma)
    if key not in kept:
        kept[key] = policy.net.modulate((1 - clean) * (sigma / (1 + sigma)))
    return kept[key]
