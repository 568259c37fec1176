"""A stored episode read in place."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import pyarrow as pa

from cosmos_ray.embodiment import Embodiment
from cosmos_ray.errors import StoreError
from cosmos_ray.replay.format.checksum import crc32
from cosmos_ray.replay.format.episode import LAST_STATE_REPEATED, Episode, EpisodeSummary, control_rate, render_quality, spoken
from cosmos_ray.replay.format.schema import (
    COLUMN_TYPES,
    STATE_COLUMNS,
    STEP_COLUMNS,
    VECTORS,
    VERSION,
    DamagedEpisode,
    frame_buffers,
    offsets_crc,
    read_header,
    summarise,
)


class EpisodeView:
    """Numpy views of a stored episode's columns, no copy, JPEG bytes on demand.

    ``source`` is a path or an Arrow file open for reading, ``where`` its name in messages. Opening reads header and
    layout, not the data. Arrays are read-only and stay valid as long as anything refers to them. Raises DamagedEpisode,
    NewerSchema or OSError (among them FileNotFoundError).
    """

    def __init__(self, source: str | pa.NativeFile, where: str | None = None) -> None:
        where = where or str(source)
        try:
            # A local file is mapped, not read; pages come in as the views are touched.
            file = pa.memory_map(source) if isinstance(source, str) else source
            size = file.size()
            reader = pa.ipc.open_file(file)
            if reader.num_record_batches != 1:
                raise ValueError(f"{reader.num_record_batches} record batches instead of one")
            batch = reader.get_batch(0)
            self._take(batch, reader.schema.metadata, size, where)
        except OSError as error:
            if error.errno is not None:  # the operating system's, not Arrow's complaint about the content
                raise
            raise DamagedEpisode(f"{where} is not a complete Arrow file: {error}") from error
        except (pa.ArrowException, ValueError) as error:
            raise DamagedEpisode(f"{where} is not a complete episode file: {error}") from error

    @classmethod
    def without_footer(cls, data: pa.Buffer, where: str) -> EpisodeView:
        """The episode in a file whose end is lost: behind its first 8 bytes such a file is a stream of one batch. DamagedEpisode or
        NewerSchema."""
        view = cls.__new__(cls)
        try:
            reader = pa.ipc.open_stream(data.slice(8))
            view._take(reader.read_next_batch(), reader.schema.metadata, data.size, where)
        except (pa.ArrowException, OSError, ValueError, StopIteration) as error:
            raise DamagedEpisode(f"{where} is not a complete episode: {error}") from error
        return view

    def _take(self, batch: pa.RecordBatch, metadata: dict[bytes, bytes] | None, size: int, where: str) -> None:
        self.path = where
        self.header = read_header(metadata, where)
        batch.validate()  # buffer sizes against row counts, before any view is made of them
        self.batch = batch
        self.summary: EpisodeSummary = summarise(self.header, batch.num_rows, size, where)
        self.length: int = self.summary.length
        self._columns: dict[str, np.ndarray] = {}  # those that were asked for and checked
        self._frames: dict[str, tuple[list[int], np.ndarray, list[int]]] = {}
        try:
            cameras, self.instruction = self.header["cameras"], self.header["instruction"]
            checksums = self.header["checksums"]
        except KeyError as error:
            raise DamagedEpisode(f"{where} has a header without {error}") from error
        if not isinstance(cameras, list) or not all(isinstance(name, str) for name in (*cameras, self.instruction)):
            raise DamagedEpisode(f"{where} has a header whose cameras or instruction are not text")
        if not isinstance(checksums, dict) or not isinstance(self.header.get("info"), dict):
            raise DamagedEpisode(f"{where} has a header whose checksums or info are not tables")
        self.cameras = tuple(cameras)
        try:
            self.spoken = spoken(self.header["info"], self.instruction)
        except StoreError:  # an earlier version took anything under that name
            self.spoken = [(0, self.instruction)]
        self._check_types(batch.schema)

    def _check_types(self, types: pa.Schema) -> None:
        """The columns there must be, by name and type. DamagedEpisode."""
        for name, of in COLUMN_TYPES.items():
            index = types.get_field_index(name)
            if index < 0:
                raise DamagedEpisode(f"{self.path} has no column {name}: it does not follow schema version {VERSION}")
            found = types.field(index).type
            if pa.types.is_fixed_size_list(found) != (name in VECTORS) or (found.value_type if name in VECTORS else found) != of:
                raise DamagedEpisode(f"{self.path}: column {name} is of type {found}")
            if name in VECTORS and found.list_size < 1:
                raise DamagedEpisode(f"{self.path}: column {name} is of vectors without numbers")
        if types.field("action").type != types.field("label").type:
            raise DamagedEpisode(f"{self.path}: actions and labels differ in type")

    @property
    def last_seen(self) -> int:
        """The last state that was recorded: ``T``, or ``T - 1`` where row ``T`` repeats it (see :data:`LAST_STATE_REPEATED`)."""
        return self.length - bool(self.header["info"].get(LAST_STATE_REPEATED))

    @property
    def instructions(self) -> tuple[str, ...]:
        """Every text of the episode once, in the order of their first steps."""
        return tuple(dict.fromkeys(text for _, text in self.spoken))

    def instruction_at(self, step: int) -> str:
        """The text that holds at a step."""
        return self.spoken[bisect_right(self.spoken, step, key=lambda pair: pair[0]) - 1][1]

    @property
    def embodiment(self) -> Embodiment:
        """What the policy sees and moves here."""
        types = self.batch.schema
        sizes = [types.field(types.get_field_index(name)).type.list_size for name in ("action", "proprio")]
        return Embodiment(self.cameras, sizes[0], sizes[1], control_rate(self.header["info"]),
                          quality=render_quality(self.header["info"]))

    def column(self, name: str) -> np.ndarray:
        """Rows of one non-frame column, ``(T + 1, n)`` or ``(T, ...)``, checked once against its CRC-32."""
        known = self._columns.get(name)
        if known is not None:
            return known
        rows = self.length + (name in STATE_COLUMNS)
        try:
            array = self._array(name).slice(0, rows)
            if pa.types.is_fixed_size_list(array.type):
                values = array.flatten().to_numpy(zero_copy_only=True).reshape(rows, array.type.list_size)
            else:
                values = array.to_numpy(zero_copy_only=True)
        except (pa.ArrowException, ValueError) as error:
            raise DamagedEpisode(f"{self.path}: column {name} cannot be read: {error}") from error
        if crc32(values) != self.header["checksums"].get(name):
            raise DamagedEpisode(f"{self.path}: column {name} does not match its checksum")
        self._columns[name] = values
        return values

    def frame(self, camera: str, step: int) -> np.ndarray | None:
        """``(n,)`` uint8 bytes of the JPEG of one step, checked against its CRC-32, in place; None if it was not rendered."""
        offsets, data, crcs = self._frames.get(camera) or self._frame_column(camera)
        start, stop = offsets[step], offsets[step + 1]
        if start == stop:
            return None
        jpeg = data[start:stop]
        if crc32(jpeg) != crcs[step]:
            raise DamagedEpisode(f"{self.path}: frame of {camera} at step {step} does not match its checksum")
        return jpeg

    def check(self) -> None:
        """Read everything. DamagedEpisode if a byte is not as it was written."""
        for name in (*STATE_COLUMNS, *STEP_COLUMNS):
            self.column(name)
        for step in map(int, self.summary.frame_steps):
            for camera in self.cameras:
                self.stored_frame(camera, step)

    def stored_frame(self, camera: str, step: int) -> np.ndarray:
        """As :meth:`frame`, of a step that has frames. DamagedEpisode if this one is missing."""
        jpeg = self.frame(camera, step)
        if jpeg is None:
            raise DamagedEpisode(f"{self.path} has no frame of {camera} at step {step}, its header says it has")
        return jpeg

    def episode(self) -> Episode:
        """A copy of everything in memory, every byte checked."""
        summary = self.summary
        frames: dict[int, list[bytes]] = {}
        for step in map(int, summary.frame_steps):
            frames[step] = [self.stored_frame(camera, step).tobytes() for camera in self.cameras]
        columns = {attribute: self.column(name).copy() for name, attribute in {**STATE_COLUMNS, **STEP_COLUMNS}.items()}
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

    def _frame_column(self, camera: str) -> tuple[list[int], np.ndarray, list[int]]:
        """Offsets of the frames of ``camera``, the bytes they point into, and the checksum of each."""
        name = f"frame/{camera}"
        array = self._array(name)
        if array.type != pa.large_binary():
            raise DamagedEpisode(f"{self.path}: column {name} is {array.type}, expected large_binary")
        try:
            offsets, data = frame_buffers(array)
        except (TypeError, ValueError) as error:
            raise DamagedEpisode(f"{self.path}: column {name} cannot be read: {error}") from error
        if len(offsets) != self.length + 2 or offsets[0] < 0 or offsets[-1] > data.size or np.any(np.diff(offsets) < 0):
            raise DamagedEpisode(f"{self.path}: column {name} has offsets outside of its data")
        column = self._array(f"frame_crc/{camera}")
        if column.type != pa.uint32() or column.null_count:
            raise DamagedEpisode(f"{self.path}: column frame_crc/{camera} is not of checksums")
        crcs = column.to_numpy()
        if offsets_crc(offsets, crcs) != self.header["checksums"].get(name):
            raise DamagedEpisode(f"{self.path}: column {name} does not match its checksum")
        # Lists, because a Python integer out of a list costs a tenth of one out of an array.
        self._frames[camera] = offsets.tolist(), data, crcs.tolist()
        return self._frames[camera]

    def _array(self, name: str) -> pa.Array:
        index = self.batch.schema.get_field_index(name)
        if index < 0:
            raise DamagedEpisode(f"{self.path} has no column {name}: it does not follow schema version {VERSION}")
        return self.batch.column(index)


def read_summary(file: pa.NativeFile, where: str) -> EpisodeSummary:
    """The summary from the end of an episode's file alone, for files that are far away. DamagedEpisode, NewerSchema, OSError."""
    try:
        header = read_header(pa.ipc.open_file(file).schema.metadata, where)
        return summarise(header, None, file.size(), where)
    except OSError as error:
        if error.errno is not None:
            raise
        raise DamagedEpisode(f"{where} is not a complete Arrow file: {error}") from error
    except (pa.ArrowException, ValueError) as error:
        raise DamagedEpisode(f"{where} is not a complete episode file: {error}") from error
