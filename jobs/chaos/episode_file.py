"""The format of an episode's file, as far as damaging it needs: where what lies, and how to write one again with valid checksums."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cosmos_ray.replay.format.schema import CRC_FIELD, HEADER_FIELD, STATE_COLUMNS, STEP_COLUMNS, VERSION_FIELD

NUMBERS = (*STATE_COLUMNS, *STEP_COLUMNS)  # the columns of a training window that are not frames


@dataclass
class Regions:
    """Byte ranges of an Arrow file with one batch."""

    front: tuple[int, int]  # magic and schema message, before the first batch
    batch: tuple[int, int]  # the flatbuffer that describes the batch
    body: tuple[int, int]
    footer: tuple[int, int]
    offsets: list[tuple[int, int]]  # of the frame columns
    frames: list[tuple[int, int]]  # their bytes
    columns: list[tuple[int, int]]  # the values of the other columns
    padding: list[tuple[int, int]]  # between the buffers


class EpisodeFile:
    """The file of one episode, taken apart: change ``batch``, ``header`` or ``version``, then :meth:`write`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self._buffer = pa.py_buffer(self.data)
        reader = pa.ipc.open_file(pa.BufferReader(self._buffer))
        self.batch: pa.RecordBatch = reader.get_batch(0)
        metadata = reader.schema.metadata
        self.version: bytes = metadata[VERSION_FIELD]
        self.header: dict[str, Any] = json.loads(metadata[HEADER_FIELD])

    def regions(self) -> Regions:
        """Where the parts of the unchanged file lie."""
        offsets, frames, columns = [], [], []
        taken: list[tuple[int, int]] = []
        for name, array in zip(self.batch.schema.names, self.batch.columns, strict=True):
            spans = [self._span(buffer) for buffer in array.buffers() if buffer is not None and buffer.size]
            taken += spans
            if name.startswith("frame/"):
                offsets.append(spans[-2])
                frames.append(spans[-1])
            else:
                columns.append(spans[-1])
        taken.sort()
        body = taken[0][0], taken[-1][1]
        padding = [(a[1], b[0]) for a, b in zip(taken, taken[1:], strict=False) if b[0] > a[1]]
        # A message begins with ffffffff and its length; the last one before the body is the batch's.
        batch = self.data.rindex(b"\xff\xff\xff\xff", 0, body[0])
        footer = len(self.data) - 10 - int.from_bytes(self.data[-10:-6], "little")
        return Regions((0, batch), (batch, body[0]), body, (footer, len(self.data)), offsets, frames, columns, padding)

    def seal(self) -> None:
        """Compute the checksums in the header anew from the columns as they are."""
        sums = self.header["checksums"]
        for name in NUMBERS:
            rows = self.header["length"] + (name in STATE_COLUMNS)
            array = self.batch.column(name).slice(0, rows)
            values = array.flatten() if pa.types.is_fixed_size_list(array.type) else array
            sums[name] = zlib.crc32(values.to_numpy(zero_copy_only=False))
        for name in self.batch.schema.names:
            if name.startswith("frame/"):
                sums[name] = self._frames_crc(name, *frame_buffers(self.batch.column(name)))

    def write(self, *, text: bytes | None = None, batches: list[pa.RecordBatch] | None = None,
              metadata: Callable[[dict[bytes, bytes]], object] | None = None, compression: str | None = None) -> None:
        """Write the file again, its header sealed. ``text`` replaces the header's JSON, ``batches`` the one batch, ``metadata``
        changes the sealed metadata last."""
        text = json.dumps(self.header).encode() if text is None else text
        fields = {VERSION_FIELD: self.version, HEADER_FIELD: text, CRC_FIELD: str(zlib.crc32(self.version + text)).encode()}
        if metadata is not None:
            metadata(fields)
        batches = [self.batch] if batches is None else batches
        schema = (batches[0] if batches else self.batch).schema.with_metadata(fields)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
            for batch in batches:
                writer.write_batch(batch.replace_schema_metadata(fields))
        self.path.write_bytes(sink.getvalue())

    def replace_column(self, name: str, array: pa.Array | None, rename: str | None = None) -> None:
        """Put ``array`` where the column ``name`` is; None drops it."""
        index = self.batch.schema.get_field_index(name)
        names, arrays = list(self.batch.schema.names), list(self.batch.columns)
        if array is None:
            del names[index], arrays[index]
        else:
            names[index], arrays[index] = rename or name, array
        self.batch = pa.RecordBatch.from_arrays(arrays, names=names)

    def set_frames(self, camera: str, offsets: np.ndarray, data: bytes) -> None:
        """Give the frames of ``camera`` other offsets (T + 2,) and bytes; the checksum of each frame follows."""
        old = self.batch.column(f"frame/{camera}")
        buffers = [old.buffers()[0], pa.py_buffer(np.ascontiguousarray(offsets, np.int64)), pa.py_buffer(data)]
        self.replace_column(f"frame/{camera}", pa.Array.from_buffers(pa.large_binary(), len(old), buffers))
        crcs = [zlib.crc32(data[a:b]) if b > a else 0 for a, b in zip(offsets, offsets[1:], strict=False)]
        self.replace_column(f"frame_crc/{camera}", pa.array(np.array(crcs, np.uint32)))

    def write_offsets(self, camera: str, offsets: np.ndarray) -> None:
        """Write the file with these frame offsets (T + 2,) of ``camera``, and the checksum that fits them: Arrow itself refuses to
        make such a column, so they are put into the file afterwards."""
        name = f"frame/{camera}"
        data = frame_buffers(self.batch.column(name))[1]
        self.header["checksums"][name] = self._frames_crc(name, offsets, data)
        self.write()
        written = EpisodeFile(self.path)
        start, stop = written.regions().offsets[self.header["cameras"].index(camera)]
        new = bytearray(written.data)
        new[start : start + offsets.nbytes] = offsets.tobytes()
        self.path.write_bytes(new)

    def _frames_crc(self, name: str, offsets: np.ndarray, data: np.ndarray) -> int:
        with np.errstate(over="ignore"):
            relative = offsets - offsets[0]
        return zlib.crc32(self.batch.column(name.replace("frame/", "frame_crc/")).to_numpy(), zlib.crc32(relative))

    def _span(self, buffer: pa.Buffer) -> tuple[int, int]:
        start = buffer.address - self._buffer.address
        return start, start + buffer.size


def frame_buffers(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (n + 1,) int64 and the bytes of a large_binary column."""
    _, offsets, data = array.buffers()
    return np.frombuffer(offsets, np.int64)[: len(array) + 1], np.frombuffer(data, np.uint8)
