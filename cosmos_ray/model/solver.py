"""The sampler: exponential Adams-Bashforth of order two ("2ab") on Karras sigmas (method 2.6).

``steps`` means network evaluations. The public code runs a single evaluation for both 1 and 2 (:func:`evaluations`). Nothing is
random here and nothing is read back from the device, so the loop can be captured as one CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

RHO = 7.0


def evaluations(steps: int, reference: bool) -> int:
    """Network evaluations of ``steps`` sampler steps: as many, except that the public code's two steps make one (method 2.6)."""
    return 1 if reference and steps == 2 else steps


def karras_sigmas(steps: int, sigma_max: float, sigma_min: float) -> list[float]:
    """The sigmas at which the network is evaluated: ``steps`` of them, from ``sigma_max`` down to ``sigma_min``.

    One step evaluates at ``sigma_max`` only.
    """
    if steps == 1:
        return [float(sigma_max)]
    top, bottom = sigma_max ** (1 / RHO), sigma_min ** (1 / RHO)
    return [(top + i / (steps - 1) * (bottom - top)) ** RHO for i in range(steps)]


def sample(denoise: Callable[[torch.Tensor, float], torch.Tensor], x: torch.Tensor, steps: int,
           sigma_max: float = 80.0, sigma_min: float = 4.0, ends: Callable[[torch.Tensor | None], bool] | None = None) -> torch.Tensor:
    """Integrate from noise to data.

    Args:
        denoise: maps (x_sigma float32, sigma) to the predicted x0, float32.
        x: noise already scaled by ``sigma_max``, any shape, float32.
        steps: network evaluations, >= 1.
        ends: asked before every evaluation, with the x0 prediction so far (None before the first): True ends with that prediction.

    Returns the x0 prediction at the last sigma, float32. The state is float64 between evaluations.
    """
    sigmas = karras_sigmas(steps, sigma_max, sigma_min)
    state = x.double()
    previous = None
    if ends is not None:
        ends(None)
    for now, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        predicted = denoise(state.float(), now)
        x0 = predicted.double()
        if ends is not None and ends(predicted):
            return predicted
        if previous is None:
            state = (now - following) / now * x0 + following / now * state
        else:
            sigma_before, x0_before = previous
            h = math.log(now / following)
            c2 = math.log(now / sigma_before) / h
            phi1 = (math.exp(-h) - 1) / -h
            b2 = (phi1 - 1) / -h / c2
            state = math.exp(-h) * state + h * ((phi1 - b2) * x0 + b2 * x0_before)
        previous = now, x0
    return denoise(state.float(), sigmas[-1])
