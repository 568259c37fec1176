"""The one way from a simulated or stored frame to the frame that the network sees (method 1.2)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from cosmos_ray.errors import ConfigError
from cosmos_ray.model.augmentation import AREA


def prepare(images: np.ndarray, size: int, jpeg: bool, centre_crop: bool, resize: str = "bilinear") -> np.ndarray:
    """The frames as the model takes them; the same array where there is nothing to do.

    In this order: ``jpeg`` sends every frame through JPEG quality 95; frames of another size are resized to ``size`` pixels;
    ``centre_crop`` keeps the middle ``int(size * sqrt(0.9))`` pixels (212 of 224), the area that training crops keep, and
    resizes them back. Resizing is bilinear with antialiasing and rounds to uint8 each time. With ``resize`` "bicubic", frames of
    another size go through PIL's bicubic filter instead, as in the public code.

    Args: images (B, n, H, W, 3) uint8 RGB. Returns (B, n, size, size, 3) uint8. ConfigError for any other images.
    """
    if images.ndim != 5 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ConfigError(f"cannot prepare frames of shape {images.shape} {images.dtype}: expected (B, n, H, W, 3) uint8")
    if jpeg:
        images = np.stack([_jpeg(frame) for frame in images.reshape(-1, *images.shape[2:])]).reshape(images.shape)
    if images.shape[2:4] != (size, size):
        images = _pil_bicubic(images, size) if resize == "bicubic" else _resize(images, size)
    if centre_crop:
        kept = int(size * math.sqrt(AREA))
        start = round((size - kept) / 2)
        images = _resize(images[:, :, start : start + kept, start : start + kept], size)
    return images


def _jpeg(frame: np.ndarray) -> np.ndarray:
    """One (H, W, 3) uint8 RGB frame, encoded and decoded again."""
    import cv2  # only where it is needed: the model also runs where there is none

    # As PIL writes quality 95, which the released models were trained on: chroma at half resolution.
    quality = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    _, data = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), quality)
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def _pil_bicubic(images: np.ndarray, size: int) -> np.ndarray:
    """(B, n, H, W, 3) to (B, n, size, size, 3) uint8."""
    from PIL import Image  # only where it is needed
    frames = images.reshape(-1, *images.shape[2:])
    resized = [np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC)) for frame in frames]
    return np.stack(resized).reshape(*images.shape[:2], size, size, 3)


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    """(B, n, H, W, 3) to (B, n, size, size, 3) uint8: in floats, then rounded."""
    frames = torch.from_numpy(np.ascontiguousarray(images)).flatten(0, 1).permute(0, 3, 1, 2).float()
    resized = F.interpolate(frames, (size, size), mode="bilinear", antialias=True, align_corners=False)
    pixels = resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return pixels.reshape(*images.shape[:2], size, size, 3).contiguous().numpy()
