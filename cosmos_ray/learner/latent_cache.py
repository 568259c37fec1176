"""A cache of encoded windows on disk: the tokenizer need not run at every training step.

The unit is the window, not the frame: Wan's VAE is causal in time, so the latents of a slot depend on the slots before it
(method section 0, fact 7). Values are float16: latents are standardised, far within its range, and on N(0, 1) data it rounds
to 2.1e-4 (root mean square) where bfloat16, for the same bytes, rounds to 1.7e-3.

Layout: ``<folder>/<fingerprint>/<time>-<pid>-<random>.arrow``. A file, called a segment, is written whole or not at all and
never changed; it is an Arrow IPC file of one record batch with the columns ``key`` (string), ``latents`` (fixed-size binary,
one row of float16 in C order) and ``crc32`` (uint32, of key and latents). Any number of processes add segments to one folder.
Everything in the cache can be made again: a damaged segment is deleted with a warning, and its windows are encoded anew.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.files.cache import LeastRecentlyUsed
from cosmos_ray.replay.files.durable import TEMPORARY, explained, make_directory, publish

logger = logging.getLogger(__name__)

VERSION = 1
SUFFIX = ".arrow"
STRAY_SECONDS = 3600.0  # age at which a temporary file counts as left behind by a killed writer

_DTYPE = np.dtype("<f2")
_FORMAT = b"cosmos_ray.latents"  # metadata key of what a row is


class LatentCache:
    """Arrays ``(C, slots, h, w)`` of windows, the image slots only, under keys.

    ``fingerprint`` (letters, digits, ``.``, ``_``, ``-``) must name everything that decides a latent besides its key: the
    tokenizer's weights, image size, slots, chunk and how a variant is augmented. ``shape`` is that of one window; segments of another
    shape or format are taken for damaged. Once the segments of this fingerprint hold ``limit_bytes``, nothing more is added;
    processes that write at the same time can exceed it by ``segment_bytes`` each. Segments of other fingerprints are neither
    counted nor deleted. ``open_limit`` bounds the segments kept mapped (each holds a file descriptor).

    One instance is meant for one thread. StoreError if the folder cannot be made; afterwards no state of the disk raises: a
    damaged segment is deleted, a vanished segment is forgotten, and a failed write ends all writing, each with a logged warning.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: str,
        shape: Sequence[int],
        limit_bytes: int,
        *,
        segment_bytes: int = 64 << 20,
        open_limit: int = 256,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", fingerprint):
            raise StoreError(f"latent cache fingerprint {fingerprint!r} must be 1 to 200 letters, digits, '.', '_' or '-'")
        self.path = Path(folder) / fingerprint
        self.shape = tuple(int(size) for size in shape)
        self.limit_bytes = limit_bytes
        self.segment_bytes = segment_bytes
        self._row_bytes = int(np.prod(self.shape)) * _DTYPE.itemsize
        self._index: dict[str, tuple[str, int]] = {}  # key -> segment and row
        self._sizes: dict[str, int] = {}  # known segment -> bytes of its file
        self._ignored: set[str] = set()  # damaged segments that could not be deleted
        self._open: LeastRecentlyUsed[str, _Segment] = LeastRecentlyUsed(open_limit)
        self._buffer: dict[str, np.ndarray] = {}  # rows that are not on disk yet
        self._full = False  # nothing is added any more
        with explained("create a latent cache in", self.path):
            make_directory(self.path)
        self.refresh()

    def __len__(self) -> int:
        """Number of windows that are known."""
        return len(self._index) + len(self._buffer)

    @property
    def stored_bytes(self) -> int:
        """Size of the known segments."""
        return sum(self._sizes.values())

    def get(self, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The known latents of ``B`` keys: a ``(B,)`` bool mask and ``(B, *shape)`` float16 latents, zero where the mask is False."""
        found = np.zeros(len(keys), dtype=bool)
        latents = np.zeros((len(keys), *self.shape), dtype=_DTYPE)
        for i, key in enumerate(keys):
            row = self._buffer.get(key)
            if row is None:
                row = self._read(key)
            if row is not None:
                latents[i] = row
                found[i] = True
        return found, latents

    def put(self, keys: Sequence[str], latents: np.ndarray) -> None:
        """Add ``(B, *shape)`` latents, rounded to float16, under ``B`` keys; keys that are known keep what they have.

        They are readable here at once, elsewhere and after a crash once their segment is written: see :meth:`flush`.
        StoreError for another shape or latents that are not finite in float16.
        """
        if latents.shape != (len(keys), *self.shape):
            raise StoreError(f"latents of shape {latents.shape} do not fit a cache of {self.shape} and {len(keys)} keys")
        with np.errstate(over="ignore"):
            rows = latents.astype(_DTYPE)
        if not np.isfinite(rows).all():
            raise StoreError("latents are not finite in float16: check the tokenizer and the frames it was given")
        for key, row in zip(keys, rows, strict=True):
            if self._full or key in self._index or key in self._buffer:
                continue
            if self.stored_bytes + (len(self._buffer) + 1) * self._row_bytes > self.limit_bytes:
                logger.warning("latent cache %s reached its limit of %d bytes: nothing more is added", self.path, self.limit_bytes)
                self._full = True
                continue
            self._buffer[key] = row
            if len(self._buffer) * self._row_bytes >= self.segment_bytes:
                self.flush()

    def flush(self) -> None:
        """Write the latents in memory as a segment, durably, without those that other processes have written meanwhile."""
        self.refresh()
        rows = {key: row for key, row in self._buffer.items() if key not in self._index}
        self._buffer = {}
        if not rows:
            return
        name = f"{time.time_ns()}-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
        try:
            make_directory(self.path)
            publish(memoryview(_encode(list(rows), np.stack(list(rows.values())))), self.path / name)
        except OSError as error:
            logger.warning("latent cache %s cannot be written, nothing more is added: %s", self.path, error)
            self._full = True
            return
        self._add(name)

    def refresh(self) -> None:
        """Take in segments written by other processes, and forget those that are gone."""
        try:
            with os.scandir(self.path) as entries:
                names = {entry.name for entry in entries}
        except OSError as error:
            logger.warning("latent cache %s cannot be listed: %s", self.path, error)
            names = set()
        for name in sorted(names - self._sizes.keys() - self._ignored):
            if name.endswith(SUFFIX):
                self._add(name)
            elif name.endswith(TEMPORARY):
                self._remove_stray(name)
        for name in self._sizes.keys() - names:
            self._forget(name)

    def close(self) -> None:
        """Flush, and let go of the mapped segments."""
        self.flush()
        self._open = LeastRecentlyUsed(self._open.limit)

    def _read(self, key: str) -> np.ndarray | None:
        """The row of ``key`` from its segment, or None."""
        if key not in self._index:
            return None
        name, row = self._index[key]
        segment = self._segment(name)
        if segment is None:
            return None
        latents = segment.row(row, key)
        if latents is None:
            self._discard(name, f"row {row} does not match its checksum")
        return latents

    def _add(self, name: str) -> None:
        """Index a segment."""
        segment = self._segment(name)
        if segment is not None:
            self._sizes[name] = segment.size
            for row, key in enumerate(segment.keys()):
                self._index.setdefault(key, (name, row))

    def _segment(self, name: str) -> _Segment | None:
        """The segment, mapped; None if it is damaged (deleted then) or gone."""
        segment = self._open.get(name)
        if segment is None:
            try:
                segment = _Segment(self.path / name, self.shape)
            except _DamagedSegment as error:
                self._discard(name, str(error))
                return None
            except OSError as error:
                logger.warning("latent cache segment %s cannot be opened: %s", self.path / name, error)
                self._forget(name)
                return None
            self._open.put(name, segment)
        return segment

    def _discard(self, name: str, reason: str) -> None:
        """Delete a damaged segment."""
        logger.warning("deleting latent cache segment %s: %s", self.path / name, reason)
        self._forget(name)
        try:
            os.unlink(self.path / name)
        except FileNotFoundError:
            pass  # another process was faster
        except OSError as error:
            logger.warning("latent cache segment %s cannot be deleted: %s", self.path / name, error)
            self._ignored.add(name)

    def _forget(self, name: str) -> None:
        self._open.drop(name)
        if self._sizes.pop(name, None) is not None:
            self._index = {key: place for key, place in self._index.items() if place[0] != name}

    def _remove_stray(self, name: str) -> None:
        path = self.path / name
        try:
            if time.time() - path.stat().st_mtime > STRAY_SECONDS:
                path.unlink()
        except FileNotFoundError:
            pass  # its writer is alive and done
        except OSError as error:
            logger.warning("temporary file %s of the latent cache stays: %s", path, error)


class _DamagedSegment(Exception):
    """The file is torn, foreign or of another format."""


class _Segment:
    """One file of the cache, mapped. Raises _DamagedSegment or, where the file cannot be opened, OSError."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.size = path.stat().st_size
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self._batch = reader.get_batch(0)
            self._batch.validate(full=True)
        except OSError as error:
            if error.errno is not None:  # the operating system's, not Arrow's complaint about the content
                raise
            raise _DamagedSegment(f"not a complete Arrow file: {error}") from error
        except (pa.ArrowException, ValueError) as error:
            raise _DamagedSegment(f"not a complete Arrow file: {error}") from error
        if not self._batch.num_rows or not self._batch.schema.equals(_schema(shape), check_metadata=True):
            raise _DamagedSegment(f"does not hold latents of shape {shape} in format {VERSION}")
        data, self._checksums = self._batch.column(1).buffers()[1], self._batch.column(2).to_numpy()
        self._rows = np.frombuffer(data, dtype=_DTYPE, count=len(self._checksums) * int(np.prod(shape))).reshape(-1, *shape)

    def keys(self) -> list[str]:
        """The key of every row."""
        return self._batch.column(0).to_pylist()

    def row(self, row: int, key: str) -> np.ndarray | None:
        """The latents of one row, in place; None if they or the key do not match the checksum."""
        latents = self._rows[row]
        return latents if _checksum(key, latents) == self._checksums[row] else None


def _schema(shape: tuple[int, ...]) -> pa.Schema:
    """Columns of a segment; the metadata says what a row is."""
    size = int(np.prod(shape)) * _DTYPE.itemsize
    columns = [("key", pa.string()), ("latents", pa.binary(size)), ("crc32", pa.uint32())]
    text = json.dumps({"version": VERSION, "dtype": _DTYPE.str, "shape": list(shape)})
    return pa.schema([pa.field(name, type, nullable=False) for name, type in columns], metadata={_FORMAT: text.encode()})


def _encode(keys: list[str], rows: np.ndarray) -> pa.Buffer:
    """The whole file of a segment in memory."""
    schema = _schema(rows.shape[1:])
    latents = pa.FixedSizeBinaryArray.from_buffers(schema.field("latents").type, len(rows), [None, pa.py_buffer(rows)])
    checksums = pa.array([_checksum(key, row) for key, row in zip(keys, rows, strict=True)], pa.uint32())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array(keys, pa.string()), latents, checksums], schema=schema))
    return sink.getvalue()


def _checksum(key: str, latents: np.ndarray) -> int:
    return zlib.crc32(latents.data, zlib.crc32(key.encode()))
