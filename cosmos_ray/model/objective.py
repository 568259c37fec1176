"""The training objective of a policy: weighted denoising errors of all sample types (method 2.2, 2.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from cosmos_ray.errors import ConfigError
from cosmos_ray.model.denoising import denoise, expected
from cosmos_ray.model.latents import read_value, renormalized, training_latents
from cosmos_ray.model.noise import hybrid_sigma
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType, mask_table, target_frames
from cosmos_ray.model.spec import PolicySpec
from cosmos_ray.model.training_batch import TrainingBatch

HEAVIEST = 5.0  #: greatest weight of a sample


class Objective:
    """The loss of one policy, on the policy's device at construction.

    Args:
        policy: the policy that trains. Its spec has the loss weights.
        planning_network: the network whose value gives the advantages. It does not train.
        advantage_temperature: :func:`advantage_weights` weigh the samples of ``TrainingBatch.own`` at this temperature; 0 = no weighting.
    """

    def __init__(self, policy: CosmosPolicy, planning_network: CosmosPolicy | None = None, advantage_temperature: float = 0.0):
        self.policy, self.planning_network, self.advantage_temperature = policy, planning_network, advantage_temperature
        self.target = mask_table(policy.layout, target_frames).to(policy.device)
        self.frame_weight = _frame_weights(policy.spec).to(policy.device)

    def loss(self, batch: TrainingBatch, generator: torch.Generator, net: Callable[..., torch.Tensor] | None = None,
             encoded: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, float]]:
        """(loss of one batch, mean absolute errors of the ``action``, ``future`` and ``value`` frames that carry loss).

        Every sample draws its sigma and its noise from ``generator``. ``net`` is the network to train, for instance a DeepSpeed engine; the
        default is the policy's own. ``encoded`` as for :func:`training_latents`.
        """
        policy, spec, layout = self.policy, self.policy.spec, self.policy.layout
        x0 = training_latents(policy, batch, encoded)
        types = torch.as_tensor(batch.sample_types, device=policy.device)
        clean, hidden, target = policy.clean[types], policy.hidden[types], self.target[types]
        drawn = hybrid_sigma(len(x0), layout.frames, spec.frame_scale, generator, spec.uniform_share)
        sigma = drawn.to(x0)[:, None]
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        text = policy.embed(batch.instructions)
        sample_weight = self._sample_weights(batch, x0)
        if spec.imagined_share:
            chosen = torch.rand(len(x0), generator=generator).to(x0) < spec.imagined_share
            imagine_futures(policy, x0, text, (chosen & (types == int(SampleType.VALUE_FUTURE))).nonzero()[:, 0])
        noised = x0 + sigma[..., None, None, None] * noise
        if spec.top_share:
            top = (torch.rand(len(x0), generator=generator).to(x0) < spec.top_share) & (types != int(SampleType.POLICY))
            sigma = torch.where(top[:, None], spec.sigma_max, sigma)
            noised[top] = 0
        predicted = denoise(policy, net or policy.net, noised, sigma, x0, clean, hidden, text)
        weight = ((1 + sigma) / sigma).square() * target * self.frame_weight[types] * sample_weight
        error = predicted - x0
        loss = spec.loss_scale * (weight * error.square().mean((1, 3, 4))).mean()
        with torch.no_grad():
            absolute = error.abs().mean((1, 3, 4)) * target
            groups = {"action": [layout.action], "future": list(layout.future), "value": [layout.value]}
            errors = {k: float(absolute[:, i].sum() / target[:, i].sum().clamp_min(1)) for k, i in groups.items()}
        return loss, errors

    def _sample_weights(self, batch: TrainingBatch, x0: torch.Tensor) -> torch.Tensor:
        """(B, 1) float32: 1, or the weight by advantage for rows of ``batch.own``."""
        weights = torch.ones(len(x0), 1, device=x0.device)
        if self.advantage_temperature and batch.own is not None and batch.own.any():
            if self.planning_network is None:
                raise ConfigError("own samples are weighted by the value of the planning network, but there is none: train one first")
            own = torch.as_tensor(batch.own, device=self.policy.device)
            instructions = list(np.asarray(batch.instructions)[batch.own])
            seen = renormalized(x0[own], self.policy, self.planning_network)
            weights[own, 0] = advantage_weights(self.planning_network, seen, instructions, self.advantage_temperature)
        return weights


@torch.no_grad()
def advantage_weights(network: CosmosPolicy, x0: torch.Tensor, instructions: Sequence[str], temperature: float) -> torch.Tensor:
    """(B,) float32 weights exp(A / temperature), at most ``HEAVIEST``, of windows x0 (B, C, T, h, w).

    A = V(s') - V(s) in units of the value target, by ``network``. This is advantage-weighted regression (arXiv 1910.00177) with the value
    of the future in place of the return.
    """
    before = x0.clone()
    before[:, :, list(network.layout.future)] = x0[:, :, list(network.layout.current)]
    latents = expected(network, SampleType.VALUE_FUTURE, torch.cat((before, x0)), network.embed(instructions).repeat(2))
    now, later = read_value(network, latents).clamp(-1, 1).chunk(2)
    return ((later - now) / temperature).exp().clamp(max=HEAVIEST)


@torch.no_grad()
def imagine_futures(policy: CosmosPolicy, x0: torch.Tensor, text: Prompts, rows: torch.Tensor) -> None:
    """Replace the future frames of ``rows`` (n,) int64 of x0 (B, C, T, h, w) by one evaluation of the world model, in place.

    The network also runs for no rows: under ZeRO-3 every rank has to gather its parameters as often as the others.
    """
    known, future = x0[rows], list(policy.layout.future)
    known[:, :, future] = expected(policy, SampleType.WORLD_MODEL, known, text.take(rows))[:, :, future]
    x0[rows] = known


def _frame_weights(spec: PolicySpec) -> torch.Tensor:
    """(5, T) float32 loss weight of every frame, by sample type."""
    layout = spec.layout
    weight = torch.ones(len(SampleType), layout.frames)
    weight[:, layout.action], weight[:, layout.value] = spec.action_weight, spec.value_weight
    weight[int(SampleType.WORLD_MODEL), list(layout.future)] = spec.world_weight
    return weight
