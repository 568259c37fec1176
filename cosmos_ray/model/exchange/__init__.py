"""Model weights in public formats, read into and written from {public parameter name without ``net.``: tensor}."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cosmos_ray import released
from cosmos_ray.errors import CheckpointError
from cosmos_ray.model.exchange.diffusers_folder import CONFIG, diffusers_config, read_diffusers, read_shards, write_diffusers
from cosmos_ray.model.exchange.files import DCP_METADATA, read_safetensors, replacing, save_safetensors
from cosmos_ray.model.exchange.names import clean, flaw, match, prefixed
from cosmos_ray.model.exchange.pt import read_pt, write_pt

__all__ = ["FORMATS", "diffusers_config", "match", "read_weights", "write_weights"]

FORMATS = ("pt", "dcp", "diffusers", "safetensors")
_SUFFIXES = {"pt": (".pt", ".pth"), "safetensors": (".safetensors",)}
_ACCEPTED = ("a .pt, .pth or .ckpt file of torch.save, a .safetensors file, a torch.distributed.checkpoint folder (with .metadata, or the "
             "iter_XXXXXXXXX folder above it), or a diffusers folder (with config.json, or the one above its transformer)")


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights at ``path`` under public names, in the stored dtypes. Suffix or contents tell the format.

    A folder may hold one file of weights, and the Hugging Face cache is known (:mod:`cosmos_ray.released`, which raises ConfigError).
    CheckpointError when there is nothing, when the format is unknown, for each fault of the format, and for a tensor that is quantised or
    has numbers that are not finite. :func:`match` says whether the weights fit a model. Tensors may stay mapped to their file: while they
    are in use, replace the file, do not rewrite it.
    """
    path = released.weights(path)
    try:
        format = _format(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if format == "dcp":
        from cosmos_ray.model.exchange.dcp import read_dcp  # not above: torch.distributed takes as long to import as torch

        tensors = read_dcp(path)
    elif format == "diffusers":
        tensors = read_diffusers(path)[0]
    elif format == "shards":
        tensors = read_shards(path)
    else:
        tensors = read_pt(path) if format == "pt" else clean(read_safetensors(path), str(path))
    for key, value in tensors.items():
        if why := flaw(value):
            raise CheckpointError(f"{path}: key {key} {why}")
    return tensors


def _format(path: Path) -> str:
    """Which of FORMATS lies at ``path``, or "shards" for the index of safetensors files.

    CheckpointError when none does, OSError when that cannot be seen.
    """
    if not path.exists():
        raise CheckpointError(f"there is no {path}: give {_ACCEPTED}")
    if path.is_dir():
        if any((folder / DCP_METADATA).is_file() or any(folder.glob("*.distcp")) for folder in (path, path / "model")):
            return "dcp"
        if any((folder / CONFIG).is_file() for folder in (path, path / "transformer")):
            return "diffusers"
    if path.is_file() and path.name.endswith(released.INDEX):
        return "shards"
    if path.is_file() and path.suffix == ".ckpt":  # of Lightning; never written
        return "pt"
    for format, suffixes in _SUFFIXES.items():
        if path.is_file() and path.suffix in suffixes:
            return format
    raise CheckpointError(f"no weights in {path}: give {_ACCEPTED}")


def write_weights(tensors: Mapping[str, torch.Tensor], path: str | Path, format: str, config: Mapping[str, Any] | None = None,
                  overwrite: bool = False) -> None:
    """Write weights given under public names, with or without ``net.``; dtypes stay as they are.

    Args:
        tensors: {public name: tensor}.
        path: the file, or the folder for "dcp" and "diffusers"; it appears when it is complete.
        format: one of FORMATS.
        config: for "diffusers" only, from :func:`diffusers_config`.
        overwrite: replace what is at ``path``; without it that is a CheckpointError.

    CheckpointError also for an unknown format, a suffix by which the file could not be read again, and a path that cannot be written.
    """
    if format not in FORMATS:
        raise CheckpointError(f"unknown weights format {format!r}: choose one of {', '.join(FORMATS)}")
    suffixes = _SUFFIXES.get(format)
    if suffixes and Path(path).suffix not in suffixes:
        raise CheckpointError(f"weights in the format {format} need a name that ends in {' or '.join(suffixes)}: rename {path}")
    if format == "diffusers":
        if config is None:
            raise CheckpointError("weights for diffusers need a config: make it with diffusers_config")
        write_diffusers(tensors, path, config, overwrite=overwrite)
    elif format == "dcp":
        from cosmos_ray.model.exchange.dcp import write_dcp

        write_dcp(tensors, path, overwrite=overwrite)
    elif format == "pt":
        write_pt(tensors, path, overwrite=overwrite)
    else:
        state = prefixed(tensors)
        with replacing(path, overwrite) as temporary:
            save_safetensors(state, temporary)
