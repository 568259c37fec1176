"""Many episodes in one file: what compaction makes of small ones.

A pack is an Arrow IPC file with one record batch per episode, each as it stood in its own file; the metadata of an episode's
schema travels as the metadata of its batch. The schema's own metadata has ``cosmos_ray.pack``, the version of this layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import BinaryIO

import pyarrow as pa

from cosmos_ray.replay.format.schema import DamagedEpisode, NewerSchema
from cosmos_ray.replay.format.view import EpisodeView

_PACK = b"cosmos_ray.pack"


class Pack:
    """A pack opened for reading in place. DamagedEpisode if it is none; OSError."""

    def __init__(self, file: pa.NativeFile, where: str) -> None:
        self.where = where
        try:
            self._reader = pa.ipc.open_file(file)
            if _PACK not in (self._reader.schema.metadata or {}):
                raise ValueError("it is no pack of episodes")
            self.count = self._reader.num_record_batches
        except OSError as error:
            if error.errno is not None:
                raise
            raise DamagedEpisode(f"{where} is not a complete Arrow file: {error}") from error
        except (pa.ArrowException, ValueError) as error:
            raise DamagedEpisode(f"{where} is not a complete pack: {error}") from error

    def view(self, slot: int) -> EpisodeView:
        """The episode number ``slot``. DamagedEpisode or NewerSchema."""
        where = f"{self.where}#{slot}"
        try:
            batch, metadata = self._reader.get_batch_with_custom_metadata(slot)
            fields = dict(metadata.items()) if metadata is not None else None
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            raise DamagedEpisode(f"{where} cannot be read: {error}") from error
        return EpisodeView.of_batch(batch, fields, batch.nbytes, where)

    def views(self) -> Iterator[tuple[int, EpisodeView | DamagedEpisode | NewerSchema]]:
        """Every episode with its number, or what is wrong with it."""
        for slot in range(self.count):
            try:
                yield slot, self.view(slot)
            except (DamagedEpisode, NewerSchema) as error:
                yield slot, error


def recover(file: pa.NativeFile, where: str) -> Iterator[EpisodeView]:
    """The readable episodes at the front of a pack, or of a file of one episode, whose end is lost: behind its first 8 bytes
    such a file is a stream of batches."""
    try:
        reader = pa.ipc.open_stream(pa.py_buffer(file.read_buffer()).slice(8))
        while True:
            batch, metadata = reader.read_next_batch_with_custom_metadata()
            fields = dict(metadata.items()) if metadata is not None else reader.schema.metadata
            with suppress(DamagedEpisode, NewerSchema):
                yield EpisodeView.of_batch(batch, fields, batch.nbytes, where)
    except (pa.ArrowException, OSError, ValueError, StopIteration):
        return


def same_pack(left: pa.Schema, right: pa.Schema) -> bool:
    """Whether two episodes can be in one pack: the same columns of the same types."""
    return left.equals(right, check_metadata=False)


def write_pack(views: Iterable[EpisodeView], types: pa.Schema, sink: BinaryIO) -> None:
    """Write episodes of one schema, byte for byte as they are stored, one after the other."""
    with pa.ipc.new_file(sink, types.with_metadata({_PACK: b"1"})) as writer:
        for view in views:
            writer.write_batch(view.batch.replace_schema_metadata(None), custom_metadata=view.metadata)
