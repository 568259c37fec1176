"""Many small episode files into few large ones, and the bytes of evicted episodes back."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from cosmos_ray.replay.files import explained
from cosmos_ray.replay.pack import same_pack, write_pack
from cosmos_ray.replay.schema import DamagedEpisode, NewerSchema
from cosmos_ray.replay.store import EPISODES, PACKS, SUFFIX, ReplayStore
from cosmos_ray.replay.view import EpisodeView

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Compacted:
    """What a compaction did."""

    packed: int  #: episodes that moved into a pack
    packs: int  #: packs written
    removed: int  #: files deleted: episodes that are in a pack now, packs that were rewritten
    damaged: tuple[str, ...]  #: episodes found damaged and quarantined


def compact(
    store: ReplayStore, *, pack_bytes: int = 256 << 20, min_age_s: float = 0.0, dead_share: float = 0.25, progress: Progress | None = None
) -> Compacted:
    """Pack the episodes that lie in files of their own and are at least ``min_age_s`` old, by source and task, into packs of
    about ``pack_bytes``; rewrite packs of which more than ``dead_share`` was evicted or damaged.

    Nothing is deleted before what replaces it is durable, so it may be killed at any time and called again; readers and
    writers of any process go on meanwhile. Two compactions at once waste work and lose nothing. StoreError if the store
    cannot be written.
    """
    with explained("compact", store.storage.name):
        store.marker.upgrade()
        store.update()
        work = _Compaction(store, pack_bytes, progress)
        before = time.time() - min_age_s
        loose = [s for s in store.summaries() if store.index.place(s.name) is None and s.created <= before]
        dying = work.dying_packs(dead_share)
        work.total = len(loose) + sum(len(names) for names in dying.values())
        groups: dict[str, list[str]] = {}
        for summary in sorted(loose, key=lambda s: (s.created, s.name)):
            groups.setdefault(f"{summary.source}-{summary.task}", []).append(summary.name)
        for names in groups.values():
            if len(names) > 1:
                work.pack(names)
        for path, names in dying.items():
            work.pack(names)
            if not any((place := store.index.place(name)) is not None and place[0] == path for name in names):
                work.remove(path)
        work.remove_doubles()
    store.save_manifest()
    return Compacted(work.packed, work.packs, work.removed, tuple(work.damaged))


class _Compaction:
    def __init__(self, store: ReplayStore, pack_bytes: int, progress: Progress | None) -> None:
        self.store, self.pack_bytes, self.progress = store, pack_bytes, progress
        self.packed = self.packs = self.removed = self.done = self.total = 0
        self.damaged: list[str] = []

    def pack(self, names: list[str]) -> None:
        """Write the episodes into packs and delete the files of their own that they had."""
        for views in self._batches(names):
            members = [view.summary.name for view in views]
            folder = self.store.path(members[0]).split("/")[1]
            path = f"{PACKS}/{folder}/{time.time_ns()}-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
            self.store.storage.publish(path, lambda sink, views=views: write_pack(views, sink))
            self.store.look_for_packs()  # reads it back: only what is readable there is deleted here
            self.packs += 1
            for name in members:
                if (place := self.store.index.place(name)) is not None and place[0] == path:
                    self.packed += 1
                    self.remove(self.store.path(name))

    def dying_packs(self, dead_share: float) -> dict[str, list[str]]:
        """Packs to rewrite, and which of their episodes are still to be kept."""
        living: dict[str, list[str]] = {path: [] for listing in self.store.storage.scan(PACKS, {}, float("inf"))
                                        for path in (f"{listing.folder}/{file}" for file in listing.files)}  # fmt: skip
        for name in self.store.index:
            place = self.store.index.place(name)
            if place is not None and place[0] in living:
                living[place[0]].append(name)
        dying = {}
        for path, names in living.items():
            try:
                count = self.store.pack(path).count
            except (DamagedEpisode, FileNotFoundError):
                continue
            if count and (count - len(names)) / count > dead_share:
                dying[path] = names
        return dying

    def remove_doubles(self) -> None:
        """Delete files whose episode is in a pack: left behind where a compaction or a writer was killed."""
        for listing in self.store.storage.scan(EPISODES, {}, float("inf")):
            for file in listing.files:
                if self.store.index.place(file.removesuffix(SUFFIX)) is not None:
                    self.remove(f"{listing.folder}/{file}")

    def remove(self, path: str) -> None:
        if self.store.storage.exists(path):
            self.store.storage.remove(path)
            self.removed += 1

    def _batches(self, names: Iterable[str]) -> Iterator[list[EpisodeView]]:
        """Episodes that go into one pack, each read whole and checked."""
        open_packs: list[list[EpisodeView]] = []
        for name in names:
            view = self._checked(name)
            self.done += 1
            if self.progress:
                self.progress(self.done, self.total)
            if view is None:
                continue
            fitting = next((pack for pack in open_packs if same_pack(pack[0], view)), None)
            if fitting is None:
                open_packs.append([view])
                continue
            fitting.append(view)
            if sum(member.batch.nbytes for member in fitting) >= self.pack_bytes:
                open_packs.remove(fitting)
                yield fitting
        yield from open_packs

    def _checked(self, name: str) -> EpisodeView | None:
        try:
            view = self.store.view(name)
            view.check()
            return view
        except (FileNotFoundError, NewerSchema):
            return None
        except DamagedEpisode as error:
            self.store.discard(name, str(error))
            self.damaged.append(name)
            return None
