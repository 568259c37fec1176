"""One batch of training samples, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class TrainingBatch:
    """B samples (s, a, s', return). The learner's ``BatchSource`` builds batches from replay windows."""

    images: np.ndarray  #: (B, cameras, H, W, 3) uint8 at s
    future_images: np.ndarray  #: (B, cameras, H, W, 3) uint8 at s'
    proprio: np.ndarray  #: (B, p) float32 at s
    future_proprio: np.ndarray  #: (B, p) float32 at s'
    actions: np.ndarray  #: (B, K, d) float32: the chunk between s and s'
    value: np.ndarray  #: (B,) float32 in [-1, 1]: the return at s'
    instructions: Sequence[str]  #: B
    sample_types: np.ndarray  #: (B,) int64, a SampleType each
    windows: Sequence[str] = ()  #: B names of the windows; the latent cache keeps latents under these names
    own: np.ndarray | None = None  #: (B,) bool: policy samples from rollouts, which are weighted by their advantage
