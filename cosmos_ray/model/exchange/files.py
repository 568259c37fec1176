"""Reading and writing files of weights: a file appears whole or not at all, and tensors are kept as safetensors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cosmos_ray.errors import CheckpointError

DCP_METADATA = ".metadata"  #: the file by which a torch.distributed.checkpoint folder is known


@contextmanager
def replacing(path: str | Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write a file or folder to; it takes the name ``path`` once it is complete and on disk.

    Whatever goes wrong inside, ``path`` is untouched and the temporary is removed. An old folder is replaced by two renames: a
    crash between them leaves it under ``.NAME.PID.old``, see :func:`recover`. CheckpointError when ``path`` exists and ``overwrite`` is
    off, when it is a folder of other things than weights, and when it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        if path.exists() and not overwrite:
            raise CheckpointError(f"{path} exists: choose another name, or allow overwriting")
        if path.is_dir() and not _holds_weights_only(path):
            raise CheckpointError(f"{path} is a folder that holds other things than weights and is not replaced: choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for part in [*temporary.iterdir(), temporary] if temporary.is_dir() else [temporary]:
            _sync(part)
        if path.is_dir() or (path.exists() and temporary.is_dir()):
            path.rename(old)
        temporary.replace(path)
        _sync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {reason(error)}: choose a writable place with enough space") from error
    finally:
        _remove(temporary)
    _remove(old)


def recover(folder: Path) -> None:
    """Finish what killed processes left of :func:`replacing` in ``folder``, which nobody else may write to: an old file or folder without
    a successor gets its name back, all else that was unfinished goes."""
    for old in folder.glob(".*.old"):
        path = folder / old.name[1:].rsplit(".", 2)[0]
        if path.exists():
            _remove(old)
        else:
            old.rename(path)
    for unfinished in folder.glob(".*.tmp"):
        _remove(unfinished)


def reason(error: BaseException) -> str:
    """The error in one line. torch.save hides the system's error behind a RuntimeError."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def _holds_weights_only(folder: Path) -> bool:
    """Whether a folder is one that this package writes: DCP, diffusers or a checkpoint of ours, and nothing below it."""
    names = {part.name for part in folder.iterdir()}
    return bool(names & {".metadata", "config.json", "policy.json"}) and all(part.is_file() for part in folder.iterdir())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def stand_in(file: Path) -> str:
    """What a file is that a failed download left in place of another one, with what to do; "" for any other file."""
    with open(file, "rb") as opened:
        head = opened.read(256).lstrip()
    if not head:
        return "is an empty file: copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "is only a pointer to the file (Git LFS): run `git lfs pull` in its folder, or download the file itself"
    if head.lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, not the file: download the file itself, logged in where the page asks for that"
    return ""


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of one file under the names in it. CheckpointError when it is missing, truncated or something else."""
    try:
        if why := stand_in(file):
            raise CheckpointError(f"{file} {why}")
        return load_file(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or no safetensors file ({error}): copy it again") from error


def save_safetensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write tensors in their dtypes; diffusers wants the metadata to say who wrote them.

    The file gets the permissions of any new file: safetensors alone makes it readable by its owner only.
    """
    file.touch()
    mode = file.stat().st_mode
    save_file(owned(tensors), file, metadata={"format": "pt"})
    file.chmod(mode)


def owned(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU and contiguous, copied where one is a view into something larger or shares its memory with another."""
    out, used = {}, set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() != value.nbytes or storage.data_ptr() in used:
            value = value.clone()
        used.add(value.untyped_storage().data_ptr())
        out[name] = value
    return out
