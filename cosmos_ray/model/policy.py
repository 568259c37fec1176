"""Cosmos Policy: one network as policy, world model and value function (paper section 3, method 1 and 2). Pure torch.

:class:`CosmosPolicy` holds what a checkpoint holds: network, tokenizer, text encoder and normalisation. The modules beside this one work
with a policy:

- ``latents`` turns observations into latent frames, and generated frames back into actions, values and images;
- ``denoising`` evaluates the network once;
- ``sampling`` acts, imagines and evaluates: the same sampler with different frames given;
- ``objective`` is the training loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from cosmos_ray.errors import ConfigError
from cosmos_ray.model.given import Given
from cosmos_ray.model.injection import Normalizer
from cosmos_ray.model.prompts import Prompts, make_prompts
from cosmos_ray.model.sample_types import SampleType, clean_frames, mask_table, target_frames
from cosmos_ray.model.serving_cache import PROMPTS_KEPT, ServingCache
from cosmos_ray.model.spec import PolicySpec
from cosmos_ray.model.text import HashText, T5Text
from cosmos_ray.model.tokenizer import PatchPCA, WanTokenizer
from cosmos_ray.model.transformer import Transformer


class AcceleratedSampler(Protocol):
    """A faster stand-in for ``sampling.sample``."""

    how: str  #: the setting ``inference.accelerate``

    def forget(self) -> None:
        """Drop everything that depends on the weights."""

    def __call__(self, policy: CosmosPolicy, given: Given, noise: torch.Tensor, steps: int) -> torch.Tensor: ...


class Watch(Protocol):
    """Is asked before every network evaluation of the sampler; see ``CosmosPolicy.watch``."""

    def __call__(self, sample_type: SampleType, rows: int, predicted: torch.Tensor | None) -> bool:
        """Whether the sampler of ``rows`` samples ends with what it has ``predicted`` so far, which is None before the first evaluation.
        May raise to give the samples up."""


class CosmosPolicy(nn.Module):
    """Network, tokenizer, text and normalisation of one policy. Build a policy with :func:`build`, or load one from a checkpoint."""

    tokenizer: PatchPCA | WanTokenizer
    net: Transformer
    clean: torch.Tensor  #: (5, T) float32: 1 where a sample type gives the frame clean
    hidden: torch.Tensor  #: (5, T) float32: 1 where a frame is neither given nor a target
    action_low: torch.Tensor  #: (d,) float32, as all four ranges: physical units
    action_high: torch.Tensor
    proprio_low: torch.Tensor  #: (p,) float32
    proprio_high: torch.Tensor

    def __init__(self, spec: PolicySpec, tokenizer: PatchPCA | WanTokenizer, text: Callable[[str], torch.Tensor], net_device: str = "cpu"):
        super().__init__()
        self.spec, self.layout, self.text = spec, spec.layout, text
        with torch.device(net_device):
            self.net = Transformer(spec.transformer)
        self.tokenizer = tokenizer
        for name, size in (("action", spec.action_dim), ("proprio", spec.proprio_dim)):
            self.register_buffer(f"{name}_low", torch.full((size,), -1.0))
            self.register_buffer(f"{name}_high", torch.ones(size))
        self.register_buffer("clean", mask_table(self.layout, clean_frames), persistent=False)
        self.register_buffer("hidden", 1 - self.clean - mask_table(self.layout, target_frames), persistent=False)
        self.reference_steps = False  #: two sampler steps make one network evaluation, as in the public code (method 2.6)
        self.accelerated: AcceleratedSampler | None = None  #: see ``model.speed.accelerate``
        self.watch: Watch | None = None  #: has an eye on the clock while a planner has a deadline
        self.cache: ServingCache | None = None  #: None while the policy trains

    def serve(self) -> None:
        """Keep prompts and modulations from call to call. Call again after every change of the weights."""
        self.cache = ServingCache()
        if self.accelerated is not None:
            self.accelerated.forget()

    def place(self, device: str, dtype: torch.dtype) -> CosmosPolicy:
        """Move everything to ``device``. The network computes in ``dtype``, and so does a VAE on a GPU."""
        self.to(device)
        self.net.to(dtype)
        if isinstance(self.tokenizer, WanTokenizer) and device != "cpu":
            self.tokenizer.vae.to(dtype)
        return self

    def set_statistics(self, action_low: np.ndarray, action_high: np.ndarray, proprio_low: np.ndarray, proprio_high: np.ndarray) -> None:
        """Fix the min/max normalisation: arrays (d,) and (p,) in physical units."""
        for name, value in (("action_low", action_low), ("action_high", action_high),
                            ("proprio_low", proprio_low), ("proprio_high", proprio_high)):
            getattr(self, name).copy_(torch.as_tensor(value))

    @property
    def actions_scale(self) -> Normalizer:
        return Normalizer(self.action_low, self.action_high)

    @property
    def proprio_scale(self) -> Normalizer:
        return Normalizer(self.proprio_low, self.proprio_high)

    @property
    def device(self) -> torch.device:
        return self.action_low.device

    def embed(self, instructions: Sequence[str]) -> Prompts:
        """One row of :class:`Prompts` per instruction. A serving policy computes keys and values once per instruction."""
        if self.cache is None:
            known = {instruction: i for i, instruction in enumerate(sorted(set(instructions)))}
            prompts = make_prompts([self.text(i) for i in known], self.device)
        else:
            known, prompts = self._kept_prompts(instructions, self.cache)
        return dataclasses.replace(prompts, rows=torch.tensor([known[i] for i in instructions], device=self.device))

    def _kept_prompts(self, instructions: Sequence[str], cache: ServingCache) -> tuple[dict[str, int], Prompts]:
        """(row of each known instruction, prompts with keys and values). Adds new instructions to ``cache``."""
        if cache.prompts is None or not cache.instructions.keys() >= set(instructions):
            earlier = cache.instructions if len(cache.instructions) < PROMPTS_KEPT else ()
            cache.instructions = {instruction: i for i, instruction in enumerate(dict.fromkeys([*earlier, *instructions]))}
            with torch.no_grad():
                cache.prompts = self.net.attend_to(make_prompts([self.text(i) for i in cache.instructions], self.device))
        return cache.instructions, cache.prompts


def build(spec: PolicySpec, seed: int | None = 0, embeddings: dict[str, torch.Tensor] | None = None) -> CosmosPolicy:
    """A policy with fresh weights. The tokenizer of ``tiny`` has yet to be fitted; the tokenizer of the 2B preset is loaded.

    ``seed`` None leaves the network without memory, for weights that are about to be loaded. ``embeddings`` are text embeddings that are
    known already. ConfigError when a 2B spec names no tokenizer or no text.
    """
    tokenizer: PatchPCA | WanTokenizer
    text: HashText | T5Text
    if spec.preset == "tiny":
        tokenizer, text = PatchPCA(), HashText(spec.text_tokens, spec.transformer.text_width)
    else:
        if not spec.tokenizer_path or not (spec.text_path or embeddings):
            raise ConfigError(f"preset {spec.preset} needs model.tokenizer_path (Wan 2.1 VAE directory) and model.text_path (T5)")
        tokenizer = WanTokenizer.load(spec.tokenizer_path)
        text = T5Text(spec.text_path, spec.text_tokens, spec.transformer.text_width, embeddings)
    policy = CosmosPolicy(spec, tokenizer, text, "meta" if seed is None else "cpu")
    if seed is not None:
        policy.net.initialize(torch.Generator().manual_seed(seed))
    return policy
