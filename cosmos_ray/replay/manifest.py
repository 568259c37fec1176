"""The index of a store as a file. With this cache, opening a store opens no episode; deleting the cache costs time, not data."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pyarrow as pa

from cosmos_ray.replay.files.storage import Storage
from cosmos_ray.replay.format.checksum import crc32
from cosmos_ray.replay.format.schema import checked_ranges
from cosmos_ray.replay.index import COLUMNS, TABLES, EpisodeIndex, numbers

logger = logging.getLogger(__name__)

FILE = "manifest.arrow"
VERSION = 3

_HEADER = b"cosmos_ray.manifest"


def save_manifest(storage: Storage, store_id: str, index: EpisodeIndex, scanned: dict[str, dict[str, Any]]) -> None:
    """Write the episodes of ``index`` and the states of the scans that found them. OSError if the file cannot be written."""
    rows = np.flatnonzero(index.alive)
    names = [index.names[row] for row in rows]
    columns = {name: index[name][rows] for name in COLUMNS}
    header = {"version": VERSION, "store": store_id, "scanned": scanned, "crc32": _checksum(names, columns),
              "tables": {name: index.tables[name].values for name in TABLES}}
    arrays = {name: pa.array(column.astype(_stored(column.dtype))) for name, column in columns.items()}
    batch = pa.RecordBatch.from_pydict({"name": pa.array(names, pa.string()), **arrays})
    text = json.dumps(header).encode()
    batch = batch.replace_schema_metadata({_HEADER: text, _HEADER + b".crc32": str(crc32(text)).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    storage.replace(FILE, memoryview(sink.getvalue()))


def load_manifest(storage: Storage, store_id: str, index: EpisodeIndex) -> dict[str, dict[str, Any]] | None:
    """Fill the empty ``index`` and return the states of the scans; None, and no change, where there is no usable manifest."""
    try:
        if not storage.exists(FILE):
            return None
        batch = pa.ipc.open_file(pa.py_buffer(storage.read(FILE))).get_batch(0)
        batch.validate(full=True)
        metadata = batch.schema.metadata or {}
        text = metadata[_HEADER]
        header = json.loads(text)
        if metadata[_HEADER + b".crc32"] != str(crc32(text)).encode():
            raise ValueError("its header does not match its checksum")
        if header["version"] != VERSION:
            raise ValueError(f"it is of version {header['version']}")
        if header["store"] != store_id:
            raise ValueError("it is another store's")
        names = batch.column("name").to_pylist()
        columns = {name: numbers(batch.column(name), _stored(dtype)) for name, dtype in COLUMNS.items()}
        if _checksum(names, columns) != header["crc32"]:
            raise ValueError("its columns do not match their checksum")
        tables = {name: list(header["tables"][name]) for name in TABLES}
        longest = int(columns["length"].max()) if batch.num_rows else 0
        tables["frames"] = [checked_ranges(ranges, longest) for ranges in tables["frames"]]
        scanned = {area: dict(state) for area, state in header["scanned"].items()}
        index.load(batch.column("name"), columns, tables)
        return scanned
    except (OSError, pa.ArrowException, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        logger.warning("ignoring the manifest %s, every episode is opened instead: %s", storage.where(FILE), str(error).partition("\n")[0])
        return None


def _stored(dtype: type) -> type:
    """Truth values as bytes, because Arrow's are bits."""
    return np.uint8 if dtype == np.bool_ else dtype


def _checksum(names: list[str], columns: dict[str, np.ndarray]) -> int:
    """CRC-32 over all values."""
    value = crc32("\n".join(names).encode())
    for name in COLUMNS:
        value = crc32(np.ascontiguousarray(columns[name]), value)
    return value
