"""``.pt`` files: state dicts written by torch.save, the format of the released weights."""

from __future__ import annotations

import io
import logging
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cosmos_ray.errors import CheckpointError
from cosmos_ray.model.exchange.files import replacing, stand_in
from cosmos_ray.model.exchange.names import clean, prefixed
from cosmos_ray.safe_pickle import DAMAGED

logger = logging.getLogger(__name__)

WRAPPERS = ("model", "state_dict", "ema")  #: the first that is there counts


def read_pt(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a torch.save file, bare or wrapped, up to three times, in "model", "state_dict" or "ema", under public names.

    Tensors of a current-format file stay mapped to it and are read on demand. CheckpointError says whether the file is missing,
    truncated, no checkpoint, empty, or would need code to run.
    """
    return clean(unwrapped(torch_load(Path(path), str(path)), str(path)), str(path))


def unwrapped(held: Any, where: str) -> Mapping[str, Any]:
    """The state dict in what a file holds: itself, or under up to three of :data:`WRAPPERS`. CheckpointError when there is none."""
    for _ in range(3):
        wrappers = [key for key in WRAPPERS if isinstance(held, Mapping) and isinstance(held.get(key), Mapping)]
        if len(wrappers) > 1:
            logger.warning("%s holds weights under %s: those under %r are taken", where, " and ".join(map(repr, wrappers)), wrappers[0])
        held = held[wrappers[0]] if wrappers else held
    if not isinstance(held, Mapping) or not all(isinstance(key, str) for key in held):
        raise CheckpointError(f"{where} holds a {type(held).__name__}, not a state dict: save model.state_dict() with torch.save")
    return held


def write_pt(tensors: Mapping[str, torch.Tensor], path: str | Path, wrapped: str | None = None, overwrite: bool = False) -> None:
    """Write ``tensors`` under ``net.`` names, bare or inside a dict under the key ``wrapped``."""
    state = prefixed(tensors)
    with replacing(path, overwrite) as temporary, open(temporary, "wb") as file:
        torch.save({wrapped: state} if wrapped else state, file)


def torch_load(source: Path | io.BytesIO, where: str) -> Any:
    """torch.load that runs no code, to the CPU. CheckpointError in every case that it cannot read."""
    try:
        mapped = isinstance(source, Path) and zipfile.is_zipfile(source)
        if isinstance(source, Path) and not mapped:
            if why := stand_in(source):
                raise CheckpointError(f"{where} {why}")
            with open(source, "rb") as file:
                if file.read(2) == b"PK":
                    raise CheckpointError(f"{where} is truncated: copy it again")
        with warnings.catch_warnings(), torch.serialization.safe_globals([io.BytesIO]):  # Transformer Engine's _extra_state
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise CheckpointError(f"cannot read {where}: {error.strerror or error}") from error
    except DAMAGED as error:
        raise CheckpointError(f"{where} {_fault(error)}") from error


def _fault(error: BaseException) -> str:
    """What is wrong with a file on which torch.load failed with ``error``."""
    text = str(error)
    if wanted := re.search(r"GLOBAL ([\w.]+)", text):
        return (f"asks for {wanted[1]} while it is unpickled, which could run any code: refused; "
                "get a file that holds nothing but tensors, for instance as .safetensors")
    if "TorchScript" in text:
        return "is a TorchScript program, not a state dict: save model.state_dict() with torch.save"
    if isinstance(error, EOFError | IndexError) or "EOF" in text:
        return "is truncated or no checkpoint: copy it again"
    return "is no checkpoint written by torch.save, or a damaged one: check the path, or copy the file again"
