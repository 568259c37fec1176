"""One evaluation of a policy's network: noised latents in, predicted clean latents out (method 2.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.transformer import Modulation


def denoise(policy: CosmosPolicy, net: Callable[..., torch.Tensor], noised: torch.Tensor, sigma: torch.Tensor | float, known: torch.Tensor,
            clean: torch.Tensor, text: Prompts, modulation: Modulation | None = None) -> torch.Tensor:
    """The predicted x0 (B, C, T, h, w) float32, with the clean frames put back.

    With ``spec.residual`` a future frame also shows the network the current frame and the ACTION frame, where these are given. The network
    then predicts the change from the current frame.

    Args:
        net: the policy's network, or the engine that trains this network.
        noised: x_sigma (B, C, T, h, w) float32.
        sigma: one number, or (B, 1) float32.
        known: (B, C, T, h, w) float32 clean latents.
        clean: (B or 1, T) float32 mask, 1 where ``known`` is given.
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
    out = net(shown, clean, (1 - clean) * t, text, modulation).float()
    x0 = out if policy.spec.output == "x0" else scaled - t_latent * out
    if policy.spec.residual:
        x0 = x0 + current
    return torch.where(given, known, x0)


def expected(policy: CosmosPolicy, sample_type: SampleType, known: torch.Tensor, text: Prompts) -> torch.Tensor:
    """One evaluation from zeros at the first sigma: the mean of the frames that ``sample_type`` does not give, (B, C, T, h, w)."""
    return denoise(policy, policy.net, torch.zeros_like(known), policy.spec.sigma_max, known, policy.clean[int(sample_type)][None], text)
