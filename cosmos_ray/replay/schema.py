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
========================  ============================  ==========================================================

The schema metadata carries ``cosmos_ray.version`` (of this layout), ``cosmos_ray.header`` (everything else about the
episode, as JSON) and ``cosmos_ray.crc32`` (of these two); every later version keeps these three. Arrow's own format has
no checksum, so the header lists one CRC-32 per column, and a flipped bit anywhere in header or data is found when it is
read instead of being trained on.
No pickle: any Arrow reader opens these files.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
import pyarrow as pa

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.episode import Episode, EpisodeKey, EpisodeSummary, outcome

VERSION = 1

_VERSION = b"cosmos_ray.version"
_HEADER = b"cosmos_ray.header"
_CRC = b"cosmos_ray.crc32"

# Column -> Episode attribute. The first two have T + 1 rows, the others T.
_STATE_COLUMNS = {"proprio": "proprio", "state": "states"}
_STEP_COLUMNS = {
    "action": "actions",
    "label": "labels",
    "reward": "rewards",
    "policy_version": "step_versions",
    "predicted_value": "predicted_values",
}
_DTYPES = {"state": np.float64, "policy_version": np.int64}  # every other column is float32


class DamagedEpisode(StoreError):
    """The file is torn, flipped, foreign or not of this schema: no version of this package can read it."""


class NewerSchema(StoreError):
    """The file is fine but was written by a newer version of this package."""


def encode(episode: Episode) -> pa.Buffer:
    """The whole file of ``episode`` in memory; StoreError if ``episode.info`` is not JSON."""
    columns: dict[str, pa.Array] = {"step": pa.array(np.arange(episode.length + 1, dtype=np.int32))}
    checksums: dict[str, int] = {}
    for column, attribute in {**_STATE_COLUMNS, **_STEP_COLUMNS}.items():
        values = getattr(episode, attribute)
        columns[column] = _vectors(values, episode.length + 1)
        checksums[column] = zlib.crc32(values)
    for index, camera in enumerate(episode.cameras):
        images = [episode.frames[t][index] if t in episode.frames else None for t in range(episode.length + 1)]
        array = pa.array(images, type=pa.large_binary())
        columns[f"frame/{camera}"] = array
        checksums[f"frame/{camera}"] = _frames_crc(*_frame_buffers(array))
    header = {
        "run": episode.key.run,
        "task": episode.key.task,
        "source": episode.key.source,
        "seed": int(episode.key.seed),
        "attempt": int(episode.key.attempt),
        "instruction": episode.instruction,
        "cameras": list(episode.cameras),
        "success": bool(episode.success),
        "return": float(episode.episode_return),
        "length": episode.length,
        "timed_out": bool(episode.timed_out),
        "invalid": episode.invalid,
        "policy_version": int(episode.policy_version),
        "frame_steps": sorted(episode.frames),
        "checksums": checksums,
        "info": episode.info,
    }
    if episode.score is not None:
        header["score"] = float(episode.score)
    try:
        text = json.dumps(header, default=_jsonable).encode()
    except (TypeError, ValueError) as error:
        raise StoreError(f"episode {episode.key.name}: info is not JSON ({error}); store plain values only") from error
    version = str(VERSION).encode()
    metadata = {_VERSION: version, _HEADER: text, _CRC: _header_crc(version, text)}
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns)).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


class EpisodeView:
    """A stored episode read in place: numpy views of the columns, no copy, JPEG bytes on demand.

    Opening reads the footer only. Arrays are read-only and stay valid as long as anything refers to them. Raises
    DamagedEpisode, NewerSchema or OSError (among them FileNotFoundError).
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            # The file is mapped, not read; pages come in as the views are touched.
            reader = pa.ipc.open_file(pa.memory_map(path))
            self.header = _header(reader.schema, path)
            self.length: int = self.header["length"]
            self.cameras = tuple(self.header["cameras"])
            self.instruction: str = self.header["instruction"]
            self._reader = reader
            self._batch: pa.RecordBatch | None = None
            self._columns: dict[str, np.ndarray] = {}  # those that were asked for and checked
            self._frames: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        except OSError as error:
            if error.errno is not None:  # the operating system's, not Arrow's complaint about the content
                raise
            raise DamagedEpisode(f"{path} is not a complete Arrow file: {error}") from error
        except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise DamagedEpisode(f"{path} is not a complete episode file: {error}") from error

    @property
    def summary(self) -> EpisodeSummary:
        """What the header says, without touching data pages."""
        header = self.header
        try:
            key = EpisodeKey(*(header[name] for name in ("run", "task", "source", "seed", "attempt")))
            return EpisodeSummary(
                key=key,
                name=key.name,
                path=self.path,
                success=header["success"],
                score=outcome(header["success"], header.get("score")),
                episode_return=header["return"],
                length=header["length"],
                timed_out=header["timed_out"],
                invalid=header["invalid"],
                policy_version=header["policy_version"],
                frame_steps=np.array(header["frame_steps"], dtype=np.int32),
            )
        except (KeyError, TypeError, ValueError, StoreError) as error:
            raise DamagedEpisode(f"{self.path} has a header that does not describe an episode: {error!r}") from error

    def column(self, name: str) -> np.ndarray:
        """Rows of one non-frame column, ``(T + 1, n)`` or ``(T, ...)``, checked once against its CRC-32."""
        if name in self._columns:
            return self._columns[name]
        rows = self.length + (name in _STATE_COLUMNS)
        dtype = _DTYPES.get(name, np.float32)
        try:
            array = self._array(name).slice(0, rows)
            if pa.types.is_fixed_size_list(array.type):
                values = array.flatten().to_numpy(zero_copy_only=True).reshape(rows, array.type.list_size)
            else:
                values = array.to_numpy(zero_copy_only=True)
        except (pa.ArrowException, ValueError) as error:
            raise DamagedEpisode(f"{self.path}: column {name} cannot be read: {error}") from error
        if values.dtype != dtype or zlib.crc32(values) != self.header["checksums"].get(name):
            raise DamagedEpisode(f"{self.path}: column {name} does not match its checksum or type")
        self._columns[name] = values
        return values

    def frame_column(self, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """``(T + 2,)`` int64 offsets into the uint8 bytes of all JPEGs of ``camera``; step ``t`` has
        ``data[offsets[t]:offsets[t + 1]]``, empty if it was not rendered. Checked once against the CRC-32."""
        name = f"frame/{camera}"
        if camera in self._frames:
            return self._frames[camera]
        array = self._array(name)
        if array.type != pa.large_binary():
            raise DamagedEpisode(f"{self.path}: column {name} is {array.type}, expected large_binary")
        try:
            offsets, data = _frame_buffers(array)
        except ValueError as error:
            raise DamagedEpisode(f"{self.path}: column {name} cannot be read: {error}") from error
        if offsets[0] < 0 or offsets[-1] > data.size or np.any(np.diff(offsets) < 0):
            raise DamagedEpisode(f"{self.path}: column {name} has offsets outside of its data")
        if _frames_crc(offsets, data) != self.header["checksums"].get(name):
            raise DamagedEpisode(f"{self.path}: column {name} does not match its checksum")
        self._frames[camera] = offsets, data
        return offsets, data

    def episode(self) -> Episode:
        """A copy of everything in memory, every column checked."""
        summary = self.summary
        frames: dict[int, list[bytes]] = {int(step): [] for step in summary.frame_steps}
        for camera in self.cameras:
            offsets, data = self.frame_column(camera)
            for step, images in frames.items():
                images.append(data[offsets[step] : offsets[step + 1]].tobytes())
        attributes = {**_STATE_COLUMNS, **_STEP_COLUMNS}
        columns = {attribute: self.column(name).copy() for name, attribute in attributes.items()}
        return Episode(
            key=summary.key,
            instruction=self.instruction,
            cameras=self.cameras,
            success=summary.success,
            episode_return=summary.episode_return,
            timed_out=summary.timed_out,
            invalid=summary.invalid,
            policy_version=summary.policy_version,
            frames=frames,
            info=self.header["info"],
            score=self.header.get("score"),
            **columns,
        )

    def _array(self, name: str) -> pa.Array:
        if self._batch is None:
            try:
                batch = self._reader.get_batch(0)
                batch.validate()  # buffer sizes against row counts, before any view is made of them
            except (pa.ArrowException, OSError, ValueError) as error:
                raise DamagedEpisode(f"{self.path}: the record batch cannot be read: {error}") from error
            if batch.num_rows != self.length + 1:
                raise DamagedEpisode(f"{self.path} has {batch.num_rows} rows, its header says {self.length + 1}")
            self._batch = batch
        index = self._batch.schema.get_field_index(name)
        if index < 0:
            raise DamagedEpisode(f"{self.path} has no column {name}: it does not follow schema version {VERSION}")
        return self._batch.column(index)


def _header(schema: pa.Schema, path: str) -> dict[str, Any]:
    """The checked JSON header of a file's schema metadata."""
    metadata = schema.metadata or {}
    if _VERSION not in metadata:
        raise DamagedEpisode(f"{path} is an Arrow file but not a cosmos_ray episode")
    version, text = metadata[_VERSION], metadata.get(_HEADER, b"")
    if _header_crc(version, text) != metadata.get(_CRC):
        raise DamagedEpisode(f"{path} has a header that does not match its checksum")
    if int(version) > VERSION:
        raise NewerSchema(
            f"{path} has schema version {int(version)}, this package reads up to {VERSION}: upgrade cosmos_ray"
        )
    return json.loads(text)


def _header_crc(version: bytes, text: bytes) -> bytes:
    return str(zlib.crc32(version + text)).encode()


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


def _frame_buffers(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (n + 1,) int64 and bytes of a large_binary array, read in place."""
    _, offsets, data = array.buffers()
    start = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    return start, np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, np.uint8)


def _frames_crc(offsets: np.ndarray, data: np.ndarray) -> int:
    return zlib.crc32(data[offsets[0] : offsets[-1]], zlib.crc32(offsets - offsets[0]))


def _jsonable(value: Any) -> Any:
    """Numpy scalars and arrays as plain numbers and lists."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r}")
