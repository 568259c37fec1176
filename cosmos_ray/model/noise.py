"""Training noise levels and reproducible noise (method 2.2, 2.6)."""

from __future__ import annotations

import math

import torch


def hybrid_sigma(n: int, frames: int, frame_scale: bool, generator: torch.Generator, uniform_share: float) -> torch.Tensor:
    """(n,) float32 training sigmas.

    A share ``uniform_share`` comes from U(1, 85); the rest comes from LogNormal(ln 4, 1.2), the schedule of the video model.
    ``frame_scale`` multiplies all sigmas by sqrt(frames).
    """
    log_normal = torch.exp(math.log(4.0) + 1.2 * torch.randn(n, generator=generator))
    uniform = 1 + 84 * torch.rand(n, generator=generator)
    sigma = torch.where(torch.rand(n, generator=generator) < 1 - uniform_share, log_normal, uniform)
    return sigma * math.sqrt(frames) if frame_scale else sigma


def seeded_noise(seeds: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise (len(seeds), *shape), row i drawn from ``seeds[i]`` alone.

    A row therefore does not depend on the batch it is in, unlike the public code's one generator per batch.
    """
    out = torch.empty(len(seeds), *shape)
    generator = torch.Generator()
    for row, seed in zip(out, seeds.tolist(), strict=True):
        generator.manual_seed(seed & (2**63 - 1))
        torch.randn(shape, generator=generator, out=row)
    return out
