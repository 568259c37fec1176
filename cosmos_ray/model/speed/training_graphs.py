"""A network in training as CUDA graphs: launching the operations of a small network one by one takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch.func import functional_call

from cosmos_ray.errors import ConfigError
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.speed.cuda_graph import PaddedGraph
from cosmos_ray.model.transformer import Modulation, Transformer

MOST = {True: 8, False: 32}
"""Number of shapes to capture, with gradients (True) and without; further shapes run operation by operation. Graphs with gradients hold all
activations."""


def capture_training(net: Transformer) -> None:
    """Make ``net`` capture its forward and backward pass, and replay both from then on. ConfigError without a GPU."""
    if next(net.parameters()).device.type != "cuda":
        raise ConfigError("learner.accelerate = 'graphs' needs a GPU for every learner rank: set learner.accelerate to 'none' without")
    vars(net)["forward"] = _GraphedForward(net)  # an attribute of the instance hides the method


class _GraphedForward:
    """Stands in for ``Transformer.forward``.

    Graphs read the weights where they lie, so they see updates in place. Weights that have moved need new graphs. A pass without gradients
    pads its rows to a power of two, so that few shapes are captured.
    """

    def __init__(self, net: Transformer):
        self.eager, self.run = net.forward, _Eager(net)
        self.parameters = list(net.parameters())
        self.stream = torch.cuda.Stream()
        self.where: list[int] = []
        self.graphs: dict[tuple, Callable[..., torch.Tensor]] = {}

    def __call__(self, latents: torch.Tensor, clean: torch.Tensor, timesteps: torch.Tensor, text: Prompts,
                 modulation: Modulation | None = None, hidden: torch.Tensor | None = None) -> torch.Tensor:
        if not len(latents):
            return torch.empty_like(latents)
        where = [p.data_ptr() for p in self.parameters]
        if where != self.where:
            self.where, self.graphs = where, {}
        inputs = [latents, clean, timesteps, text.tokens, text.rows, *(x for x in (text.bias, hidden) if x is not None)]
        trained, rows = torch.is_grad_enabled(), len(latents)
        padded = rows if trained else 1 << (rows - 1).bit_length()
        key = (trained, padded, tuple(text.tokens.shape), text.bias is None, *(len(x) == rows for x in inputs))
        if modulation is not None or text.keys is not None:
            return self.eager(latents, clean, timesteps, text, modulation, hidden)
        if key not in self.graphs:
            if sum(other[0] == trained for other in self.graphs) >= MOST[trained]:
                return self.eager(latents, clean, timesteps, text, modulation, hidden)
            self.graphs[key] = self._with_gradients(inputs) if trained else PaddedGraph(self.run, inputs, padded, self.stream)
        return self.graphs[key](*inputs)

    def _with_gradients(self, inputs: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The pass as an autograd function of inputs and weights; forward and backward are one graph each.

        The capture uses aliases of the weights. DeepSpeed keeps the autograd nodes of the weights themselves, which another stream made.
        """
        weights = {name: p for name, p in self.run.named_parameters() if p.requires_grad}
        aliases = [p.detach().requires_grad_() for p in weights.values()]

        def forward(*given: torch.Tensor) -> torch.Tensor:
            return functional_call(self.run, dict(zip(weights, given[len(inputs):], strict=True)), given[:len(inputs)])

        graphed = cast(Callable[..., torch.Tensor],
                       torch.cuda.make_graphed_callables(forward, (*(x.detach().clone() for x in inputs), *aliases)))
        return lambda *given: graphed(*given, *weights.values())


class _Eager(torch.nn.Module):
    """The network's own pass, with tensors as its only arguments."""

    def __init__(self, net: Transformer):
        super().__init__()
        self.net, self._pass = net, net.forward

    def forward(self, latents: torch.Tensor, clean: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor,
                *rest: torch.Tensor) -> torch.Tensor:
        masked = self.net.config.one_way
        bias = rest[0] if len(rest) > masked else None
        return self._pass(latents, clean, timesteps, Prompts(tokens, bias, rows), hidden=rest[-1] if masked else None)
