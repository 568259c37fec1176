"""Training augmentation (method 5.3): one random crop, rotation and change of colour per sample, for all of its frames.

Pure torch, on the device of the images. There are two ways to apply a draw: ours is smooth and rounds once, the public code's goes step
by step as torchvision does (method 11.5). What is drawn is apart from what is applied, so that a cache of encoded windows can
draw the parameters of a window from a seed and find it again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cosmos_ray.errors import ConfigError

AREA = 0.9  #: of the image that a crop keeps
ROTATION = 5.0  #: largest angle in degrees, either way
BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.4, 0.5  #: a factor is drawn from 1 - x to 1 + x
HUE = 0.05  #: largest shift in turns of the colour wheel, either way
RANGES = (AREA, ROTATION, BRIGHTNESS, CONTRAST, SATURATION, HUE)  #: all of the above: what cached windows must agree on
_GRAY = (0.2989, 0.587, 0.114)  # weights of red, green and blue, as torchvision has them


@dataclass(frozen=True)
class AugmentationParameters:
    """Crop, rotation and colour change of B samples; every field is (B,) float32 on the CPU. An image spans -1 to 1 in both axes."""

    side: torch.Tensor  #: of the square crop, as a share of the image's side
    x: torch.Tensor  #: centre of the crop in half image sides, to the right
    y: torch.Tensor  #: the same, downwards
    angle: torch.Tensor  #: degrees counter-clockwise, about the centre of the crop
    brightness: torch.Tensor  #: factor
    contrast: torch.Tensor  #: factor
    saturation: torch.Tensor  #: factor
    hue: torch.Tensor  #: turns of the colour wheel


def draw(b: int, generator: torch.Generator) -> AugmentationParameters:
    """Independent parameters of ``b`` samples from a CPU generator."""
    return _scaled(torch.rand(b, 7, generator=generator))


def draw_seeded(seeds: Sequence[int]) -> AugmentationParameters:
    """Parameters of ``len(seeds)`` samples. ``seeds[i]`` (0 to 2**63 - 1) alone fixes sample i."""
    generator = torch.Generator()
    return _scaled(torch.stack([torch.rand(7, generator=generator.manual_seed(int(seed))) for seed in seeds]))


def apply(images: torch.Tensor, parameters: AugmentationParameters, way: str = "smooth") -> torch.Tensor:
    """The images, augmented: row i of ``parameters`` is applied to every frame of sample i.

    With ``way`` "smooth", crop and rotation are one bilinear resampling of the whole image, so what a rotated crop sees beyond its edges
    is the image itself; beyond the image it is the nearest pixel, which, unlike a mirror, shows no object twice. Then, in this order and
    clamped to 0..255 each time as in torchvision's ColorJitter: brightness, contrast against the frame's mean gray, saturation
    against gray, hue. Rounded once, at the end.

    With ``way`` "torchvision", a crop of whole pixels is resized (bilinear, antialiased) and then rotated about its centre by the nearest
    pixel, with black beyond the edges. Each change of colour ends in whole numbers, rounded down.

    Args: images (B, n, H, H, 3) uint8, on any device. Returns the same. ConfigError for any other images or another B.
    """
    b = len(parameters.side)
    square = images.ndim == 5 and images.shape[2] == images.shape[3] and images.shape[4] == 3
    if images.dtype != torch.uint8 or not square or len(images) != b:
        raise ConfigError(f"cannot augment {tuple(images.shape)} {images.dtype}: expected ({b}, n, H, H, 3) uint8")
    frames = images.permute(0, 1, 4, 2, 3).float()
    stepwise = way == "torchvision"
    frames = _rotate(_cropped(frames, parameters), parameters.angle) if stepwise else _crop(frames, parameters)
    whole = torch.floor if stepwise else torch.nn.Identity()
    brightness, contrast, saturation, hue = (
        getattr(parameters, name).to(images.device).view(-1, 1, 1, 1, 1) for name in ("brightness", "contrast", "saturation", "hue"))
    frames = whole((frames * brightness).clamp(0, 255))
    frames = whole(_blend(frames, whole(_gray(frames)).mean((3, 4), keepdim=True), contrast))
    frames = whole(_blend(frames, whole(_gray(frames)), saturation))
    if stepwise:  # torchvision stretches 0..1 to 0..255.999 before it rounds down
        return torch.stack([(channel * (255.999 / 255)).to(torch.uint8) for channel in _shift_hue(frames, hue[:, :, 0])], -1)
    return torch.stack([channel.round().to(torch.uint8) for channel in _shift_hue(frames, hue[:, :, 0])], -1)


def augment(images: torch.Tensor, generator: torch.Generator, way: str = "smooth") -> torch.Tensor:
    """:func:`apply` with freshly drawn parameters. Args: images (B, n, H, H, 3) uint8; a CPU generator."""
    return apply(images, draw(len(images), generator), way)


def _scaled(uniform: torch.Tensor) -> AugmentationParameters:
    """Parameters from (B, 7) numbers in [0, 1)."""
    x, y, angle, brightness, contrast, saturation, hue = (2 * uniform - 1).unbind(1)
    side = math.sqrt(AREA)
    return AugmentationParameters(
        side=torch.full_like(x, side), x=(1 - side) * x, y=(1 - side) * y, angle=ROTATION * angle, brightness=1 + BRIGHTNESS * brightness,
        contrast=1 + CONTRAST * contrast, saturation=1 + SATURATION * saturation, hue=HUE * hue)


def _crop(frames: torch.Tensor, p: AugmentationParameters) -> torch.Tensor:
    """Crop and rotate (B, n, 3, H, H) floats; the frames of a sample share one grid."""
    cos, sin = p.side * torch.cos(torch.deg2rad(p.angle)), p.side * torch.sin(torch.deg2rad(p.angle))
    theta = torch.stack((torch.stack((cos, -sin, p.x), 1), torch.stack((sin, cos, p.y), 1)), 1).to(frames.device)
    stacked = frames.flatten(1, 2)
    grid = F.affine_grid(theta, list(stacked.shape), align_corners=False)
    return F.grid_sample(stacked, grid, mode="bilinear", padding_mode="border", align_corners=False).view(frames.shape)


def _cropped(frames: torch.Tensor, p: AugmentationParameters) -> torch.Tensor:
    """Crop (B, n, 3, H, H) floats at whole pixels and resize back; the frames of a sample share the crop."""
    size, out = frames.shape[-1], torch.empty_like(frames)
    for i, (side, x, y) in enumerate(zip(p.side.tolist(), p.x.tolist(), p.y.tolist(), strict=True)):
        kept = round(size * side)
        free = size - kept
        # x and y are uniform over what the crop leaves free: the same draw, over the places of a crop of whole pixels.
        column, row = (min(free, int((place / (1 - side) + 1) / 2 * (free + 1))) if free else 0 for place in (x, y))
        crop = frames[i, :, :, row : row + kept, column : column + kept]
        out[i] = F.interpolate(crop, (size, size), mode="bilinear", antialias=True, align_corners=False).round().clamp(0, 255)
    return out


def _rotate(frames: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Rotate (B, n, 3, H, H) floats by (B,) degrees counter-clockwise about the centre: the nearest pixel, black where there is none."""
    cos, sin, zero = torch.cos(torch.deg2rad(angle)), torch.sin(torch.deg2rad(angle)), torch.zeros_like(angle)
    theta = torch.stack((torch.stack((cos, -sin, zero), 1), torch.stack((sin, cos, zero), 1)), 1).to(frames.device)
    stacked = frames.flatten(1, 2)
    grid = F.affine_grid(theta, list(stacked.shape), align_corners=False)
    return F.grid_sample(stacked, grid, mode="nearest", padding_mode="zeros", align_corners=False).view(frames.shape)


def _gray(frames: torch.Tensor) -> torch.Tensor:
    """(B, n, 1, H, H) of (B, n, 3, H, H)."""
    red, green, blue = frames.split(1, 2)
    return _GRAY[0] * red + _GRAY[1] * green + _GRAY[2] * blue


def _blend(frames: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (factor * frames + (1 - factor) * other).clamp(0, 255)


def _shift_hue(frames: torch.Tensor, turns: torch.Tensor) -> list[torch.Tensor]:
    """Red, green and blue (B, n, H, H) of (B, n, 3, H, H) with the hue moved by (B, 1, 1, 1) turns; saturation and value stay."""
    red, green, blue = frames.unbind(2)
    value = frames.amax(2)
    chroma = value - frames.amin(2)
    divisor = chroma.clamp_min(1e-6)  # of a gray pixel the hue is arbitrary
    sixths = torch.where(value == red, (green - blue) / divisor,
                         torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4)) + 6 * turns
    channels = []
    for offset in (5, 3, 1):
        k = (sixths + offset) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return channels
