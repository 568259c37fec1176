"""Instructions as the network cross-attends to them: short, shared between rows, with keys and values computed once.

T5 embeddings are 512 rows of which all but the prompt's own are zero (method 5.1). Without biases a zero row has key 0 and
value 0, so m of them act as one zero row whose attention logit is raised by ln m: the same result up to rounding, from some
ten rows instead of 512.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

GRAIN = 32  #: rows a prompt is padded to a multiple of


@dataclass(frozen=True)
class Prompts:
    """P different prompts, and the prompt of each of B rows."""

    tokens: torch.Tensor  #: (P, L, text_width) embeddings
    bias: torch.Tensor | None  #: (P, 1, 1, L) added to the attention logits; None where it would be all zero
    rows: torch.Tensor  #: (B,) int64, the prompt of each row
    keys: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None  #: per block (P, heads, L, head_dim) keys and values

    def __len__(self) -> int:
        return len(self.rows)

    def repeat_interleave(self, n: int) -> Prompts:
        """Every row n times in a row, as ``Tensor.repeat_interleave``."""
        return dataclasses.replace(self, rows=self.rows.repeat_interleave(n))

    def repeat(self, n: int) -> Prompts:
        """All rows n times over, as ``Tensor.repeat``."""
        return dataclasses.replace(self, rows=self.rows.repeat(n))

    def take(self, rows: torch.Tensor) -> Prompts:
        """The rows at these indices (n,) int64."""
        return dataclasses.replace(self, rows=self.rows[rows])

    def of_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """(P, ...) values of the prompts to (B, ...) of the rows; a single prompt is broadcast, not copied."""
        return tensor.expand(len(self.rows), *tensor.shape[1:]) if len(tensor) == 1 else tensor[self.rows]


def make_prompts(embeddings: Sequence[torch.Tensor], device: torch.device, collapse: bool = True) -> Prompts:
    """Prompts, one row each, from (L, text_width) embeddings of equal L on the CPU.

    ``collapse`` replaces the zero rows at the end of a prompt by one row that stands for all. The number of rows is rounded up to a
    multiple of ``GRAIN``: prompts of similar length then give the same bits alone and together, and other prompts agree to rounding.
    """
    length, width = embeddings[0].shape
    used = [_prompt_length(e) if collapse else length for e in embeddings]
    kept = min(length, -(-(max(used) + 1) // GRAIN) * GRAIN)
    if kept == length:  # nothing is saved, so no row needs a bias
        used = [length] * len(embeddings)
    tokens = torch.zeros(len(embeddings), kept, width)
    bias = torch.zeros(len(embeddings), 1, 1, kept)
    for i, (embedding, n) in enumerate(zip(embeddings, used, strict=True)):
        tokens[i, :n] = embedding[:n]
        if n < kept:
            bias[i, ..., n] = math.log(length - n)
            bias[i, ..., n + 1 :] = -math.inf
    rows = torch.arange(len(embeddings), device=device)
    return Prompts(tokens.to(device), bias.to(device) if bias.any() else None, rows)


def _prompt_length(embedding: torch.Tensor) -> int:
    """Number of rows up to the last row that is not zero."""
    filled = embedding.ne(0).any(dim=1).nonzero()
    return int(filled[-1]) + 1 if len(filled) else 0
