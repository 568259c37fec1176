"""The file of one episode: an Arrow IPC file with one record batch, one row per state ``0..T``, and a JSON header.

Row ``t`` holds the state reached after ``t`` actions and the action taken there, so row ``T`` has no action: its
action columns are null. Columns:

========================  ============================  ==========================================================
``step``                  int32                         ``t``
``proprio``               fixed_size_list<float32>[p]
``state``                 fixed_size_list<float64>[S]   full restorable simulator state
``action``, ``label``     fixed_size_list<float32>[d]   null on row T
``reward``                float32                       null on row T
``policy_version``        int64                         null on row T
``predicted_value``       float32                       null on row T, nan where not predicted
``frame/<camera>``        large_binary                  JPEG, null where the step was not rendered
``frame_crc/<camera>``    uint32                        CRC-32 of the JPEG, 0 where there is none
========================  ============================  ==========================================================

The schema metadata carries ``cosmos_ray.version`` (of this layout), ``cosmos_ray.header`` (everything else about the
episode, as JSON) and ``cosmos_ray.crc32`` (of these two); every later version keeps these three. Arrow's own format has
no checksum, so the header lists one CRC-32 per column and every JPEG has its own: a flipped bit anywhere is found when
it is read instead of being trained on, and a window is checked without reading the rest of its episode.
No pickle: any Arrow reader opens these files. ``docs/replay.md`` describes the format for other projects.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from cosmos_ray import instants
from cosmos_ray.errors import StoreError
from cosmos_ray.replay.format.checksum import crc32
from cosmos_ray.replay.format.episode import Episode, EpisodeKey, EpisodeSummary, outcome

VERSION = 2
LONGEST = 10_000_000  # control steps of an episode: a header that claims more is not believed

VERSION_FIELD = b"cosmos_ray.version"
HEADER_FIELD = b"cosmos_ray.header"
CRC_FIELD = b"cosmos_ray.crc32"

# Column -> Episode attribute. The first two have T + 1 rows, the others T.
STATE_COLUMNS = {"proprio": "proprio", "state": "states"}
STEP_COLUMNS = {
    "action": "actions",
    "label": "labels",
    "reward": "rewards",
    "policy_version": "step_versions",
    "predicted_value": "predicted_values",
}
COLUMN_TYPES = {
    "proprio": pa.float32(),
    "state": pa.float64(),
    "action": pa.float32(),
    "label": pa.float32(),
    "reward": pa.float32(),
    "policy_version": pa.int64(),
    "predicted_value": pa.float32(),
}
VECTORS = ("proprio", "state", "action", "label")  # columns of fixed-size lists of that type


class DamagedEpisode(StoreError):
    """The file is torn, flipped, foreign or not of this schema: no version of this package can read it."""


class NewerSchema(StoreError):
    """The file is fine but was written by a newer version of this package."""


class Scratch:
    """Memory that is used for one episode after another: fresh pages cost more than the copy that fills them."""

    def __init__(self, keep: int = 256 << 20) -> None:
        self.keep = keep
        self._memory = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """``(size,)`` uint8, the same memory each time; more than ``keep`` is not held on to."""
        if size > self.keep:
            return np.empty(size, np.uint8)
        if size > len(self._memory):
            self._memory = np.empty(size + size // 4, np.uint8)
        return self._memory[:size]


def encode(episode: Episode, created: float | None = None, scratch: Scratch | None = None) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """The record batch of ``episode``, with its schema metadata, and the header as a dictionary.

    ``created`` are the Unix seconds of its commit, now by default. With ``scratch`` the frames of the batch lie there: it is
    good until that is used again. StoreError if ``episode.info`` is not JSON.
    """
    rows = episode.length + 1
    memory = (scratch or Scratch()).take(sum(len(image) for images in episode.frames.values() for image in images))
    columns: dict[str, pa.Array] = {"step": pa.array(np.arange(rows, dtype=np.int32))}
    checksums: dict[str, int] = {}
    for column, attribute in {**STATE_COLUMNS, **STEP_COLUMNS}.items():
        values = getattr(episode, attribute)
        columns[column] = _vectors(values, rows)
        checksums[column] = crc32(values)
    for index, camera in enumerate(episode.cameras):
        images = [episode.frames[t][index] if t in episode.frames else None for t in range(rows)]
        frames, crcs, memory = _frame_arrays(images, memory)
        columns[f"frame/{camera}"], columns[f"frame_crc/{camera}"] = frames, pa.array(crcs)
        checksums[f"frame/{camera}"] = offsets_crc(frame_buffers(frames)[0], crcs)
    header = {
        "run": episode.key.run,
        "task": episode.key.task,
        "source": episode.key.source,
        "seed": int(episode.key.seed),
        "attempt": int(episode.key.attempt),
        "initial_state": episode.key.initial_state,
        "created": time.time() if created is None else created,
        "instruction": episode.instruction,
        "cameras": list(episode.cameras),
        "success": bool(episode.success),
        "return": float(episode.episode_return),
        "length": episode.length,
        "timed_out": bool(episode.timed_out),
        "invalid": episode.invalid,
        "policy_version": int(episode.policy_version),
        "frame_ranges": to_ranges(sorted(episode.frames)),
        "bytes": sum(array.nbytes for array in columns.values()),
        "checksums": checksums,
        "info": episode.info,
    }
    if episode.score is not None:
        header["score"] = float(episode.score)
    try:
        text = json.dumps(header, default=_jsonable).encode()
    except (TypeError, ValueError) as error:
        raise StoreError(f"episode {episode.key.name}: info is not JSON ({error}); store plain values only") from error
    number = str(VERSION).encode()
    metadata = {VERSION_FIELD: number, HEADER_FIELD: text, CRC_FIELD: header_crc(number, text)}
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    return batch.replace_schema_metadata(metadata), header


def write(batch: pa.RecordBatch, sink: Any) -> None:
    """Write ``batch`` to ``sink`` (a file open for writing or an Arrow output stream) as an Arrow IPC file."""
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
        instants.passes("commit")


def read_header(metadata: dict[bytes, bytes] | None, where: str) -> dict[str, Any]:
    """The checked header from the metadata entries of the file ``where``. DamagedEpisode or NewerSchema."""
    metadata = metadata or {}
    if VERSION_FIELD not in metadata:
        raise DamagedEpisode(f"{where} is an Arrow file but not a cosmos_ray episode")
    number, text = metadata[VERSION_FIELD], metadata.get(HEADER_FIELD, b"")
    if header_crc(number, text) != metadata.get(CRC_FIELD):
        raise DamagedEpisode(f"{where} has a header that does not match its checksum")
    try:
        version = int(number)
        if version > VERSION:
            raise NewerSchema(f"{where} has schema version {version}, this package reads up to {VERSION}: upgrade cosmos_ray")
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedEpisode(f"{where} has a header that is not JSON: {type(error).__name__}") from error
    if version < VERSION or not isinstance(header, dict):
        raise DamagedEpisode(f"{where} has a header of version {version} that does not describe an episode")
    return header


def summarise(header: dict[str, Any], rows: int | None, size: int, where: str) -> EpisodeSummary:
    """The summary in a header whose record batch has ``rows`` rows (None: not known yet), in a file of ``size`` bytes
    (where the header does not say how many are its own). DamagedEpisode."""
    try:
        key = EpisodeKey(**{name: _typed(header, name, of) for name, of in _KEY_FIELDS.items()})
        length: int = _typed(header, "length", int)
        if not 1 <= length <= LONGEST or rows not in (length + 1, None):
            raise ValueError(f"{rows} rows for a length of {length}")
        return EpisodeSummary(
            key=key,
            name=key.name,
            path=where,
            success=_typed(header, "success", bool),
            score=outcome(header["success"], header.get("score")),
            episode_return=float(header["return"]),
            length=length,
            timed_out=_typed(header, "timed_out", bool),
            invalid=_typed(header, "invalid", str),
            policy_version=_typed(header, "policy_version", int),
            frame_ranges=checked_ranges(header["frame_ranges"], length),
            created=float(header["created"]),
            size=_typed({"bytes": size, **header}, "bytes", int),
        )
    except (KeyError, TypeError, ValueError, OverflowError, StoreError) as error:
        raise DamagedEpisode(f"{where} has a header that does not describe an episode: {error!r}") from error


_KEY_FIELDS: dict[str, type] = {"run": str, "task": str, "source": str, "seed": int, "attempt": int, "initial_state": str}


def _typed(header: dict[str, Any], name: str, of: type) -> Any:
    """An entry of the header that must be of this very type (a bool is no int), and fit 64 bits."""
    value = header[name]
    too_large = isinstance(value, int) and not -(2**63) <= value < 2**63
    if type(value) is not of or too_large:
        raise TypeError(f"{name} is {str(value)[:40]!r}, not {of.__name__}")
    return value


# ---------------------------------------------------------------- which steps have frames


def to_ranges(steps: Iterable[int]) -> list[list[int]]:
    """Ascending steps as ``[start, stop, stride]`` with Python's meaning of a range; steps at one distance share one."""
    ranges: list[list[int]] = []
    for step in steps:
        last = ranges[-1] if ranges else None
        if last and last[1] == last[0] + 1 and step > last[0]:  # a single step takes the next one at any distance
            ranges[-1] = [last[0], step + 1, step - last[0]]
        elif last and last[1] > last[0] + 1 and step == last[1] - 1 + last[2]:
            last[1] = step + 1
        else:
            ranges.append([step, step + 1, 1])
    return ranges


def checked_ranges(ranges: Any, length: int) -> tuple[tuple[int, int, int], ...]:
    """``ranges`` as tuples; ValueError or TypeError unless they describe ascending steps within ``0..length``."""
    if not isinstance(ranges, list):
        raise TypeError("frame ranges must be a list")
    out, after = [], -1
    for start, stop, stride in ranges:
        if not all(type(number) is int for number in (start, stop, stride)):
            raise TypeError("frame ranges must be whole numbers")
        if not after < start < stop <= length + 1 or stride < 1 or (stop - 1 - start) % stride:
            raise ValueError(f"frame range {start}:{stop}:{stride} does not fit {length} steps")
        out.append((start, stop, stride))
        after = stop - 1
    return tuple(out)


# ---------------------------------------------------------------- columns


def frame_buffers(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (n + 1,) int64 and bytes of a large_binary array, read in place."""
    _, offsets, data = array.buffers()
    start = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    return start, np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, np.uint8)


def offsets_crc(offsets: np.ndarray, crcs: np.ndarray) -> int:
    """Checksum of where the frames of a column lie and of their own checksums."""
    return crc32(crcs, crc32(offsets - offsets[0]))


def header_crc(version: bytes, text: bytes) -> bytes:
    return str(crc32(version + text)).encode()


def _frame_arrays(images: list[bytes | None], memory: np.ndarray) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """A large_binary column of JPEGs (None: null) at the front of ``memory``, their checksums, and the memory behind."""
    sizes = [len(image) if image is not None else 0 for image in images]
    offsets = np.zeros(len(images) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    target: Any = memory.data
    for start, image in zip(offsets.tolist(), images, strict=False):
        if image is not None:
            target[start : start + len(image)] = image
    total = int(offsets[-1])
    validity = None if all(sizes) else pa.array([image is not None for image in images]).buffers()[1]
    buffers = [validity, pa.py_buffer(offsets), pa.py_buffer(memory[:total])]
    crcs = np.array([crc32(image) if image is not None else 0 for image in images], np.uint32)
    return pa.Array.from_buffers(pa.large_binary(), len(images), buffers), crcs, memory[total:]


def _vectors(values: np.ndarray, rows: int) -> pa.Array:
    """Arrow column of ``(n,)`` or ``(n, d)`` values, with null rows appended up to ``rows``."""
    missing = rows - len(values)
    if missing:
        values = np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])
    mask = np.arange(rows) >= rows - missing
    if values.ndim == 1:
        return pa.array(values, mask=mask, from_pandas=False)
    flat = pa.array(values.reshape(-1), from_pandas=False)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(mask) if missing else None)


def _jsonable(value: Any) -> Any:
    """Numpy scalars and arrays as plain numbers and lists."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r}")
