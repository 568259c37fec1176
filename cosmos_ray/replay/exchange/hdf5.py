"""HDF5 files of others, read with suspicion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.codec import decode_jpeg, encode_jpeg

MOST_BYTES = 8 << 30  # of one array: a file that claims more is not given the memory for it


@contextmanager
def opened(path: str | Path) -> Iterator[h5py.File]:
    """The file open for reading; StoreError in one line if it is none or breaks while it is read."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise StoreError(f"{path} cannot be read as HDF5: {reason}") from error


def group(parent: h5py.Group, name: str) -> h5py.Group:
    """A group of this very file. StoreError."""
    found = _own(parent, name)
    if not isinstance(found, h5py.Group):
        raise StoreError(f"{_where(parent)} has no group {name!r}")
    return found


def array(parent: h5py.Group, name: str, dtype: Any, dimensions: int) -> np.ndarray:
    """A numeric array of this very file, as ``dtype``. StoreError if it is missing, of other dimensions or too large."""
    found = _own(parent, name)
    if not isinstance(found, h5py.Dataset):
        raise StoreError(f"{_where(parent)} has no dataset {name!r}")
    if found.ndim != dimensions or found.dtype.kind not in "fiub" or found.size * np.dtype(dtype).itemsize > MOST_BYTES:
        raise StoreError(f"{_where(found)} is of shape {found.shape} and type {found.dtype}, not {dimensions} dimensions of numbers")
    values = found[()].astype(dtype)
    if np.dtype(dtype).kind == "f" and not np.isfinite(values).all():
        raise StoreError(f"{_where(found)} has values that are not finite")
    return values


def images(parent: h5py.Group, name: str, flip: bool) -> list[bytes] | None:
    """One JPEG per step from ``name_jpeg`` (bytes, taken over as they are unless they must be flipped) or ``name`` (pixels); None
    where there is neither. StoreError if they are no pictures."""
    if f"{name}_jpeg" in parent:
        found = _own(parent, f"{name}_jpeg")
        if not isinstance(found, h5py.Dataset) or found.ndim != 1 or h5py.check_vlen_dtype(found.dtype) != np.dtype(np.uint8):
            raise StoreError(f"{_where(parent)}/{name}_jpeg does not hold JPEG bytes")
        decoded = ((jpeg.tobytes(), decode_jpeg(jpeg)) for jpeg in found)
        return [encode_jpeg(image[::-1]) if flip else jpeg for jpeg, image in decoded]
    if name not in parent:
        return None
    found = _own(parent, name)
    if not isinstance(found, h5py.Dataset) or found.ndim != 4 or found.shape[3] != 3 or found.dtype != np.uint8:
        raise StoreError(f"{_where(parent)}/{name} is not of (T, H, W, 3) uint8 pictures")
    return [encode_jpeg(found[t][::-1] if flip else found[t]) for t in range(len(found))]


def attribute(node: h5py.Group, name: str, default: Any = None) -> Any:
    """A plain attribute: text, number or flag."""
    value = node.attrs.get(name, default)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if isinstance(value, np.generic) else value


def _own(parent: h5py.Group, name: str) -> Any:
    """An object of this file: links out of it are not followed."""
    link = parent.get(name, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        raise StoreError(f"{_where(parent)}/{name} leads to another file, {link.filename!r}: not followed")
    return parent.get(name)


def _where(node: Any) -> str:
    return f"{node.file.filename}:{node.name}"
