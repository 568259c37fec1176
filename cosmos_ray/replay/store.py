"""The replay store: immutable episode files in a directory or an object store that any number of processes write and read.

Layout: ``<root>/store.json`` marks the store, ``<root>/episodes/<source>-<task>/<hh>/<name>.arrow`` are the episodes (``hh``
are two hex digits of the name's digest, so 256 directories share a task's episodes), ``<root>/packs/`` holds what compaction
made of small files, ``<root>/removed/`` says what was taken out, and ``<root>/quarantine/`` takes what cannot be read.

There is no lock and no index to keep consistent: a committed episode is a file with its final name. ``manifest.arrow`` is a
cache of what opening all of them would tell.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_ray.errors import StoreError, StoreUnavailable
from cosmos_ray.replay import manifest, removals, schema
from cosmos_ray.replay.cache import LeastRecentlyUsed
from cosmos_ray.replay.episode import Episode, EpisodeSummary
from cosmos_ray.replay.files import explained
from cosmos_ray.replay.index import EpisodeIndex
from cosmos_ray.replay.marker import Marker
from cosmos_ray.replay.pack import Pack
from cosmos_ray.replay.quarantine import Quarantine
from cosmos_ray.replay.removals import Removals
from cosmos_ray.replay.schema import DamagedEpisode, NewerSchema
from cosmos_ray.replay.storage import Listing, LocalStorage, Storage
from cosmos_ray.replay.view import EpisodeView, read_summary

logger = logging.getLogger(__name__)

SUFFIX = ".arrow"
EPISODES, PACKS = "episodes", "packs"
MANIFEST_FROM = 1000  # episodes that are worth a manifest
OPEN_EPISODES = 8192  # kept mapped at most; each holds a file descriptor


class ReplayStore:
    """Commit, list and read episodes under ``root``: a directory, or the URI of an object store (``s3://``, ``gs://``).

    Open it once per process and share it; one thread may commit and refresh, any may read. ``create`` makes the store if it
    is missing. ``stray_seconds`` is the age at which a temporary file counts as left behind by a killed writer,
    ``open_limit`` bounds the episodes kept mapped (by default a quarter of the files this process may open). StoreError if
    ``root`` is missing, is not a replay store, was made by a newer version or cannot be written.
    """

    def __init__(
        self, root: str | Path, create: bool = True, *, stray_seconds: float = 3600.0, open_limit: int | None = None
    ) -> None:
        self.storage = open_storage(root)
        self.root = Path(root) if isinstance(self.storage, LocalStorage) else self.storage.name
        self.stray_seconds = stray_seconds
        self.quarantine = Quarantine(self.storage)
        self.index = EpisodeIndex()
        self._removals = Removals(self.storage)
        self._open: LeastRecentlyUsed[str, EpisodeView] = LeastRecentlyUsed(open_limit or _open_limit())
        self._packs: LeastRecentlyUsed[str, Pack] = LeastRecentlyUsed(256)
        self._listed_packs: set[str] = set()
        self._summaries: dict[int, EpisodeSummary] = {}  # those that were asked for
        self._members: dict[str, set[str]] | None = None  # folder -> names of the files known there
        self._reported = 0  # how many rows refresh() has returned
        self._scanned: dict[str, dict[str, Any]] | None = None  # folder -> state of its scan, None before the first
        self._in_manifest = 0
        self._ignored: set[str] = set()  # files that stay where they are: newer schema, or a read-only store
        self._stuck: set[str] = set()  # those of them that are damaged
        self._lock = threading.RLock()
        self._scratch = schema.Scratch()
        self.marker = Marker(self.storage, create)

    def commit(self, episode: Episode) -> bool:
        """Store ``episode`` durably: True if it is new, False if its key was committed before (by any process).

        When this returns, the episode survives a killed process and a crashed machine. StoreUnavailable, and no visible
        file, if it cannot be written now; StoreError if it never can.
        """
        name = episode.key.name
        path = self.path(name)
        with self._lock, explained("commit an episode to", self.storage.where(path)):
            batch, header = schema.encode(episode, scratch=self._scratch)
            summary = schema.summarise(header, batch.num_rows, batch.nbytes, self.storage.where(path))
            note = batch.schema.metadata[schema.HEADER_FIELD]
            self.marker.check_present()
            self.look_for_packs()
            if name in self._removals.evicted or self.index.place(name):
                return False
            written = self.storage.publish(path, lambda file: schema.write(batch, file), note)
            if not written:
                existing = self._summarise(name, path)
                if existing is None:
                    # The name was taken by a file that cannot be read, which is in quarantine now.
                    written = self.storage.publish(path, lambda file: schema.write(batch, file), note)
                elif existing.key != episode.key:
                    raise StoreError(f"{self.storage.where(path)} holds another episode whose name is the same: {existing.key}")
            self.marker.check_present()  # else it went below the mount point
            self.look_for_packs()
            if written and self.index.place(name):
                # It was packed between the look and the write: what is packed counts.
                self.storage.remove(path)
                return False
            if path in self._stuck:
                raise StoreUnavailable(f"{self.storage.where(path)} is damaged and cannot be moved to quarantine: move it away by hand")
            if path not in self._ignored:
                self._know(summary if written else existing or summary)
        return written

    def refresh(self) -> list[EpisodeSummary]:
        """Look for new files; summaries of the episodes that became known since the last call, this one's included.

        Only places that changed are listed and only new files opened. Files that are torn, foreign or of another
        schema, and temporary files older than ``stray_seconds``, are moved to quarantine with a logged warning. Files
        of a newer schema version stay and are left out. Episodes whose file is gone are forgotten.
        """
        self.update()
        fresh, self._reported = self.since(self._reported)
        return fresh

    def update(self) -> None:
        """:meth:`refresh` for readers that follow :attr:`index`."""
        with self._lock, explained("list", self.storage.where(EPISODES)):
            self.look_for_packs()
            for listing in self.storage.scan(EPISODES, self._scan_state(EPISODES), self.stray_seconds):
                self._take_in(listing)
            if len(self.index) - self._in_manifest >= max(MANIFEST_FROM, self._in_manifest // 10):
                self._try_save_manifest()

    def since(self, cursor: int) -> tuple[list[EpisodeSummary], int]:
        """Episodes that became known after ``cursor`` (0: all), in that order, and the cursor for the next call.

        For readers that follow the store one by one; does not look for new files, see :meth:`refresh`.
        """
        rows = cursor + np.flatnonzero(self.index.alive[cursor:])
        missing = np.array([row for row in rows.tolist() if row not in self._summaries], np.int64)
        self._summaries.update(zip(missing.tolist(), self.index.summaries(missing, self._where), strict=True))
        return [self._summaries[row] for row in rows.tolist()], len(self.index.names)

    def summaries(self) -> list[EpisodeSummary]:
        """Every known episode (as of the last :meth:`refresh` and this instance's commits)."""
        return self.since(0)[0]

    def keys(self) -> list[str]:
        """Names of the known episodes, sorted."""
        return sorted(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, name: str) -> bool:
        """Whether an episode was committed under ``name``, known yet or not, evicted or not."""
        with explained("look into", self.storage.name):
            if name in self.index or self.storage.exists(self.path(name)):
                return True
            self.look_for_packs()
        return name in self.index or name in self._removals.evicted

    def evicted(self, name: str) -> dict | None:
        """What was recorded of an evicted episode (``success``, ``length``, ``invalid``, ``policy_version``), else None."""
        return self._removals.evicted.get(name)

    def read(self, name: str) -> Episode:
        """A copy of the whole episode, every byte checked; StoreError if it is missing, damaged or newer."""
        try:
            with explained("read", self.storage.where(self.path(name))):
                return self.view(name).episode()
        except DamagedEpisode as error:
            self.discard(name, str(error))
            raise

    def view(self, name: str) -> EpisodeView:
        """The episode mapped into memory, from a bounded cache of open ones.

        Raises FileNotFoundError, DamagedEpisode (call :meth:`discard` then) or NewerSchema.
        """
        view = self._open.get(name)
        if view is None:
            view = self._opened(name)
            self._open.put(name, view)
        return view

    def discard(self, name: str, reason: str) -> None:
        """Move a damaged episode to quarantine and forget it."""
        with self._lock:
            place, row = self.index.place(name), self.index.row(name)
            summary = self._summary(row) if row is not None else None
            self._forget(name)
            if place is None or summary is None:
                self._take(self.path(name), reason)
                return
            with explained("record damage in", self.storage.where(removals.FOLDER)):
                self._removals.add([summary], removals.DAMAGED, reason, place[0])
            self.quarantine.note(f"{place[0]}#{name}", reason)

    def evict(self, names: Iterable[str], reason: str) -> int:
        """Delete episodes for good; returns how many. Their keys stay taken: committing one of them again is a no-op.

        The record of it is durable before anything is deleted. An episode in a pack is gone to readers at once, its bytes
        once the pack is compacted. StoreError if the store cannot be written.
        """
        with self._lock, explained("evict episodes of", self.storage.name):
            self.marker.upgrade()
            rows = [row for name in names if (row := self.index.row(name)) is not None]
            summaries = [self._summary(row) for row in rows]
            self._removals.add(summaries, removals.EVICTED, reason)
            for summary in summaries:
                packed = self.index.place(summary.name)
                self._forget(summary.name)
                if not packed:
                    self.storage.remove(self.path(summary.name))
        return len(summaries)

    def is_removed(self, name: str, path: str) -> bool:
        """Whether the episode ``name`` in the file ``path`` is not to be read any more."""
        return name in self._removals.evicted or (path, name) in self._removals.damaged

    def save_manifest(self) -> None:
        """Write the manifest, so that the next process opens the store fast; StoreError if it cannot be written."""
        with self._lock, explained("write the manifest of", self.storage.name):
            manifest.save_manifest(self.storage, self.index, self._scanned or {})
            self._in_manifest = len(self.index)

    def path(self, name: str) -> str:
        """Where the episode ``name`` lies unless it is packed, relative to the root; a function of the name alone."""
        parts = name.rsplit("-", 3)  # <source>-<task>, seed, attempt, digest
        if len(parts) != 4 or "/" in name or os.sep in name or name.startswith("."):
            raise StoreError(f"{name!r} is not an episode name; see EpisodeKey.name")
        return f"{EPISODES}/{parts[0]}/{parts[3][:2]}/{name}{SUFFIX}"

    def pack(self, path: str) -> Pack:
        """A pack of this store, from a bounded cache of open ones. DamagedEpisode or OSError."""
        pack = self._packs.get(path)
        if pack is None:
            pack = Pack(self.storage.open(path), self.storage.where(path))
            self._packs.put(path, pack)
        return pack

    # ---------------------------------------------------------------- what is there

    def _scan_state(self, folder: str) -> dict[str, Any]:
        """The state of the scan of ``folder``; the first call looks for a manifest."""
        if self._scanned is None:
            self._scanned = manifest.load_manifest(self.storage, self.index) or {}
            self._scanned.pop(removals.FOLDER, None)  # read anew: the manifest does not hold what they say
            self._in_manifest = len(self.index)
            places = self.index.tables["place"].values
            self._listed_packs = {places[number] for number in set(self.index["place"].tolist())} - {""}
        return self._scanned.setdefault(folder, {})

    def look_for_packs(self) -> None:
        """Take in new packs and removals: cheap where there are none."""
        self.look_for_removals()
        for listing in self.storage.scan(PACKS, self._scan_state(PACKS), self.stray_seconds):
            self._take_in_packs(listing)

    def look_for_removals(self) -> None:
        """Take in what other processes have evicted or found damaged."""
        for listing in self.storage.scan(removals.FOLDER, self._scan_state(removals.FOLDER), self.stray_seconds):
            for record in self._removals.take_in(listing):
                if record["kind"] == removals.EVICTED or self._is_in(record["name"], record["pack"]):
                    self._forget(record["name"])

    def _take_in_packs(self, listing: Listing) -> None:
        paths = {f"{listing.folder}/{name}" for name in listing.files}
        gone = {path for path in self._listed_packs - paths if path.rpartition("/")[0] == listing.folder and listing.complete}
        for path in sorted(paths - self._listed_packs - self._ignored):
            try:
                for slot, view in self.pack(path).views():
                    if isinstance(view, EpisodeView):
                        self._add_packed(view.summary, path, slot)
                    else:
                        logger.warning("ignoring %s", view)
            except FileNotFoundError:
                continue
            except DamagedEpisode as error:
                self._take(path, str(error))
                continue
            self._listed_packs.add(path)
        for path in gone:  # after the packs that replace them
            self._listed_packs.discard(path)
            self._packs.drop(path)
            for name in [name for name in self.index if self._is_in(name, path)]:
                self._forget(name)
        for name in (*listing.strays, *listing.others):
            self._take(f"{listing.folder}/{name}", "left behind by a killed process")

    def _add_packed(self, summary: EpisodeSummary, path: str, slot: int) -> None:
        if not self.is_removed(summary.name, path):
            self._know(summary, path, slot)

    def _is_in(self, name: str, pack: str) -> bool:
        place = self.index.place(name)
        return place is not None and place[0] == pack

    def _take_in(self, listing: Listing) -> None:
        """Take in the files of one folder of episodes, and forget those that are gone."""
        folder, known = listing.folder, self._names_in(listing.folder)
        for file in listing.files:
            name = file.removesuffix(SUFFIX)
            path = f"{folder}/{file}"
            if name in known or path in self._ignored or (self.index.place(name) is not None and self.path(name) == path):
                continue
            if name in self._removals.evicted:
                continue  # about to be deleted by whoever evicted it
            noted = listing.entries.get(file)
            summary = self._summarise_note(name, path, noted) if noted else self._summarise(name, path)
            if summary is not None:
                self._know(summary)
        if listing.complete:
            gone = known - {file.removesuffix(SUFFIX) for file in listing.files}
            for name in gone:
                self._forget(name)
        for name in listing.strays:
            self._take(f"{folder}/{name}", "temporary file left behind, its writer is gone")
        for name in listing.others:
            self._take(f"{folder}/{name}", "neither a file nor a directory, not part of a replay store")

    def _names_in(self, folder: str) -> set[str]:
        """Names of the known episodes with a file of their own in ``folder``."""
        if self._members is None:
            self._members = {}
            for name in self.index:
                if self.index.place(name) is None:
                    self._members.setdefault(self.path(name).rpartition("/")[0], set()).add(name)
        return self._members.get(folder, set())

    def _know(self, summary: EpisodeSummary, pack: str = "", slot: int = 0) -> None:
        if self.index.add(summary, pack, slot):
            self._summaries[len(self.index.names) - 1] = summary
        elif pack:
            self._summaries.pop(self.index.row(summary.name), None)
            self._open.drop(summary.name)
        if self._members is not None:
            members = self._members.setdefault(self.path(summary.name).rpartition("/")[0], set())
            (members.discard if pack else members.add)(summary.name)

    def _forget(self, name: str) -> None:
        self._open.drop(name)
        self.index.remove(name)
        if self._members is not None:
            self._members.get(self.path(name).rpartition("/")[0], set()).discard(name)

    def _summary(self, row: int) -> EpisodeSummary:
        if row not in self._summaries:
            (self._summaries[row],) = self.index.summaries(np.array([row]), self._where)
        return self._summaries[row]

    def _where(self, name: str, pack: str) -> str:
        return self.storage.where(pack or self.path(name))

    def _opened(self, name: str) -> EpisodeView:
        """The episode, freshly opened: where it was known to be, or in the pack it has moved to since."""
        for _ in range(3):
            place = self.index.place(name)
            try:
                view = self._view_of(name) if place is None else self.pack(place[0]).view(place[1])
                if view.summary.name != name:  # found under this name before, replaced behind our back
                    raise DamagedEpisode(f"{view.path} holds episode {view.summary.name}, not {name}")
                return view
            except FileNotFoundError:
                with self._lock:
                    self.look_for_packs()
                    if self.index.place(name) == place:
                        raise
        raise FileNotFoundError(self.path(name))

    def _view_of(self, name: str) -> EpisodeView:
        path = self.path(name)
        return EpisodeView(self.storage.open(path), self.storage.where(path))

    def _summarise(self, name: str, path: str) -> EpisodeSummary | None:
        """Summary from the file ``path``, or None: gone, in quarantine now, or of a newer schema."""
        where = self.storage.where(path)
        try:
            if not path.endswith(SUFFIX):
                raise DamagedEpisode(f"{where} is not an episode file: foreign to a replay store")
            if self.storage.mapped:
                summary = EpisodeView(self.storage.open(path), where).summary
            else:
                summary = read_summary(self.storage.peek(path), where)
            return self._belongs(summary, name, path)
        except FileNotFoundError:
            return None
        except NewerSchema as error:
            logger.warning("ignoring %s", error)
            self._ignored.add(path)
        except DamagedEpisode as error:
            self._take(path, str(error))
        return None

    def _summarise_note(self, name: str, path: str, note: bytes) -> EpisodeSummary | None:
        """Summary from what the writer noted about the file."""
        try:
            header = json.loads(note)
            return self._belongs(schema.summarise(header, None, 0, self.storage.where(path)), name, path)
        except (DamagedEpisode, KeyError, TypeError, ValueError, RecursionError):
            return self._summarise(name, path)  # the file itself decides

    def _belongs(self, summary: EpisodeSummary, name: str, path: str) -> EpisodeSummary:
        if summary.name != name or self.path(name) != path:
            raise DamagedEpisode(f"{self.storage.where(path)} holds episode {summary.name}: it does not belong under this name")
        return summary

    def _take(self, path: str, reason: str) -> None:
        if self.quarantine.take(path, reason):
            self._stuck.discard(path)
        else:
            self._ignored.add(path)
            self._stuck.add(path)

    def _try_save_manifest(self) -> None:
        try:
            self.save_manifest()
        except StoreError as error:
            logger.warning("%s; the next process opens every episode instead", error)
            self._in_manifest = len(self.index)  # not again until many more are there


def open_storage(root: str | Path) -> Storage:
    """The directory or object store that ``root`` names."""
    if "://" in str(root):
        from cosmos_ray.replay.objects import ObjectStorage

        return ObjectStorage(str(root))
    return LocalStorage(root)


def _open_limit() -> int:
    """How many episodes to keep mapped: a quarter of the files this process may open."""
    return min(OPEN_EPISODES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
