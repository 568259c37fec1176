"""T5 embeddings of many instructions, computed once into a file that any run and the public code read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from cosmos_ray.errors import ConfigError
from cosmos_ray.model.exchange.text_embeddings import read_text_embeddings, write_text_embeddings
from cosmos_ray.model.text import T5Text

SAVE_S = 60.0  #: seconds of encoding that an interruption may lose


def embed_to_file(instructions: Iterable[str], encoder: Path, file: Path, progress: Callable[[int, int], None]) -> tuple[int, int]:
    """Write the T5 embeddings (512, 1024), bfloat16 as in the released files, of all ``instructions`` to ``file``.

    ``file`` is a ``.safetensors``, or a ``.pkl`` as the public code reads. Embeddings that it has already stay, and an interruption keeps
    what was computed, up to a minute. Returns (instructions in the file, computed now).
    """
    if file.suffix not in (".safetensors", ".pkl"):
        raise ConfigError(f"--to {file} must end in .safetensors, or in .pkl for the public cosmos-policy code")
    if not encoder.is_dir():
        raise ConfigError(f"there is no T5 folder {encoder}: give the folder that holds config.json, the tokenizer and the weights of the "
                          "T5 encoder (google-t5/t5-11b for the released policies)")
    known = read_text_embeddings(file) if file.exists() else {}
    wanted = list(dict.fromkeys(instructions))
    todo = [instruction for instruction in wanted if instruction not in known]
    text, saved = T5Text(str(encoder)), time.monotonic()
    unsaved = 0
    try:
        for number, instruction in enumerate(todo):
            progress(len(wanted) - len(todo) + number, len(wanted))
            known[instruction] = text(instruction).to(torch.bfloat16)
            unsaved += 1
            if time.monotonic() - saved > SAVE_S:
                write_text_embeddings(known, file, overwrite=True)
                saved, unsaved = time.monotonic(), 0
    finally:
        if unsaved:
            write_text_embeddings(known, file, overwrite=True)
    progress(len(wanted), len(wanted))
    return len(known), len(todo)
