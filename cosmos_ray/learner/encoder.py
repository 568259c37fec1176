"""From a batch's frames to image latents: augmentation, the tokenizer, and the cache that spares most of its work."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import torch

from cosmos_ray.config import LearnerConfig
from cosmos_ray.learner.latents import LatentCache
from cosmos_ray.model import augmentation
from cosmos_ray.model.images import prepare
from cosmos_ray.model.policy import CosmosPolicy, TrainingBatch


class WindowEncoder:
    """Encodes the frames of training windows.

    ``mode`` "off" encodes every batch anew, each sample augmented afresh if the policy's spec says so. With a cache, a window is
    encoded once ("plain": as the policy will see it, never augmented) or once per variant ("augmented": each of ``variants``
    has its own parameters, fixed by window and number), and then only read.
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
            return self.policy.encode_images(augmentation.augment(frames, generator) if self.policy.spec.augmented else frames)
        numbers = torch.randint(self.variants, (len(images),), generator=generator).tolist() if self.variants else [0] * len(images)
        keys = [f"{window}#{number}" for window, number in zip(batch.windows, numbers, strict=True)]
        found, latents = self.cache.get(keys)
        if not found.all():
            missing = np.flatnonzero(~found)
            fresh = self.policy.encode_images(self._view(images[missing], [keys[i] for i in missing])).cpu().numpy()
            self.cache.put([keys[i] for i in missing], fresh)
            latents[missing] = fresh
        return torch.from_numpy(latents).to(self.policy.device).float()

    def flush(self) -> None:
        """Make what was encoded visible to other ranks and later runs, and take in what they encoded."""
        if self.cache is not None:
            self.cache.flush()
            self.cache.refresh()

    def _view(self, images: np.ndarray, keys: list[str]) -> torch.Tensor:
        """The frames as they are to be encoded for these cache keys."""
        if not self.variants:
            return self._frames(images, centre_crop=self.policy.spec.augmented)
        parameters = augmentation.draw_seeded([zlib.crc32(key.encode()) for key in keys])
        return augmentation.apply(self._frames(images, centre_crop=False), parameters)

    def _frames(self, images: np.ndarray, centre_crop: bool) -> torch.Tensor:
        """Stored frames through the policy's image pipeline, JPEG and all, on its device."""
        spec = self.policy.spec
        if spec.jpeg or centre_crop:
            images = prepare(images, spec.image_size, spec.jpeg, centre_crop)
        return torch.as_tensor(images, device=self.policy.device)


def open_latents(policy: CosmosPolicy, config: LearnerConfig, chunk: int, folder: str) -> LatentCache | None:
    """The cache for this policy's tokenizer, chunk length and view of the frames; None where the config wants none.

    What is cached is rounded to float16, also the first time it is used.
    """
    if config.latent_cache == "off":
        return None
    spec = policy.spec
    view = (spec.image_size, spec.jpeg, spec.cameras, chunk, config.latent_cache, augmentation.RANGES if spec.augmented else None)
    kind = hashlib.sha256(repr(view).encode())
    for name, tensor in policy.tokenizer.state_dict().items():
        kind.update(name.encode())
        kind.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    channels, height, width = spec.frame_shape
    return LatentCache(folder, kind.hexdigest()[:16], (channels, 2 * len(spec.cameras), height, width),
                       int(config.latent_cache_gb * 1e9))
