"""Images to latent frames and back.

:class:`PatchPCA` is the laptop's: a linear map of 8x8 patches fitted in closed form. :class:`WanTokenizer` is the released
model's VAE. Both map slot images to the same ``(B, 16, frames, H/8, W/8)`` latents, so the rest of the model cannot tell.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cosmos_ray import released
from cosmos_ray.errors import CheckpointError, ConfigError
from cosmos_ray.model.exchange.files import reason
from cosmos_ray.model.exchange.wan_vae import read_wan_vae

PATCH = 8  #: pixels per latent cell, the Wan VAE's spatial compression
CHANNELS = 16  #: latent channels
ROWS = 8  #: windows that go through the VAE at once, to bound its memory


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to float32 in [-1, 1], as the method scales them."""
    return images.float() / 127.5 - 1


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Floats in [-1, 1] to uint8 pixels, rounded and clamped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class PatchPCA(nn.Module):
    """Principal components of 8x8x3 patches, half-whitened so that the leading channels have about unit variance.

    Linear, so encoding costs next to nothing and fitting has a closed form. Sixteen components keep the gist of a 64-pixel
    frame (about 96 % of the variance of robosuite's Lift), not its fine print.
    """

    mean: torch.Tensor  #: (192,) float32
    encoder: torch.Tensor  #: (192, 16) float32
    decoder: torch.Tensor  #: (16, 192) float32

    def __init__(self):
        super().__init__()
        size = PATCH * PATCH * 3
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("encoder", torch.zeros(size, CHANNELS))
        self.register_buffer("decoder", torch.zeros(CHANNELS, size))

    @torch.no_grad()
    def fit(self, images: torch.Tensor) -> float:
        """Fit to (N, H, W, 3) uint8 images; returns the share of patch variance kept."""
        patches = _patches(to_unit(images)).reshape(-1, PATCH * PATCH * 3).double()
        mean = patches.mean(0)
        centred = patches - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        values, vectors = values.flip(0)[:CHANNELS].clamp_min(1e-8), vectors.flip(1)[:, :CHANNELS]
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # one sign, whatever LAPACK chose
        spread = values.sqrt()
        scale = (spread * spread[0]).sqrt()
        self.mean.copy_(mean)
        self.encoder.copy_(vectors / scale)
        self.decoder.copy_((vectors * scale).T)
        return float(values.sum() / centred.square().mean(0).sum().clamp_min(1e-8))

    def encode(self, images: torch.Tensor, slots: tuple[int, ...], frames: int) -> torch.Tensor:
        """Latents of the first ``frames`` slots, ``images[:, i]`` in slot ``slots[i]`` and black in the others.

        Args: images (B, n, H, W, 3) uint8. Returns (B, 16, frames, H/8, W/8) float32.
        """
        b, n, height, width, _ = images.shape
        latents = (_patches(to_unit(images.flatten(0, 1))) - self.mean) @ self.encoder
        latents = latents.view(b, n, height // PATCH, width // PATCH, CHANNELS).permute(0, 4, 1, 2, 3)
        out = self._black().view(1, CHANNELS, 1, 1, 1).repeat(b, 1, frames, height // PATCH, width // PATCH)
        out[:, :, list(slots)] = latents
        return out

    def blank(self, size: int) -> torch.Tensor:
        """(16, size/8, size/8) latent of the black frame in slot 0."""
        return self._black().view(CHANNELS, 1, 1).expand(CHANNELS, size // PATCH, size // PATCH)

    def _black(self) -> torch.Tensor:
        return (-1 - self.mean) @ self.encoder

    def decode(self, latents: torch.Tensor, slots: tuple[int, ...]) -> torch.Tensor:
        """(B, 16, T, h, w) latents to the (B, len(slots), 8h, 8w, 3) uint8 images of some slots."""
        b, _, _, h, w = latents.shape
        cells = latents[:, :, list(slots)].permute(0, 2, 3, 4, 1).float()
        patches = cells @ self.decoder + self.mean
        images = patches.view(b, len(slots), h, w, PATCH, PATCH, 3).permute(0, 1, 2, 4, 3, 5, 6)
        return to_pixels(images.reshape(b, len(slots), h * PATCH, w * PATCH, 3))


def _patches(images: torch.Tensor) -> torch.Tensor:
    """(N, H, W, 3) to (N, (H/8)*(W/8), 192)."""
    n, height, width, _ = images.shape
    if height % PATCH or width % PATCH:
        raise ConfigError(f"image size {height}x{width} is not a multiple of {PATCH}: set model.image_size to one that is")
    x = images.view(n, height // PATCH, PATCH, width // PATCH, PATCH, 3)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(n, -1, PATCH * PATCH * 3)


class WanTokenizer(nn.Module):
    """The Wan 2.1 VAE through diffusers' ``AutoencoderKLWan``: deterministic mean, standardised per channel (method 1.5).

    Slot 0 is one pixel frame; every other slot is its image repeated four times, the VAE's temporal compression. The VAE is
    causal, so the latents of a prefix of slots do not depend on what follows.
    """

    vae: Any  #: diffusers' ``AutoencoderKLWan``
    mean: torch.Tensor  #: (1, 16, 1, 1, 1) float32
    std: torch.Tensor  #: (1, 16, 1, 1, 1) float32

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1))
        self.register_buffer("std", torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1))
        self._blank: dict[tuple, torch.Tensor] = {}

    @classmethod
    def load(cls, path: str) -> WanTokenizer:
        """Load from a folder in diffusers layout, or from the file of a release (``tokenizer.pth``); ``path`` as for
        :func:`cosmos_ray.released.tokenizer`. CheckpointError says what is missing."""
        try:
            from diffusers import AutoencoderKLWan
        except ImportError as error:
            raise ConfigError("the 2B preset's tokenizer needs diffusers: pip install 'cosmos-ray[2b]'") from error
        there = released.tokenizer(path)
        if there.is_file():
            return cls(read_wan_vae(there))
        if not (there / "config.json").is_file():
            raise CheckpointError(f"no Wan 2.1 VAE in {path!r}: point model.tokenizer_path at a diffusers directory with config.json, or "
                                  "at the release's tokenizer.pth")
        try:
            config = AutoencoderKLWan.load_config(there, local_files_only=True)
            if (config.get("_class_name"), config.get("z_dim", 16), config.get("is_residual", False)) != ("AutoencoderKLWan", 16, False):
                raise CheckpointError(f"{there} is no Wan 2.1 VAE: its config.json is of {config.get('_class_name')}, z_dim "
                                      f"{config.get('z_dim')}, is_residual {config.get('is_residual', False)}; give the vae "
                                      "folder of Wan 2.1, or the release's tokenizer.pth")
            return cls(AutoencoderKLWan.from_pretrained(there, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the Wan 2.1 VAE in {path!r} cannot be loaded: {reason(error)}: copy it again") from error

    @torch.no_grad()
    def encode(self, images: torch.Tensor, slots: tuple[int, ...], frames: int) -> torch.Tensor:
        """See :meth:`PatchPCA.encode`."""
        if len(images) > ROWS:
            return torch.cat([self.encode(rows, slots, frames) for rows in images.split(ROWS)])
        b, _, height, width, _ = images.shape
        pixels = torch.zeros(b, frames, height, width, 3, dtype=torch.uint8, device=images.device)
        pixels[:, list(slots)] = images
        video = torch.cat((pixels[:, :1], pixels[:, 1:].repeat_interleave(4, dim=1)), dim=1)
        video = to_unit(video).permute(0, 4, 1, 2, 3).to(next(self.vae.parameters()).dtype)
        return (self.vae.encode(video).latent_dist.mode().float() - self.mean) / self.std

    def blank(self, size: int) -> torch.Tensor:
        """See :meth:`PatchPCA.blank`. Encoded once: slot 0 precedes all others, so it depends on none."""
        key = (size, self.mean.device, next(self.vae.parameters()).dtype)
        if key not in self._blank:
            nothing = torch.zeros(1, 0, size, size, 3, dtype=torch.uint8, device=self.mean.device)
            self._blank[key] = self.encode(nothing, (), 1)[0, :, 0]
        return self._blank[key]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, slots: tuple[int, ...]) -> torch.Tensor:
        """See :meth:`PatchPCA.decode`. Decodes the whole causal prefix up to the last slot asked for."""
        if len(latents) > ROWS:
            return torch.cat([self.decode(rows, slots) for rows in latents.split(ROWS)])
        prefix = latents[:, :, : max(slots) + 1].float() * self.std + self.mean
        video = self.vae.decode(prefix.to(next(self.vae.parameters()).dtype)).sample.float()
        picked = video[:, :, [0 if slot == 0 else (slot - 1) * 4 + 1 for slot in slots]]
        return to_pixels(picked.permute(0, 2, 3, 4, 1))
