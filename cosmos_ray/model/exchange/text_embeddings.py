"""Files of precomputed T5 embeddings: ``.safetensors``, and the public ``*_t5_embeddings.pkl`` read without trusting it."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cosmos_ray import safe_pickle
from cosmos_ray.errors import CheckpointError
from cosmos_ray.model.exchange.files import owned, read_safetensors, replacing, save_safetensors, stand_in
from cosmos_ray.model.exchange.pt import torch_load

#: First pickle of a file that torch.save wrote in its old format.
_TORCH_SAVE = 0x1950A86A20F9469CFC6C


def read_text_embeddings(path: str | Path) -> dict[str, torch.Tensor]:
    """{instruction: (L, W)} on the CPU in the stored dtype; (1, L, W) in the file is accepted.

    Reads ``.safetensors``, a dict of tensors that pickle.dump wrote, on CUDA or not, and what torch.save wrote. CheckpointError for
    a file that would run code, that is damaged, or that holds anything but embeddings of one width.
    """
    path = Path(path)
    held = read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return owned(_checked(held, path))


def write_text_embeddings(embeddings: Mapping[str, torch.Tensor], path: str | Path, overwrite: bool = False) -> None:
    """Write {instruction: (L, W) or (1, L, W)} in the dtypes given: as safetensors, or as the pickle of (1, L, W) that the public code
    reads where the name ends in ``.pkl``."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".pkl"):
        raise CheckpointError(f"text embeddings are written as .safetensors or .pkl: rename {path}")
    tensors = _checked(embeddings, "the dict to write")
    with replacing(path, overwrite) as temporary:
        if path.suffix == ".safetensors":
            save_safetensors(tensors, temporary)
        else:
            with open(temporary, "wb") as file:
                pickle.dump({instruction: rows[None].clone() for instruction, rows in tensors.items()}, file)


def _read_pickle(path: Path) -> Any:
    """What a pickle or torch.save file holds."""
    try:
        if why := stand_in(path):
            raise CheckpointError(f"{path} {why}")
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                return torch_load(path, str(path))
            file.seek(0)
            held = safe_pickle.load(file, _allowed(str(path)), str(path))
    except OSError as error:
        raise CheckpointError(f"cannot read the text embeddings {path}: {error.strerror}") from error
    return torch_load(path, str(path)) if isinstance(held, int) and held == _TORCH_SAVE else held


def _allowed(where: str) -> dict[tuple[str, str], Any]:
    """What a pickled tensor names. Its storage is a torch.save file in itself, which is read without running code as well."""
    return {
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): lambda text, codec: text.encode("latin1"),  # how protocol 2 spells bytes
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch.storage", "_load_from_bytes"): lambda data: torch_load(io.BytesIO(data), f"{where} (a tensor in it)"),
    }


def _checked(held: Any, where: str | Path) -> dict[str, torch.Tensor]:
    """{instruction: (L, W)} of what a file holds; CheckpointError for anything but finite embeddings of one width."""
    if not isinstance(held, Mapping) or not held:
        raise CheckpointError(f"{where} holds no text embeddings: it must be a dict of instructions to tensors, not {_described(held)}")
    out: dict[str, torch.Tensor] = {}
    for instruction, value in held.items():
        if not isinstance(instruction, str):
            raise CheckpointError(f"{where}: the key {instruction!r} is no instruction: it must be a dict of instructions to tensors")
        shape = tuple(value.shape) if type(value) is torch.Tensor and value.is_floating_point() and value.numel() else ()
        if len(shape) != 2 and (len(shape) != 3 or shape[0] != 1):
            raise CheckpointError(f"{where}: {instruction!r} has {_described(value)} instead of an embedding (tokens, width)")
        if not value.float().isfinite().all():
            raise CheckpointError(f"{where}: the embedding of {instruction!r} has numbers that are not finite: compute it again")
        out[instruction] = value.detach().reshape(shape[-2:])
        width = next(iter(out.values())).shape[1]
        if shape[-1] != width:
            raise CheckpointError(f"{where}: the embedding of {instruction!r} is {shape[-1]} wide, others {width}: "
                                  "compute them with one encoder")
    return out


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"an empty {type(value).__name__}" if isinstance(value, Mapping) and not value else f"a {type(value).__name__}"
