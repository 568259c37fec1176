"""Latent frames of a policy: observations and vectors into frames, and generated frames back (method section 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cosmos_ray.errors import ConfigError
from cosmos_ray.model.images import prepare
from cosmos_ray.model.injection import Normalizer, extract, extract_value, inject, inject_value
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.training_batch import TrainingBatch

# ---------------------------------------------------------------- into latents


def current_latents(policy: CosmosPolicy, images: np.ndarray | Sequence[np.ndarray], proprio: np.ndarray) -> torch.Tensor:
    """Latents (B, C, T, h, w) float32 that hold the blank frame and the state s; the other frames are zero.

    Only the clean prefix is encoded: the tokenizers are causal.

    Args:
        images: (B, cameras, H, W, 3) uint8 of any size, resized to the spec's ``image_size``; or (B, H, W, 3) of each camera, where sizes
            may differ.
        proprio: (B, p) float32, physical units.

    ConfigError when images or proprioception do not fit the model.
    """
    layout = policy.layout
    images = _viewed(policy, images)
    _check(policy, images, proprio)
    prefix = policy.tokenizer.encode(torch.as_tensor(images, device=policy.device), layout.images, layout.action)
    latents = prefix.new_zeros(*prefix.shape[:2], layout.frames, *prefix.shape[3:])
    latents[:, :, : layout.action] = prefix
    latents[:, :, layout.proprio] = _vector_frame(policy, policy.proprio_scale, proprio)
    return latents


def encode_images(policy: CosmosPolicy, images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Latents (B, C, 2 * cameras, h, w) float32 of whole windows: (B, 2 * cameras, H, H, 3) uint8, current images before future ones.

    H is the spec's ``image_size``: ``images.prepare`` makes it so.
    """
    slots = policy.layout.images + policy.layout.future_images
    return policy.tokenizer.encode(torch.as_tensor(images, device=policy.device), slots, policy.layout.value)[:, :, list(slots)]


def training_latents(policy: CosmosPolicy, batch: TrainingBatch, encoded: torch.Tensor | None = None) -> torch.Tensor:
    """Ground-truth latents (B, C, T, h, w) float32 of a batch, its frames as the acting policy sees them.

    ``encoded`` is the result of :func:`encode_images`, if it is known. ConfigError when the batch does not fit the model.
    """
    layout, shape = policy.layout, policy.spec.frame_shape
    if encoded is None:
        images, future_images = _viewed(policy, batch.images), _viewed(policy, batch.future_images)
        _check(policy, images, batch.proprio)
        encoded = encode_images(policy, np.concatenate((images, future_images), axis=1))
    latents = encoded.new_empty(len(encoded), shape[0], layout.frames, *shape[1:])
    latents[:, :, 0] = policy.tokenizer.blank(policy.spec.image_size)
    latents[:, :, list(layout.images + layout.future_images)] = encoded
    latents[:, :, layout.proprio] = _vector_frame(policy, policy.proprio_scale, batch.proprio)
    latents[:, :, layout.future_proprio] = _vector_frame(policy, policy.proprio_scale, batch.future_proprio)
    latents[:, :, layout.action] = action_frame(policy, batch.actions)
    latents[:, :, layout.value] = inject_value(torch.as_tensor(batch.value, device=policy.device).float(), shape)
    return latents


def action_frame(policy: CosmosPolicy, actions: np.ndarray | torch.Tensor) -> torch.Tensor:
    """The (B, C, h, w) float32 ACTION frame of (B, K, d) chunks in physical units."""
    actions = torch.as_tensor(actions, device=policy.device).float()
    return inject(policy.actions_scale.normalize(actions).flatten(1), policy.spec.frame_shape)


# ---------------------------------------------------------------- out of latents


def read_actions(policy: CosmosPolicy, latents: torch.Tensor) -> torch.Tensor:
    """(B, K, d) float32 chunks in physical units."""
    spec = policy.spec
    flat = extract(latents[:, :, policy.layout.action], spec.chunk * spec.action_dim)
    return policy.actions_scale.restore(flat.view(-1, spec.chunk, spec.action_dim))


def read_value(policy: CosmosPolicy, latents: torch.Tensor) -> torch.Tensor:
    """(B,) float32 values in [-1, 1]."""
    return extract_value(latents[:, :, policy.layout.value])


def read_future_proprio(policy: CosmosPolicy, latents: torch.Tensor) -> torch.Tensor:
    """(B, p) float32 proprioception in physical units."""
    return policy.proprio_scale.restore(extract(latents[:, :, policy.layout.future_proprio], policy.spec.proprio_dim))


def next_state(policy: CosmosPolicy, latents: torch.Tensor) -> torch.Tensor:
    """Latents as of :func:`current_latents`, in the state s' that ``latents`` (B, C, T, h, w) have as their future.

    The proprioception is the generated one, averaged and tiled as in training. The images stay latents: nothing is decoded.
    """
    layout, state = policy.layout, torch.zeros_like(latents)
    state[:, :, 0] = latents[:, :, 0]
    state[:, :, list(layout.images)] = latents[:, :, list(layout.future_images)]
    state[:, :, layout.proprio] = _vector_frame(policy, policy.proprio_scale, read_future_proprio(policy, latents))
    return state


def read_future_images(policy: CosmosPolicy, latents: torch.Tensor, images: np.ndarray | Sequence[np.ndarray]) -> torch.Tensor:
    """(B, cameras, H, W, 3) uint8 predicted images; ``images`` are the current ones, as for :func:`current_latents`.

    The decoder is causal, so frames that hold vectors would disturb the images behind them. They are replaced by the latents of blank
    images, encoded behind the current images (method 1.4).
    """
    layout = policy.layout
    shown = torch.as_tensor(_viewed(policy, images), device=policy.device)
    blank = policy.tokenizer.encode(shown, layout.images, layout.future_images[0])
    latents = latents.clone()
    for slot in (layout.proprio, layout.action, layout.future_proprio):
        latents[:, :, slot] = blank[:, :, slot]
    return policy.tokenizer.decode(latents, layout.future_images)


def renormalized(latents: torch.Tensor, source: CosmosPolicy, target: CosmosPolicy) -> torch.Tensor:
    """``latents`` (B, C, T, h, w) of ``source`` as ``target`` has to see them: every vector in the normalisation of ``target``.

    The same tensor where both normalise alike, else a copy. The two need the same layout and tokenizer.
    """
    scales = [(source.actions_scale, target.actions_scale), (source.proprio_scale, target.proprio_scale)]
    if all(torch.equal(a.low, b.low) and torch.equal(a.high, b.high) for a, b in scales):
        return latents
    layout, latents = target.layout, latents.clone()
    latents[:, :, layout.action] = action_frame(target, read_actions(source, latents))
    for frame in (layout.proprio, layout.future_proprio):
        vector = source.proprio_scale.restore(extract(latents[:, :, frame], source.spec.proprio_dim))
        latents[:, :, frame] = _vector_frame(target, target.proprio_scale, vector)
    return latents


# ---------------------------------------------------------------- helpers


def _viewed(policy: CosmosPolicy, images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """Images (B, cameras, H, H, 3) as the acting policy sees them."""
    if not isinstance(images, np.ndarray):
        return np.concatenate([_viewed(policy, camera[:, None]) for camera in images], axis=1)
    return prepare(images, policy.spec.image_size, policy.spec.jpeg, policy.spec.augmented, policy.spec.resize)


def _vector_frame(policy: CosmosPolicy, scale: Normalizer, vector: np.ndarray | torch.Tensor) -> torch.Tensor:
    return inject(scale.normalize(torch.as_tensor(vector, device=policy.device).float()), policy.spec.frame_shape)


def _check(policy: CosmosPolicy, images: np.ndarray, proprio: np.ndarray) -> None:
    spec = policy.spec
    expected = (len(spec.cameras), spec.image_size, spec.image_size, 3)
    if tuple(images.shape[1:]) != expected:
        raise ConfigError(f"images {tuple(images.shape[1:])} do not fit the model: it takes {expected} ({', '.join(spec.cameras)})")
    if proprio.shape[1] != spec.proprio_dim:
        raise ConfigError(f"proprioception of {proprio.shape[1]} numbers does not fit the model: it takes {spec.proprio_dim}")
