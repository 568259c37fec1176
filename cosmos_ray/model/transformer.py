"""The diffusion transformer of Cosmos-Predict2 (method 5.1), at any size.

Module names give the public checkpoint's parameter names (after its ``net.`` prefix), so a 2B state dict loads as it is.

What does not depend on the latents is computed apart, so that a sampler computes it once: AdaLN modulation from the
timesteps, one row per latent frame broadcast over the frame's tokens (:meth:`Transformer.modulate`), and the text's keys and
values (:meth:`Transformer.attend_to`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cosmos_ray.errors import ConfigError
from cosmos_ray.model.prompts import Prompts


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
    one_way: bool = False  #: given frames attend to given frames alone, and no frame attends to a hidden one

    def __post_init__(self):
        if self.width % self.heads:
            raise ConfigError(f"model width {self.width} does not divide by {self.heads} heads")
        if self.width // self.heads < 12 or (self.width // self.heads) % 2:
            raise ConfigError(f"head dimension {self.width // self.heads} is too small for 3-D RoPE: it must be even and at least 12")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def diffusers_dimensions(self) -> dict:
        """As ``model.exchange.diffusers_config`` takes them; ConfigError for a network that diffusers cannot hold."""
        if self.one_way:
            raise ConfigError("diffusers' class has no one-way attention: only networks of model.attention = 'full' can be exchanged")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("bf16_timestep", "one_way")}

    def flops(self, frames: int, height: int, width: int, text_length: int, kept: bool = False) -> float:
        """Twice the multiply-adds of one evaluation of one sample on a latent grid; ``kept`` leaves out text keys and modulation."""
        d, tokens = self.width, frames * (height // self.patch) * (width // self.patch)
        patch = self.channels * self.patch**2
        per_token = self.layers * (6 * d * d + 2 * int(self.mlp_ratio * d) * d) + (patch + 2 * self.patch**2) * d + d * patch
        attention = self.layers * 2 * tokens * d * (tokens + text_length)
        text = self.layers * 2 * text_length * self.text_width * d
        adaln = frames * ((3 * self.layers + 1) * d * self.adaln_rank + (9 * self.layers + 2) * self.adaln_rank * d + 4 * d * d)
        return 2.0 * (tokens * per_token + attention + (0 if kept else text + adaln))


Keys = tuple[torch.Tensor, torch.Tensor]  #: keys, rotated, and values of one block's self-attention, (B, heads, L, head_dim) each


@dataclass(frozen=True)
class Modulation:
    """AdaLN of one timestep pattern: per block (shift, 1 + scale, gate) of its three layers, and the final layer's (shift, 1 + scale)."""

    blocks: tuple[tuple[tuple[torch.Tensor, ...], ...], ...]  #: each (B or 1, T, 1, width)
    final: tuple[torch.Tensor, ...]


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

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, width) to (B, heads, L, head_dim)."""
        return self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)

    def keys(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, heads, L, head_dim) of (B, L, context_width)."""
        key = self.k_norm(self.k_proj(x).unflatten(-1, (self.heads, -1)))
        return key.transpose(1, 2), self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """(B, heads, L, head_dim) queries to (B, L, width)."""
        return self.output_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to (..., L, head_dim), halves paired; ``sin`` has its first half negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def rotary_table(config: TransformerConfig, t: int, h: int, w: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) for :func:`rotate`, (t*h*w, head_dim) float32, of 3-D RoPE without fps modulation (method 0, fact 6)."""
    head = config.head_dim
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
    angle = torch.cat(angles, dim=-1).reshape(t * h * w, head // 2)
    sin = angle.sin()
    return torch.cat((angle.cos(),) * 2, dim=-1), torch.cat((-sin, sin), dim=-1)


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


def _normed(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm (B, T, HW, D) without affine, then per-frame shift and (1 +) scale (B, T, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale)


def _split(modulation: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    """(B, T, parts * D) to (shift, 1 + scale[, gate]), each (B, T, 1, D)."""
    shift, scale, *gate = modulation[:, :, None].chunk(parts, dim=-1)
    return (shift, 1 + scale, *gate)


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

    def modulate(self, embedded: torch.Tensor, shared: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], ...]:
        """(shift, 1 + scale, gate) of each layer from the timestep: embedded (B, T, D), shared (B, T, 3D)."""
        layers = (self.adaln_modulation_self_attn, self.adaln_modulation_cross_attn, self.adaln_modulation_mlp)
        return tuple(_split(adaln(embedded) + shared, 3) for adaln in layers)

    def forward(self, x: torch.Tensor, modulation: tuple[tuple[torch.Tensor, ...], ...], rotary: tuple[torch.Tensor, torch.Tensor],
                text: tuple[torch.Tensor, torch.Tensor], bias: torch.Tensor | None, visible: torch.Tensor | None = None,
                given: Keys | None = None) -> tuple[torch.Tensor, Keys]:
        """(the block's output, keys and values of these frames).

        x (B, T, HW, D); text keys and values (B, heads, L, head_dim) with their logit bias (B, 1, 1, L); ``visible`` (B, 1, L, L) bool says
        which token attends to which; ``given`` are keys and values of further frames, which all of these attend to.
        """
        frames = x.shape[1:3]
        (shift, scale, gate), (cross_shift, cross_scale, cross_gate), (mlp_shift, mlp_scale, mlp_gate) = modulation
        y = _normed(x, shift, scale).flatten(1, 2)
        k, v = self.self_attn.keys(y)
        k = rotate(k, *rotary)
        seen = (k, v) if given is None else (torch.cat((given[0], k), 2), torch.cat((given[1], v), 2))
        y = self.self_attn.attend(rotate(self.self_attn.queries(y), *rotary), *seen, visible)
        x = torch.addcmul(x, gate, y.unflatten(1, frames))
        y = self.cross_attn.queries(_normed(x, cross_shift, cross_scale).flatten(1, 2))
        x = torch.addcmul(x, cross_gate, self.cross_attn.attend(y, *text, bias).unflatten(1, frames))
        return torch.addcmul(x, mlp_gate, self.mlp(_normed(x, mlp_shift, mlp_scale))), (k, v)


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

    @property
    def dtype(self) -> torch.dtype:
        layer = self.proj[1]
        assert isinstance(layer, nn.Linear)
        return layer.weight.dtype

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

    def modulate(self, embedded: torch.Tensor, shared: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _split(self.adaln_modulation(embedded) + shared[..., : 2 * embedded.shape[-1]], 2)

    def forward(self, x: torch.Tensor, modulation: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.linear(_normed(x, *modulation))


def _visible(clean: torch.Tensor, hidden: torch.Tensor, area: int) -> torch.Tensor:
    """(B or 1, 1, L, L) bool, of L = T * ``area`` tokens: given frames see given ones, the others all but hidden ones."""
    clean, hidden = clean > 0, hidden > 0
    seen = clean[:, None] | ~(clean[:, :, None] | hidden[:, None])
    return seen.repeat_interleave(area, 1).repeat_interleave(area, 2)[:, None]


class Transformer(nn.Module):
    """The network: noisy latents and per-frame timesteps in, latents out. Knows nothing of sigma or sample types."""

    blocks: Sequence[Block]  #: an ``nn.ModuleList``

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  #: recompute the blocks in the backward pass instead of keeping their activations
        self.x_embedder = PatchEmbed(config.channels + 2, config.patch, config.width)
        self.t_embedder = nn.Sequential(nn.Identity(), TimestepEmbedding(config.width))
        self.t_embedding_norm = RMSNorm(config.width)
        self.blocks = cast(Sequence[Block], nn.ModuleList(Block(config) for _ in range(config.layers)))
        self.final_layer = FinalLayer(config)
        self._rotary: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

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

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and the arithmetic."""
        return self.x_embedder.dtype

    def modulate(self, timesteps: torch.Tensor) -> Modulation:
        """AdaLN of every layer from (B or 1, T) timesteps. Valid until the weights change."""
        features = self._timestep_features(timesteps).to(self.dtype)
        shared = self.t_embedder(features)
        embedded = self.t_embedding_norm(features)
        return Modulation(tuple(block.modulate(embedded, shared) for block in self.blocks), self.final_layer.modulate(embedded, shared))

    def attend_to(self, prompts: Prompts) -> Prompts:
        """``prompts`` with the keys and values of every block. Valid until the weights change."""
        tokens = prompts.tokens.to(self.dtype)
        bias = None if prompts.bias is None else prompts.bias.to(self.dtype)
        return dataclasses.replace(prompts, bias=bias, keys=tuple(block.cross_attn.keys(tokens) for block in self.blocks))

    def forward(self, latents: torch.Tensor, clean: torch.Tensor, timesteps: torch.Tensor, text: Prompts,
                modulation: Modulation | None = None, hidden: torch.Tensor | None = None, frames: tuple[int, ...] | None = None,
                given: tuple[Keys, ...] | None = None) -> torch.Tensor:
        """One evaluation.

        Args:
            latents: (B, C, T, h, w), clean frames already in place.
            clean: (B or 1, T) 1 where a frame is given clean.
            timesteps: (B or 1, T) in [0, 1), 0 on clean frames.
            text: B rows of prompts, with or without their keys.
            modulation: :meth:`modulate` of ``timesteps``, if it is known already.
            hidden: (B or 1, T) 1 where no other frame sees a frame; only for a network that is ``one_way``.
            frames: which frames of the sequence these are; by default the first T.
            given: what :meth:`read` made of the given frames; then ``latents`` has the frames that are not.

        Returns (B, C, T, h, w).
        """
        c = self.config
        b, _, t, h, w = latents.shape
        x, rotary, text, bias = self._embedded(latents, clean, text, frames)
        modulation = modulation or self.modulate(timesteps)
        visible = None if hidden is None or not c.one_way else _visible(clean, hidden, x.shape[2])
        before = given or (None,) * c.layers
        for block, layers, (key, value), seen in zip(self.blocks, modulation.blocks, text.keys or (), before, strict=True):
            inputs = (x, layers, rotary, (text.of_rows(key), text.of_rows(value)), bias, visible, seen)
            x, _ = checkpoint(block, *inputs, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else block(*inputs)
        x = self.final_layer(x, modulation.final)
        x = x.view(b, t, h // c.patch, w // c.patch, c.patch, c.patch, c.channels)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(b, c.channels, t, h, w)

    def read(self, latents: torch.Tensor, frames: tuple[int, ...], text: Prompts, modulation: Modulation) -> tuple[Keys, ...]:
        """Keys and values of every block for clean frames (B, C, T, h, w), which attend to each other alone.

        ``frames`` are their places in the sequence; ``modulation`` is that of timestep 0.
        """
        x, rotary, text, bias = self._embedded(latents, latents.new_ones(1, len(frames)), text, frames)
        keys = []
        for block, layers, (key, value) in zip(self.blocks, modulation.blocks, text.keys or (), strict=True):
            x, kept = block(x, layers, rotary, (text.of_rows(key), text.of_rows(value)), bias)
            keys.append(kept)
        return tuple(keys)

    def _embedded(self, latents: torch.Tensor, clean: torch.Tensor, text: Prompts,
                  frames: tuple[int, ...] | None) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], Prompts, torch.Tensor | None]:
        """(tokens (B, T, HW, width), rotary table, prompts with keys, bias of their rows); ConfigError for a grid of no whole patches."""
        c = self.config
        b, _, t, h, w = latents.shape
        if h % c.patch or w % c.patch:
            raise ConfigError(f"a latent grid of {h}x{w} does not divide into {c.patch}x{c.patch} patches")
        condition = clean[:, None, :, None, None].to(latents).expand(b, 1, t, h, w)
        x = self.x_embedder(torch.cat((latents, condition, torch.zeros_like(condition)), dim=1).to(self.dtype))
        text = text if text.keys is not None else self.attend_to(text)
        rotary = self._rotary_table(frames or tuple(range(t)), h // c.patch, w // c.patch, latents.device)
        return x, rotary, text, None if text.bias is None else text.of_rows(text.bias)

    def _rotary_table(self, frames: tuple[int, ...], h: int, w: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """:func:`rotary_table` of these frames, kept per grid."""
        key = (frames, h, w, device)
        table = self._rotary.get(key)
        if table is None:
            cos, sin = (part.unflatten(0, (-1, h * w))[list(frames)].flatten(0, 1)
                        for part in rotary_table(self.config, max(frames) + 1, h, w, device))
            table = cos, sin
            if not torch.compiler.is_compiling():  # a traced tensor must not outlive its trace
                self._rotary[key] = table
        return table

    def _timestep_features(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Sinusoids (B, T, width) float32, cosines first."""
        if self.config.bf16_timestep:
            timesteps = timesteps.bfloat16()
        half = self.config.width // 2
        frequency = torch.exp(-math.log(10000) / half * torch.arange(half, device=timesteps.device, dtype=torch.float32))
        angle = timesteps.float()[..., None] * frequency
        return torch.cat((angle.cos(), angle.sin()), dim=-1)
