"""From instructions to the (L, text_width) embeddings that the network attends to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosmos_ray import released
from cosmos_ray.errors import CheckpointError, ConfigError
from cosmos_ray.model.exchange.files import reason
from cosmos_ray.model.exchange.text_embeddings import read_text_embeddings

TEXTS_KEPT = 1024  #: different instructions whose vectors are kept


class HashText:
    """A fixed random vector per (position, word): no weights, no downloads, the same in every process.

    Enough for a model trained on a handful of instructions; it carries no meaning between words. Rows past the prompt are
    zero, as in the T5 embeddings of the released models.
    """

    def __init__(self, tokens: int, width: int):
        self.tokens, self.width = tokens, width
        self._cache: dict[str, torch.Tensor] = {}

    def __call__(self, instruction: str) -> torch.Tensor:
        """(tokens, width) float32."""
        if instruction not in self._cache:
            if len(self._cache) >= TEXTS_KEPT:
                self._cache.clear()
            out = np.zeros((self.tokens, self.width), np.float32)
            for i, word in enumerate(re.findall(r"\w+", instruction.lower())[: self.tokens]):
                seed = int.from_bytes(hashlib.sha256(f"{i}:{word}".encode()).digest()[:8], "little")
                out[i] = np.random.default_rng(seed).standard_normal(self.width)
            self._cache[instruction] = torch.from_numpy(out)
        return self._cache[instruction]


class T5Text:
    """T5 embeddings: cached ones, and those that a local T5 encoder computes.

    ``path`` is the directory of the encoder, or a file of embeddings: ``.safetensors`` {instruction: (512, 1024)}, or the public
    ``*_t5_embeddings.pkl``, of which only tensors are read. ``known`` embeddings of a checkpoint come first.
    """

    def __init__(self, path: str, tokens: int = 512, width: int = 1024, known: dict[str, torch.Tensor] | None = None):
        self.path, self.tokens, self.width = released.text(path) if path else Path(), tokens, width
        self._folder = bool(path) and self.path.is_dir()
        self._encoder: Any = None
        self._words: Any = None
        self.embeddings = dict(known or {})  #: of every instruction so far, (tokens, width) each
        if self.path.is_file():
            for instruction, rows in read_text_embeddings(self.path).items():
                self.embeddings.setdefault(instruction, rows)
        elif not self._folder and not known:
            raise CheckpointError(f"no text embeddings at {path!r}: point model.text_path at a .safetensors or .pkl file of embeddings, "
                                  "or at a T5 directory")
        for instruction, rows in self.embeddings.items():
            if rows.shape != (tokens, width):
                raise CheckpointError(f"the text embedding of {instruction!r} has shape {tuple(rows.shape)}, the model takes "
                                      f"({tokens}, {width})")

    def __call__(self, instruction: str) -> torch.Tensor:
        """(tokens, width) float. ConfigError for an instruction that is not cached when there is no T5 directory."""
        if instruction not in self.embeddings:
            if not self._folder:
                raise ConfigError(f"there is no embedding of {instruction!r}, only of {len(self.embeddings)}, the nearest "
                                  f"{(get_close_matches(instruction, self.embeddings, 1, 0) or ['none'])[0]!r}: give it to the letter, "
                                  "add it to model.text_path, or give a T5 directory instead")
            self.embeddings[instruction] = self._encode(instruction)
        return self.embeddings[instruction]

    def missing(self, instructions: Iterable[str]) -> list[str]:
        """Those that have no embedding and get none, for there is no encoder."""
        return [] if self._folder else [instruction for instruction in instructions if instruction not in self.embeddings]

    @torch.no_grad()
    def _encode(self, instruction: str) -> torch.Tensor:
        if self._encoder is None:
            try:
                from transformers import AutoTokenizer, T5EncoderModel
            except ImportError as error:
                raise ConfigError("computing T5 embeddings needs transformers: pip install 'cosmos-ray[2b]'") from error
            try:
                self._words = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
                self._encoder = T5EncoderModel.from_pretrained(self.path, local_files_only=True).eval()
            except (OSError, ValueError) as error:
                raise CheckpointError(f"no T5 encoder can be loaded from {self.path} ({reason(error)}): point model.text_path at a whole "
                                      "one, or at a file of embeddings") from error
        words = self._words(instruction, return_tensors="pt", padding="max_length", truncation=True, max_length=self.tokens)
        hidden = self._encoder(**words).last_hidden_state[0].float()
        return hidden * words.attention_mask[0, :, None]
