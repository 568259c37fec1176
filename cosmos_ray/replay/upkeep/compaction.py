"""Many small episode files into few large ones, and the bytes of evicted episodes back."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from cosmos_ray.replay.catalog import EPISODES, PACKS, SUFFIX, episode_path
from cosmos_ray.replay.files.durable import explained
from cosmos_ray.replay.format.pack import same_pack, write_pack
from cosmos_ray.replay.format.schema import DamagedEpisode, NewerSchema
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.store import ReplayStore

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Compacted:
    """What a compaction did."""

    packed: int  #: episodes that moved into a pack
    packs: int  #: packs written
    removed: int  #: files deleted: episodes that are in a pack now or evicted, packs that were rewritten
    damaged: tuple[str, ...]  #: episodes found damaged: their files, or packs that held them, are in quarantine


def compact(
    store: ReplayStore, *, pack_bytes: int = 256 << 20, min_age_s: float = 0.0, dead_share: float = 0.25, progress: Progress | None = None
) -> Compacted:
    """Pack the episodes that lie in files of their own and are at least ``min_age_s`` old, by source and task, into packs of
    about ``pack_bytes``; rewrite packs of which more than ``dead_share`` was evicted, damaged or lies elsewhere too.

    Nothing is deleted before what replaces it is durable and was read back, so it may be killed at any time and called again;
    readers and writers of any process go on meanwhile. Two compactions at once waste work and lose nothing. A rewritten pack
    that held damaged episodes goes to quarantine instead. StoreError if the store cannot be written.
    """
    with explained("compact", store.storage.name):
        store.update()
        work = _Compaction(store, pack_bytes, progress)
        before = time.time() - min_age_s
        loose = [s for s in store.summaries() if store.index.place(s.name) is None and s.created <= before]
        groups: dict[str, list[str]] = {}
        for summary in sorted(loose, key=lambda s: (s.created, s.name)):
            groups.setdefault(episode_path(summary.name).split("/")[1], []).append(summary.name)
        groups = {folder: names for folder, names in groups.items() if len(names) > 1}
        dying = work.dying_packs(dead_share)
        work.total = sum(map(len, (*groups.values(), *dying.values())))
        for names in groups.values():
            work.pack(names)
        for path, names in dying.items():
            work.pack(names)
            work.retire(path)
        work.remove_leftovers()
        store.storage.tidy()
    store.save_manifest()
    return Compacted(work.packed, work.packs, work.removed, tuple(work.damaged))


@dataclass
class _Batch:
    """Episodes that go into one pack. Names, not views: so many files cannot be open at once."""

    types: pa.Schema
    names: list[str] = field(default_factory=list)
    size: int = 0


class _Compaction:
    def __init__(self, store: ReplayStore, pack_bytes: int, progress: Progress | None) -> None:
        self.store, self.pack_bytes, self.progress = store, pack_bytes, progress
        self.packed = self.packs = self.removed = self.done = self.total = 0
        self.damaged: list[str] = []

    def pack(self, names: list[str]) -> None:
        """Write the episodes, of one source and task, into packs and delete the files of their own that they had."""
        for batch in self._batches(names):
            self.store.marker.upgrade()
            path = self._new_path(episode_path(batch.names[0]).split("/")[1])
            self.store.storage.publish(path, lambda sink, batch=batch: write_pack(self._views(batch.names), batch.types, sink))
            self.store.look_for_packs()
            self.packs += 1
            for name in batch.names:
                if self._is_whole_in(path, name):
                    self.packed += 1
                    self.remove(episode_path(name))

    def dying_packs(self, dead_share: float) -> dict[str, list[str]]:
        """Packs to rewrite, and which of their episodes are still to be kept."""
        living: dict[str, list[str]] = {path: [] for path in self._listed_packs()}
        for name in self.store.index:
            place = self.store.index.place(name)
            if place is not None and place[0] in living:
                living[place[0]].append(name)
        dying = {}
        for path, names in living.items():
            try:
                count = self.store.catalog.pack(path).count
            except (DamagedEpisode, FileNotFoundError):
                continue
            if not count or (count - len(names)) / count > dead_share:
                dying[path] = names
        return dying

    def retire(self, path: str) -> None:
        """Delete a pack unless it still is where some episode lies; to quarantine if it has damaged ones."""
        catalog, damaged = self.store.catalog, False
        self.store.look_for_packs()
        try:
            for _, view in catalog.pack(path).views():
                if isinstance(view, NewerSchema):
                    return  # not ours to judge
                if not isinstance(view, EpisodeView):
                    damaged = True
                    continue
                name = view.summary.name
                damaged |= (path, name) in catalog.removals.damaged
                place = self.store.index.place(name)
                elsewhere = place is not None and place[0] != path and self._is_whole_in(place[0], name)
                if not elsewhere and not catalog.is_removed(name, path):
                    return
        except (FileNotFoundError, DamagedEpisode):
            return
        if damaged:
            self.store.quarantine.take(path, "rewritten without its damaged episodes")
        else:
            self.remove(path)

    def remove_leftovers(self) -> None:
        """Delete files whose episode is in a pack or evicted: left behind where a process was killed."""
        catalog = self.store.catalog
        self.store.look_for_packs()
        for listing in self.store.storage.scan(EPISODES, {}, float("inf")):
            for file in listing.files:
                name, path = file.removesuffix(SUFFIX), f"{listing.folder}/{file}"
                place = self.store.index.place(name)
                if name in catalog.removals.evicted or (place is not None and self._is_whole_in(place[0], name)):
                    self.remove(path)

    def remove(self, path: str) -> None:
        if self.store.storage.exists(path):
            self.store.storage.remove(path)
            self.removed += 1

    def _listed_packs(self) -> list[str]:
        listings = self.store.storage.scan(PACKS, {}, float("inf"))
        return [f"{listing.folder}/{file}" for listing in listings for file in listing.files]

    def _new_path(self, folder: str) -> str:
        """A path greater than those of the packs that are there, whatever the clock says: the greatest is the one that counts."""
        stamps = [int(stamp[1]) for path in self._listed_packs() if (stamp := re.match(rf"{PACKS}/[^/]+/(\d{{19}})-", path))]
        stamp = max([time.time_ns(), *(stamp + 1 for stamp in stamps)])
        return f"{PACKS}/{folder}/{stamp}-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"

    def _batches(self, names: list[str]) -> Iterator[_Batch]:
        """What goes into one pack; every episode is read whole and checked."""
        filling: list[_Batch] = []
        for name in names:
            view = self._checked(name)
            self.done += 1
            if self.progress:
                self.progress(self.done, self.total)
            if view is None:
                continue
            batch = next((batch for batch in filling if same_pack(batch.types, view.batch.schema)), None)
            if batch is None:
                batch = _Batch(view.batch.schema.remove_metadata())
                filling.append(batch)
            batch.names.append(name)
            batch.size += view.batch.nbytes
            if batch.size >= self.pack_bytes:
                filling.remove(batch)
                yield batch
        yield from filling

    def _views(self, names: list[str]) -> Iterator[EpisodeView]:
        for name in names:
            try:
                yield self.store.view(name)
            except FileNotFoundError:
                continue  # evicted meanwhile

    def _checked(self, name: str) -> EpisodeView | None:
        try:
            view = self.store.view(name)
            view.check()
            return view
        except (FileNotFoundError, NewerSchema):
            return None
        except DamagedEpisode as error:
            if not self.store.discard(name, str(error)):
                return self._checked(name)
            self.damaged.append(name)
            return None

    def _is_whole_in(self, path: str, name: str) -> bool:
        """Whether the pack ``path`` is where an episode lies now, and every byte is as it was."""
        place = self.store.index.place(name)
        if place is None or place[0] != path:
            return False
        try:
            self.store.catalog.pack(path).view(place[1]).check()
            return True
        except (DamagedEpisode, FileNotFoundError):
            return False
