"""One evaluation of a policy's network: noised latents in, predicted clean latents out (method 2.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from cosmos_ray.model.given import Given
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.transformer import Modulation


def denoise(policy: CosmosPolicy, net: Callable[..., torch.Tensor], noised: torch.Tensor, sigma: torch.Tensor | float, known: torch.Tensor,
            clean: torch.Tensor, hidden: torch.Tensor, text: Prompts, modulation: Modulation | None = None) -> torch.Tensor:
    """The predicted x0 (B, C, T, h, w) float32, with the clean frames put back.

    With ``spec.residual`` a future frame also shows the network the current frame and the ACTION frame, where these are given. The network
    then predicts the change from the current frame.

    Args:
        net: the policy's network, or the engine that trains this network.
        noised: x_sigma (B, C, T, h, w) float32.
        sigma: one number, or (B, 1) float32.
        known: (B, C, T, h, w) float32 clean latents.
        clean: (B or 1, T) float32 mask, 1 where ``known`` is given.
        hidden: (B or 1, T) float32 mask, 1 where a frame is neither given nor a target; acts where ``transformer.one_way``.
        text: B rows of prompts.
        modulation: of this sigma and mask, if it is known.
    """
    t = sigma / (1 + sigma)
    t_latent = t[..., None, None, None] if isinstance(t, torch.Tensor) else t
    given = clean[:, None, :, None, None] > 0
    scaled = (1 - t_latent) * noised
    shown = torch.where(given, known, scaled)
    if policy.spec.residual:
        layout, told = policy.layout, torch.where(given, known, 0)
        beside = (0, 0, 0, 0, layout.action + 1, 1)  # zeros in every frame but the future ones
        # Slices, because a list of frames would be copied to the device, which no CUDA graph can hold.
        current = F.pad(told[:, :, layout.proprio:layout.action], beside)
        action = told[:, :, layout.action:layout.action + 1].expand(-1, -1, len(layout.future), -1, -1)
        shown = shown + torch.where(given, 0, current + F.pad(action, beside))
    out = net(shown, clean, (1 - clean) * t, text, modulation, hidden if policy.spec.transformer.one_way else None).float()
    x0 = out if policy.spec.output == "x0" else scaled - t_latent * out
    if policy.spec.residual:
        x0 = x0 + current
    return torch.where(given, known, x0)


def denoise_targets(policy: CosmosPolicy, noised: torch.Tensor, sigma: float, given: Given, modulation: Modulation) -> torch.Tensor:
    """The predicted x0 (B, C, targets, h, w) float32 of the target frames alone, by a network that has read the given ones.

    ``noised`` are the target frames, which are the last of the sequence. Equal to :func:`denoise` up to rounding.
    """
    t, layout, first = sigma / (1 + sigma), policy.layout, given.targets[0]
    scaled = (1 - t) * noised
    shown, current = scaled, None
    if policy.spec.residual and first <= layout.future_proprio:
        beside = (0, 0, 0, 0, layout.future_proprio - first, 1)
        current = F.pad(given.known[:, :, layout.proprio:layout.action], beside)
        shown = shown + current
        if first > layout.action:
            action = given.known[:, :, layout.action:layout.action + 1].expand(-1, -1, len(layout.future), -1, -1)
            shown = shown + F.pad(action, beside)
    clean = noised.new_zeros(1, noised.shape[2])
    out = policy.net(shown, clean, (1 - clean) * t, given.text, modulation, frames=given.targets, given=given.keys).float()
    x0 = out if policy.spec.output == "x0" else scaled - t * out
    return x0 if current is None else x0 + current


def expected(policy: CosmosPolicy, sample_type: SampleType, known: torch.Tensor, text: Prompts) -> torch.Tensor:
    """One evaluation from zeros at the first sigma: the mean of the frames that ``sample_type`` does not give, (B, C, T, h, w)."""
    clean, hidden = policy.clean[int(sample_type)][None], policy.hidden[int(sample_type)][None]
    return denoise(policy, policy.net, torch.zeros_like(known), policy.spec.sigma_max, known, clean, hidden, text)
