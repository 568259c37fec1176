"""From the images of a batch to image latents: augmentation, the tokenizer, and the cache that saves most of the encoding."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np
import torch

from cosmos_ray.config import LearnerConfig
from cosmos_ray.learner.latent_cache import LatentCache
from cosmos_ray.model import augmentation
from cosmos_ray.model.images import prepare
from cosmos_ray.model.latents import encode_images
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.training_batch import TrainingBatch


class WindowEncoder:
    """Encodes the images of training windows.

    ``mode`` "off" encodes every batch anew, and augments every sample afresh where the policy's spec says so. With a cache, every window is
    encoded once and then read. "plain" encodes a window as the acting policy sees it, without augmentation. "augmented" encodes
    ``variants`` versions of a window; window and version number fix the augmentation.
    """

    def __init__(self, policy: CosmosPolicy, mode: str, variants: int, cache: LatentCache | None):
        self.policy, self.cache = policy, cache
        self.variants = variants if mode == "augmented" and policy.spec.augmented else 0

    @torch.no_grad()
    def encode(self, batch: TrainingBatch, generator: torch.Generator) -> torch.Tensor:
        """(B, C, 2 * cameras, h, w) float32 latents of the batch's frames, on the policy's device."""
        images = np.concatenate((batch.images, batch.future_images), axis=1)
        if self.cache is None:
            frames = self._frames(images, centre_crop=False)
            if self.policy.spec.augmented:
                frames = augmentation.augment(frames, generator, self.policy.spec.augmentation)
            return encode_images(self.policy, frames)
        numbers = torch.randint(self.variants, (len(images),), generator=generator).tolist() if self.variants else [0] * len(images)
        keys = [f"{window}#{number}" for window, number in zip(batch.windows, numbers, strict=True)]
        found, latents = self.cache.get(keys)
        if not found.all():
            missing = np.flatnonzero(~found)
            fresh = encode_images(self.policy, self._view(images[missing], [keys[i] for i in missing])).cpu().numpy()
            self.cache.put([keys[i] for i in missing], fresh)
            latents[missing] = fresh
        return torch.from_numpy(latents).to(self.policy.device).float()

    def flush(self) -> None:
        """Write new latents for other ranks and later runs, and take in theirs."""
        if self.cache is not None:
            self.cache.flush()
            self.cache.refresh()

    def _view(self, images: np.ndarray, keys: list[str]) -> torch.Tensor:
        """The images that belong to these cache keys, augmented."""
        if not self.variants:
            return self._frames(images, centre_crop=self.policy.spec.augmented)
        parameters = augmentation.draw_seeded([zlib.crc32(key.encode()) for key in keys])
        return augmentation.apply(self._frames(images, centre_crop=False), parameters, self.policy.spec.augmentation)

    def _frames(self, images: np.ndarray, centre_crop: bool) -> torch.Tensor:
        """Stored images after the policy's image pipeline, on the policy's device."""
        spec = self.policy.spec
        return torch.as_tensor(prepare(images, spec.image_size, spec.jpeg, centre_crop, spec.resize), device=self.policy.device)


def open_latents(policy: CosmosPolicy, config: LearnerConfig, chunk: int, folder: str) -> LatentCache | None:
    """The cache for this policy's tokenizer, image pipeline and chunk length; None where the config has none.

    Latents are rounded to float16, at their first use as well.
    """
    if config.latent_cache == "off":
        return None
    spec = policy.spec
    ranges = augmentation.RANGES if spec.augmented else None
    view: tuple[Any, ...] = (spec.image_size, spec.jpeg, spec.cameras, chunk, config.latent_cache, ranges)
    if (made := (spec.resize, spec.augmentation)) != ("bilinear", "smooth"):  # the caches of these two keep their names
        view += made
    digest = hashlib.sha256(repr(view).encode())
    for name, tensor in policy.tokenizer.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    channels, height, width = spec.frame_shape
    return LatentCache(folder, digest.hexdigest()[:16], (channels, 2 * len(spec.cameras), height, width),
                       int(config.latent_cache_gb * 1e9))
