"""What a sample type is given, and what a one-way network has read of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.transformer import Keys


@dataclass(frozen=True)
class Given:
    """B rows of given frames. One reading serves any number of samples: several candidates, noises and step counts."""

    sample_type: SampleType
    targets: tuple[int, ...]  #: frames to generate: the last of the sequence
    known: torch.Tensor  #: (B, C, T, h, w) float32 latents; the clean frames are filled
    text: Prompts  #: B rows, with keys
    keys: tuple[Keys, ...] | None  #: keys and values of the given frames in every block; None where the network is not ``one_way``

    def __len__(self) -> int:
        return len(self.known)

    def take(self, rows: torch.Tensor) -> Given:
        """The rows at these indices (n,) int64, or where this mask (B,) bool is true."""
        return self._each(lambda x: x[rows], self.text.take(rows))

    def repeat_interleave(self, n: int) -> Given:
        """Every row n times in a row, as ``Tensor.repeat_interleave``."""
        return self if n == 1 else self._each(lambda x: x.repeat_interleave(n, 0), self.text.repeat_interleave(n))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor], text: Prompts) -> Given:
        keys = None if self.keys is None else tuple((change(key), change(value)) for key, value in self.keys)
        return dataclasses.replace(self, known=change(self.known), text=text, keys=keys)
