"""Low-rank adaptation (LoRA): small trainable updates beside frozen weights, so that the 2B model trains on one GPU.

Each adapted linear layer computes ``W x + U D x`` with ``D`` (rank, in) random and ``U`` (out, rank) zero at first, so training
starts from the given network exactly. What is published is the merged weight ``W + U D`` under the public names: inference and
exports never see an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from cosmos_ray.model.transformer import Transformer


class AdaptedLinear(nn.Linear):
    """A linear layer without bias, its own weight frozen, with a trainable low-rank update."""

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_parameter("bias", None)
        self.weight = layer.weight.requires_grad_(False)
        down = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
        self.lora_down = nn.Parameter(down.to(layer.weight))
        self.lora_up = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_down), self.lora_up)

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """(out, in) weight with the update added in float32."""
        return (self.weight.float() + self.lora_up.float() @ self.lora_down.float()).to(self.weight.dtype)


def adapt(net: Transformer, rank: int, seed: int) -> None:
    """Freeze ``net`` and put adapters on the attention and MLP projections of every block."""
    generator = torch.Generator().manual_seed(seed)
    net.requires_grad_(False)
    for block in net.blocks:
        for layer in (block.self_attn, block.cross_attn, block.mlp):
            for name, child in list(layer.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(layer, name, AdaptedLinear(child, rank, generator))


def merged_parameters(net: Transformer) -> Iterator[tuple[str, torch.Tensor]]:
    """(public name, value) of every parameter with its adapter merged, in the order of a network without adapters."""
    for prefix, module in net.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if name.rpartition(".")[2] in ("lora_down", "lora_up"):
                continue
            yield name, module.merged() if isinstance(module, AdaptedLinear) else parameter
