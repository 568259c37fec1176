"""Vectors as latent frames: tiling into a frame, averaging back out of it, and the normalisation around both.

Method 1.3 and 1.4: a chunk is flattened time-major, repeated to fill the C*h*w elements of its frame and truncated;
extraction averages the *full* copies only. Values fill their frame and are read back as its mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cosmos_ray.errors import ConfigError

CONSTANT = 1e-6  #: a dimension with a smaller range counts as constant


def inject(vector: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Tile (B, n) vectors into (B, C, h, w) latent frames. Raises ConfigError when n exceeds C*h*w."""
    size = shape[0] * shape[1] * shape[2]
    n = vector.shape[1]
    if n > size:
        raise ConfigError(f"a vector of {n} numbers does not fit a latent frame of {size}: shorten the chunk or enlarge the image")
    copies = -(-size // n)
    return vector.repeat(1, copies)[:, :size].reshape(-1, *shape)


def extract(frame: torch.Tensor, n: int) -> torch.Tensor:
    """Average the full copies of an n-vector out of (B, C, h, w) frames; returns (B, n)."""
    flat = frame.flatten(1)
    copies = flat.shape[1] // n
    return flat[:, : copies * n].reshape(-1, copies, n).mean(1)


def inject_value(value: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Broadcast (B,) values in [-1, 1] to (B, C, h, w) frames."""
    return value[:, None, None, None].expand(-1, *shape)


def extract_value(frame: torch.Tensor) -> torch.Tensor:
    """Read (B,) values in [-1, 1] from (B, C, h, w) frames: the mean over all elements."""
    return frame.flatten(1).mean(1)


def probability(value: torch.Tensor) -> torch.Tensor:
    """Rescale a value in [-1, 1] to the paper's [0, 1], clamped (method 1.4)."""
    return ((value + 1) / 2).clamp(0, 1)


@dataclass(frozen=True)
class Normalizer:
    """Per-dimension min/max to [-1, 1], ``2 (x - min) / (max - min) - 1``.

    A constant dimension, which divides by zero in the public code (method 1.3), maps to 0 and back to its constant.
    """

    low: torch.Tensor  #: (n,) float32
    high: torch.Tensor  #: (n,) float32

    @classmethod
    def of(cls, low: np.ndarray, high: np.ndarray) -> Normalizer:
        return cls(torch.as_tensor(np.asarray(low), dtype=torch.float32), torch.as_tensor(np.asarray(high), dtype=torch.float32))

    @property
    def constant(self) -> torch.Tensor:
        """(n,) bool: dimensions whose min and max agree, but for rounding."""
        return self.high - self.low < CONSTANT

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """(..., n) physical units to [-1, 1]; values outside the fitted range go beyond it, unclipped."""
        low, high = self.low.to(x), self.high.to(x)
        span = torch.where(self.constant.to(x.device), torch.ones_like(low), high - low)
        return torch.where(self.constant.to(x.device), torch.zeros_like(x), 2 * (x - low) / span - 1)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """(..., n) in [-1, 1] back to physical units."""
        low, high = self.low.to(x), self.high.to(x)
        return torch.where(self.constant.to(x.device), low.expand_as(x), 0.5 * (x + 1) * (high - low) + low)
