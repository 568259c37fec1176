"""HDF5 files of others, read with suspicion."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange.pixels import as_rgb
from cosmos_ray.replay.format.codec import MOST_PIXELS, decode_jpeg, encode_jpeg

ENDINGS = (".hdf5", ".h5", ".he5", ".hdf")
MOST_NAMES = 1_000_000  # of one list
MOST_BYTES = 1 << 30  # of one array: a file that claims more is not given the memory for it

#: First bytes, in small letters, of what is met under an HDF5 file's name or in its place.
_OTHER_KINDS = (
    (b"\x1f\x8b", "compressed by gzip: gunzip it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unzstd it first"),
    (b"\xfd7zxz", "compressed by xz: unxz it first"),
    (b"pk\x03\x04", "a zip archive, as .npz, .pt and zipped zarr are: unpack it, or write its episodes as HDF5"),
    (b"version https://git-lfs", "only a pointer to the file: run `git lfs pull`"),
    (b"<!doctype", "a web page, such as the notice of a download that failed: download the file again"),
    (b"<html", "a web page, such as the notice of a download that failed: download the file again"),
    (b"#rosbag", "a ROS bag: write its episodes as HDF5 or as a LeRobot dataset"),
    (b"\x89mcap", "an MCAP recording: write its episodes as HDF5 or as a LeRobot dataset"),
    (b"par1", "a Parquet file: import the LeRobot dataset that it is of, with --format lerobot"),
)


@contextmanager
def opened(path: str | Path) -> Iterator[h5py.File]:
    """The file open for reading; StoreError in one line if it is none or breaks while it is read."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        reason = _other_kind(Path(path)) or str(error).partition("\n")[0]
        raise StoreError(f"{path} cannot be read as HDF5: {reason}") from error


def _other_kind(path: Path) -> str:
    """What a file without HDF5's signature is, by its first bytes, and what to do; empty where that is not known."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return f"it is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else ""
    if not head:
        return "it is empty: copy it again"
    return next((f"it is {kind}" for start, kind in _OTHER_KINDS if head.lower().startswith(start)), "")


def check_format(file: h5py.File, wanted: str) -> None:
    """StoreError where the file is of another layout than that of ``--format wanted`` that is read here."""
    aloha, robomimic = is_group(file, "observations"), is_group(file, "data")
    cosmos = has(file, "actions") and any(has(file, f"primary_images{end}") for end in ("", "_jpeg"))
    layout = "aloha" if aloha else "robomimic" if robomimic else "cosmos" if cosmos else ""
    if layout and layout != wanted:
        raise StoreError(f"{file.filename} has another layout: import it with --format {layout}")
    if not layout:
        raise StoreError(f"{file.filename} has none of the layouts that are read (data/demo_0; action and observations/; actions and "
                         f"primary_images): it has {', '.join(sorted(file)[:8]) or 'nothing'}")


def group(parent: h5py.Group, name: str) -> h5py.Group:
    """A group of this very file. StoreError."""
    found = _own(parent, name)
    if not isinstance(found, h5py.Group):
        raise StoreError(f"{_where(parent)} has no group {name!r}")
    return found


def array(parent: h5py.Group, name: str, dtype: Any, dimensions: int) -> np.ndarray:
    """A numeric array of this very file, as ``dtype``. StoreError if it is missing, of other dimensions or too large."""
    found = _dataset(parent, name)
    if found.ndim != dimensions or found.dtype.kind not in "fiub" or found.size * np.dtype(dtype).itemsize > MOST_BYTES:
        raise StoreError(f"{_where(found)} is of shape {found.shape} and type {found.dtype}, not {dimensions} dimensions of numbers")
    with np.errstate(over="ignore"):
        values = found[()].astype(dtype)
    if np.dtype(dtype).kind == "f" and not np.isfinite(values).all():
        raise StoreError(f"{_where(found)} has values that are not finite, or too large for {np.dtype(dtype)}")
    return values


def images(parent: h5py.Group, name: str, flip: bool, rows: int, at: Sequence[int] | None = None) -> list[bytes] | None:
    """The JPEGs at the steps ``at`` (None: all) of ``rows`` from ``name_jpeg`` (bytes, taken over as they are unless they must be flipped)
    or ``name`` (pixels); None where there is neither. StoreError if they are no pictures, or not that many."""
    at = range(rows) if at is None else at
    if has(parent, f"{name}_jpeg"):
        found = _dataset(parent, f"{name}_jpeg")
        if found.ndim != 1 or h5py.check_vlen_dtype(found.dtype) != np.dtype(np.uint8):
            raise StoreError(f"{_where(found)} does not hold JPEG bytes")
        _expect(found, rows)
        return [encode_jpeg(decode_jpeg(found[t])[::-1]) if flip else _checked(found[t]) for t in at]
    if not has(parent, name):
        return None
    found = _dataset(parent, name)
    if found.ndim not in (3, 4) or not 0 < np.prod(found.shape[1:], dtype=np.int64) <= 4 * MOST_PIXELS:
        raise StoreError(f"{_where(found)} is of shape {found.shape} and type {found.dtype}, not of pictures of up to {MOST_PIXELS} pixels")
    _expect(found, rows)
    pictures = (as_rgb(found[t], _where(found)) for t in at)
    return [encode_jpeg(picture[::-1] if flip else picture) for picture in pictures]


def is_group(parent: h5py.Group, name: str) -> bool:
    """Whether there is a group of this very file under ``name``."""
    return isinstance(_own(parent, name), h5py.Group)


def is_picture(parent: h5py.Group, name: str) -> bool:
    """Whether a dataset is of (T, H, W, 3) uint8 pixels or of JPEG bytes, by its type alone."""
    found = _own(parent, name)
    if not isinstance(found, h5py.Dataset):
        return False
    pixels = found.ndim == 4 and found.shape[3] == 3 and found.dtype == np.uint8
    return pixels or (found.ndim == 1 and h5py.check_vlen_dtype(found.dtype) == np.dtype(np.uint8))


def names(parent: h5py.Group, name: str) -> list[str]:
    """The texts of a dataset of names, such as a filter of robomimic. StoreError."""
    found = _dataset(parent, name)
    if found.ndim != 1 or found.dtype.kind not in "OSU" or found.size > MOST_NAMES:
        raise StoreError(f"{_where(found)} is not a list of names")
    return [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in found[()]]


def files_of(path: Path) -> list[Path]:
    """The HDF5 files of a folder and of those in it, in order, or the path itself. StoreError for a folder that has none.

    Folders behind links count too, each once; so does a link to a file that is not there, for reading it to say so.
    """
    if not path.is_dir():
        return [path]
    found, seen = list[Path](), set[str]()
    for folder, folders, files in os.walk(path, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if os.path.realpath(Path(folder, name)) not in seen)
        found += [Path(folder, name) for name in files if Path(name).suffix.lower() in ENDINGS]
    found.sort()
    if not found:
        raise StoreError(f"there is no HDF5 file to import in {path}: give files, or a folder that has some")
    return found


def dataset_attribute(parent: h5py.Group, dataset: str, name: str) -> Any:
    """A plain attribute of a dataset; None where there is none of either."""
    found = _own(parent, dataset)
    return attribute(found, name) if found is not None else None


def attribute(node: h5py.Group | h5py.Dataset, name: str, default: Any = None) -> Any:
    """A plain attribute: text, number or flag."""
    value = node.attrs.get(name, default)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if isinstance(value, np.generic) else value


def text(parent: h5py.Group, name: str) -> str:
    """The text of a dataset that is one text; empty where there is none."""
    found = _own(parent, name)
    if not isinstance(found, h5py.Dataset) or found.size != 1 or found.dtype.kind not in "OSU" or found.is_virtual or found.external:
        return ""
    value = found[()] if not found.shape else found[0]
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def has(parent: h5py.Group, name: str) -> bool:
    """Whether there is something under ``name``; unlike ``in``, this follows no link and so opens no other file."""
    return parent.id.links.exists(name.encode())


def _own(parent: h5py.Group, name: str) -> Any:
    """An object of this file, None where there is none. StoreError for a link: it may lead out of the file, or in circles."""
    if not has(parent, name):
        return None
    if parent.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        link = parent.get(name, getlink=True)
        to = f"{link.path} of the file {link.filename}" if isinstance(link, h5py.ExternalLink) else getattr(link, "path", "elsewhere")
        raise StoreError(f"{_where(parent)}/{name} is a link to {to}, and links are not followed: copy what it leads to in its place "
                         "(h5copy -f ext,soft)")
    return parent.get(name)


def _dataset(parent: h5py.Group, name: str) -> h5py.Dataset:
    """A dataset whose bytes are in this file: HDF5 can also map parts of any other file the reader may open."""
    found = _own(parent, name)
    if not isinstance(found, h5py.Dataset):
        raise StoreError(f"{_where(parent)} has no dataset {name!r}")
    if found.is_virtual or found.external:
        raise StoreError(f"{_where(found)} leads to another file for its values: not followed")
    return found


def _checked(jpeg: np.ndarray) -> bytes:
    """The bytes of a JPEG that can be decoded. StoreError."""
    decode_jpeg(jpeg)
    return jpeg.tobytes()


def _expect(found: h5py.Dataset, rows: int) -> None:
    """Before anything is read: a shape costs its writer nothing."""
    if len(found) != rows:
        raise StoreError(f"{_where(found)} has {len(found)} rows, there are {rows} actions")


def _where(node: Any) -> str:
    return f"{node.file.filename}:{node.name}"
