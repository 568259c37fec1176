"""torch.distributed.checkpoint folders, as the public trainer writes them: ``iter_XXXXXXXXX/model/``, from any number of ranks."""

from __future__ import annotations

import math
import pathlib
import warnings
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

from cosmos_ray import safe_pickle
from cosmos_ray.errors import CheckpointError
from cosmos_ray.model.exchange.files import DCP_METADATA as METADATA
from cosmos_ray.model.exchange.files import reason, replacing
from cosmos_ray.model.exchange.names import prefixed, public_names

#: All that a ``.metadata`` pickle may name: records without behaviour. Paths in it are never followed.
_ALLOWED = {
    **{(record.__module__, record.__name__): record for record in (
        metadata.Metadata, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata,
        metadata.TensorProperties, metadata.MetadataIndex, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo)},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{(module, f"{system}Path"): getattr(pathlib, f"Pure{system}Path")
       for module in ("pathlib", "pathlib._local") for system in ("Posix", "Windows")},
}


def read_dcp(folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a DCP folder, or in the ``model`` folder below it, under public names; a single process reads all shards.

    Only tensors are read, never stored objects. CheckpointError for an unfinished save, a missing or truncated shard, and a
    ``.metadata`` that asks for anything but DCP's own records.
    """
    folder = dcp_folder(folder)
    record = _read_metadata(folder)
    try:
        names = _tensor_names(folder, record)
        tensors = {name: torch.empty(item.size, dtype=item.properties.dtype)
                   for name, item in record.state_dict_metadata.items()
                   if name in names and isinstance(item, metadata.TensorStorageMetadata)}
    except safe_pickle.DAMAGED as error:
        raise CheckpointError(f"{folder / METADATA} is damaged ({reason(error)}): copy the folder again") from error
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=_Reader(folder, record), planner=planner, no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: a shard is damaged ({_reason(error)}): copy the folder again") from error
    return {public: tensors[name] for name, public in names.items()}


def write_dcp(tensors: Mapping[str, torch.Tensor], folder: str | Path, overwrite: bool = False) -> None:
    """Write ``tensors`` under ``net.`` names as the DCP folder ``folder``, which appears when it is complete."""
    state = prefixed(tensors)
    with replacing(folder, overwrite) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save(state, storage_writer=_Writer(temporary), no_dist=True)
        except CheckpointException as error:
            raise CheckpointError(f"cannot write {folder}: {_reason(error)}: choose a writable place with enough space") from error


def dcp_folder(path: str | Path) -> Path:
    """``path`` or its ``model`` folder, whichever is a complete DCP folder. CheckpointError when neither is."""
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / METADATA).is_file():
            return folder
        if any(folder.glob("*.distcp")):
            raise CheckpointError(f"{folder} has shards but no {METADATA}: the save did not finish, or the file was not copied")
    raise CheckpointError(f"{path} is no DCP folder: it has no {METADATA}, nor has its model folder")


class _Reader(dcp.FileSystemReader):
    """Hands out metadata that was read and checked before; the base class would unpickle whatever the file holds."""

    def __init__(self, folder: Path, record: metadata.Metadata):
        super().__init__(folder)
        self._record = record

    def read_metadata(self) -> metadata.Metadata:
        return self._record


class _Writer(dcp.FileSystemWriter):
    """Leaves the path of the temporary folder out of the metadata."""

    def storage_meta(self) -> metadata.StorageMeta:
        return metadata.StorageMeta()


def _read_metadata(folder: Path) -> metadata.Metadata:
    file = folder / METADATA
    try:
        with open(file, "rb") as opened:
            record = safe_pickle.load(opened, _ALLOWED, str(file))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    if not isinstance(record, metadata.Metadata):
        raise CheckpointError(f"{file} holds a {type(record).__name__}, no DCP metadata: copy it again")
    return record


def _tensor_names(folder: Path, record: metadata.Metadata) -> dict[str, str]:
    """{stored name: public name} of the tensors to read, after a check that the shards hold all that ``record`` promises.

    Whatever a damaged ``record`` makes Python raise is for the caller to explain.
    """
    stored = {name: item for name, item in record.state_dict_metadata.items() if isinstance(item, metadata.TensorStorageMetadata)}
    names = public_names(stored, str(folder))
    for name in names:
        if not _tiles(stored[name].size, stored[name].chunks):
            raise CheckpointError(f"{folder}: the shards do not cover key {name} exactly: copy the folder again")
        for chunk in stored[name].chunks:
            if numel := math.prod(chunk.sizes):
                entry = record.storage_data[metadata.MetadataIndex(name, chunk.offsets)]
                _check_entry(folder, entry, numel * stored[name].properties.dtype.itemsize)
    return names


def _check_entry(folder: Path, entry: filesystem._StorageInfo, size: int) -> None:
    """CheckpointError unless ``entry`` lies in a shard of ``folder`` and is long enough for a tensor of ``size`` bytes."""
    shard = folder / entry.relative_path
    if shard.parent != folder:
        raise CheckpointError(f"{folder / METADATA} points to {entry.relative_path}, outside of its folder: refused")
    if not shard.is_file():
        raise CheckpointError(f"{folder}: shard {shard.name} is missing: copy the whole folder")
    end, actual = entry.offset + entry.length, shard.stat().st_size
    if actual < end:
        raise CheckpointError(f"{folder}: shard {shard.name} is truncated, {actual} bytes of at least {end}: copy it again")
    if entry.offset < 0 or (entry.length < size and not entry.transform_descriptors):
        raise CheckpointError(f"{folder / METADATA} is damaged: an entry of {shard.name} is too short: copy the folder again")


def _tiles(size: torch.Size, chunks: list[metadata.ChunkStorageMetadata]) -> bool:
    """Whether the chunks fill a tensor of ``size``: each inside it, no two overlapping, of its volume together."""
    boxes = [[range(o, o + s) for o, s in zip(c.offsets, c.sizes, strict=True)] for c in chunks if math.prod(c.sizes)]
    inside = all(0 <= side.start and side.stop <= n for box in boxes for side, n in zip(box, size, strict=True))
    apart = all(any(a.stop <= b.start or b.stop <= a.start for a, b in zip(*pair, strict=True)) for pair in combinations(boxes, 2))
    return inside and apart and sum(math.prod(map(len, box)) for box in boxes) == math.prod(size)


def _reason(error: CheckpointException) -> str:
    """The first failure in one line. An interruption that DCP caught goes on as one."""
    first = next(iter(error.failures.values()))[0]
    if not isinstance(first, Exception):
        raise first
    return reason(first)
