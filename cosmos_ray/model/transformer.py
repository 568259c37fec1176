"""The diffusion transformer of Cosmos-Predict2 (method 5.1), at any size.

Module names give the public checkpoint's parameter names (after its ``net.`` prefix), so a 2B state dict loads as it is.
AdaLN modulation is computed once per latent frame and broadcast over the frame's tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from cosmos_ray.errors import ConfigError


@dataclass(frozen=True)
class TransformerConfig:
    """Dimensions. The defaults are the 2B model's."""

    channels: int = 16  #: latent channels in and out
    width: int = 2048  #: model channels
    heads: int = 16
    layers: int = 28
    patch: int = 2  #: spatial patch of the latent grid (the temporal patch is 1)
    text_width: int = 1024
    adaln_rank: int = 256
    mlp_ratio: float = 4.0
    rope_scale: tuple[float, float, float] = (1.0, 3.0, 3.0)  #: NTK extrapolation of time, height, width
    bf16_timestep: bool = True  #: round timesteps to bfloat16 before embedding, as the released weights were trained

    def __post_init__(self):
        if self.width % self.heads:
            raise ConfigError(f"model width {self.width} does not divide by {self.heads} heads")
        if self.width // self.heads < 12 or (self.width // self.heads) % 2:
            raise ConfigError(f"head dimension {self.width // self.heads} is too small for 3-D RoPE: it must be even and at least 12")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with a learned scale."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention without biases, RMS-normed queries and keys; rotary positions for self-attention."""

    def __init__(self, width: int, heads: int, context_width: int | None = None):
        super().__init__()
        context_width = context_width or width
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(context_width, width, bias=False)
        self.v_proj = nn.Linear(context_width, width, bias=False)
        self.output_proj = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None,
                rotary: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        source = x if context is None else context
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        k = self.k_norm(self.k_proj(source).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        v = self.v_proj(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.output_proj(out.transpose(1, 2).flatten(2))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to (..., L, head_dim); ``cos``/``sin`` (L, head_dim), halves paired."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def rotary_table(config: TransformerConfig, t: int, h: int, w: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (t*h*w, head_dim) float32 of 3-D RoPE without fps modulation (method 0, fact 6)."""
    head = config.width // config.heads
    dim_hw = head // 6 * 2
    dims = (head - 2 * dim_hw, dim_hw, dim_hw)
    angles = []
    for axis, (dim, size, scale) in enumerate(zip(dims, (t, h, w), config.rope_scale, strict=True)):
        theta = 10000.0 * scale ** (dim / (dim - 2))
        frequency = theta ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
        angle = torch.outer(torch.arange(size, device=device, dtype=torch.float32), frequency)
        shape = [1, 1, 1, -1]
        shape[axis] = size
        angles.append(angle.view(shape).expand(t, h, w, -1))
    angle = torch.cat(angles * 2, dim=-1).reshape(t * h * w, head)
    return angle.cos(), angle.sin()


class MLP(nn.Module):
    """Two-layer perceptron with an exact GELU, no biases."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        self.layer1 = nn.Linear(width, int(width * ratio), bias=False)
        self.layer2 = nn.Linear(int(width * ratio), width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer2(F.gelu(self.layer1(x)))


def _adaln(width: int, rank: int, parts: int) -> nn.Sequential:
    """Low-rank AdaLN projection; index 0 is the activation so that the weights are named ``.1`` and ``.2``."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, rank, bias=False), nn.Linear(rank, parts * width, bias=False))


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm (B, T, HW, D) without affine, then per-frame shift and scale (B, T, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Block(nn.Module):
    """Self-attention, cross-attention and MLP, each with per-frame shift, scale and gate."""

    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.self_attn = Attention(c.width, c.heads)
        self.cross_attn = Attention(c.width, c.heads, c.text_width)
        self.mlp = MLP(c.width, c.mlp_ratio)
        self.adaln_modulation_self_attn = _adaln(c.width, c.adaln_rank, 3)
        self.adaln_modulation_cross_attn = _adaln(c.width, c.adaln_rank, 3)
        self.adaln_modulation_mlp = _adaln(c.width, c.adaln_rank, 3)

    def forward(self, x: torch.Tensor, embedded: torch.Tensor, shared: torch.Tensor, text: torch.Tensor,
                rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x (B, T, HW, D); embedded (B, T, D) and shared (B, T, 3D) from the timestep; text (B, L, text_width)."""
        frames = x.shape[1:3]
        for adaln, layer in (
            (self.adaln_modulation_self_attn, lambda y: self.self_attn(y.flatten(1, 2), rotary=rotary).unflatten(1, frames)),
            (self.adaln_modulation_cross_attn, lambda y: self.cross_attn(y.flatten(1, 2), context=text).unflatten(1, frames)),
            (self.adaln_modulation_mlp, self.mlp),
        ):
            shift, scale, gate = (adaln(embedded) + shared)[:, :, None].chunk(3, dim=-1)
            x = torch.addcmul(x, gate, layer(_modulate(x, shift, scale)))
        return x


class TimestepEmbedding(nn.Module):
    """MLP on the sinusoidal timestep features; its output is the shared AdaLN vector."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class PatchEmbed(nn.Module):
    """Non-overlapping spatial patches to tokens; ``proj.1`` is the public name of the linear layer."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Sequential(nn.Identity(), nn.Linear(channels * patch * patch, width, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, h, w) to (B, T, HW, width)."""
        b, c, t, h, w = x.shape
        p = self.patch
        x = x.view(b, c, t, h // p, p, w // p, p).permute(0, 2, 3, 5, 1, 4, 6)
        return self.proj(x.reshape(b, t, (h // p) * (w // p), c * p * p))


class FinalLayer(nn.Module):
    """Last modulation and the projection of tokens back to latent patches."""

    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.linear = nn.Linear(c.width, c.patch * c.patch * c.channels, bias=False)
        self.adaln_modulation = _adaln(c.width, c.adaln_rank, 2)

    def forward(self, x: torch.Tensor, embedded: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.adaln_modulation(embedded) + shared[..., : 2 * x.shape[-1]])[:, :, None].chunk(2, dim=-1)
        return self.linear(_modulate(x, shift, scale))


class Transformer(nn.Module):
    """The network: noisy latents and per-frame timesteps in, latents out. Knows nothing of sigma or sample types."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.channels + 2, config.patch, config.width)
        self.t_embedder = nn.Sequential(nn.Identity(), TimestepEmbedding(config.width))
        self.t_embedding_norm = RMSNorm(config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_layer = FinalLayer(config)

    def initialize(self, generator: torch.Generator) -> None:
        """Weights for training from scratch: Xavier linears, zeroed gates and output (AdaLN-zero)."""
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name == "final_layer.linear.weight" or ("adaln_modulation" in name and name.endswith(".2.weight")):
                    p.zero_()
                elif name == "t_embedder.1.linear_2.weight":
                    p.normal_(0, 0.02, generator=generator)
                elif p.ndim == 2:
                    bound = math.sqrt(6 / (p.shape[0] + p.shape[1]))
                    p.uniform_(-bound, bound, generator=generator)

    def forward(self, latents: torch.Tensor, clean: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """One evaluation.

        Args:
            latents: (B, C, T, h, w), clean frames already in place.
            clean: (B, T) 1 where a frame is given clean.
            timesteps: (B, T) in [0, 1), 0 on clean frames.
            text: (B, L, text_width) prompt embeddings.

        Returns (B, C, T, h, w).
        """
        c = self.config
        b, _, t, h, w = latents.shape
        if h % c.patch or w % c.patch:
            raise ConfigError(f"a latent grid of {h}x{w} does not divide into {c.patch}x{c.patch} patches")
        condition = clean[:, None, :, None, None].to(latents).expand(b, 1, t, h, w)
        padding = torch.zeros_like(condition)
        x = self.x_embedder(torch.cat((latents, condition, padding), dim=1).to(self.x_embedder.proj[1].weight.dtype))
        features = self._timestep_features(timesteps).to(x.dtype)
        shared = self.t_embedder(features)
        embedded = self.t_embedding_norm(features)
        grid = (h // c.patch, w // c.patch)
        rotary = rotary_table(c, t, *grid, latents.device)
        text = text.to(x.dtype)
        for block in self.blocks:
            x = block(x, embedded, shared, text, rotary)
        x = self.final_layer(x, embedded, shared)
        x = x.view(b, t, *grid, c.patch, c.patch, c.channels)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(b, c.channels, t, h, w)

    def _timestep_features(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Sinusoids (B, T, width) float32, cosines first."""
        if self.config.bf16_timestep:
            timesteps = timesteps.bfloat16()
        half = self.config.width // 2
        frequency = torch.exp(-math.log(10000) / half * torch.arange(half, device=timesteps.device, dtype=torch.float32))
        angle = timesteps.float()[..., None] * frequency
        return torch.cat((angle.cos(), angle.sin()), dim=-1)
