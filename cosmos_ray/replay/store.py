"""The replay store: immutable episode files in a directory or an object store that any number of processes write and read.

Layout: ``<root>/store.json`` marks the store, ``<root>/episodes/<source>-<task>/<hh>/<name>.arrow`` are the episodes (``hh``
are two hex digits of the name's digest, so 256 directories share a task's episodes), ``<root>/removed/`` says what was evicted,
and ``<root>/quarantine/`` takes what cannot be read.

There is no lock and no index to keep consistent: a committed episode is a file with its final name. ``manifest.arrow`` is a
cache of what opening all of them would tell.
"""

from __future__ import annotations

import math
import resource
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cosmos_ray.errors import StoreError, StoreUnavailable
from cosmos_ray.replay import removals
from cosmos_ray.replay.catalog import EPISODES, Catalog, episode_path
from cosmos_ray.replay.files.cache import LeastRecentlyUsed
from cosmos_ray.replay.files.durable import explained
from cosmos_ray.replay.files.marker import FILE, Marker
from cosmos_ray.replay.files.quarantine import Quarantine
from cosmos_ray.replay.files.storage import LocalStorage, ReadOnly, Storage
from cosmos_ray.replay.format import schema
from cosmos_ray.replay.format.episode import Episode, EpisodeSummary
from cosmos_ray.replay.format.schema import DamagedEpisode
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.uri import is_uri

OPEN_EPISODES = 8192  # kept mapped at most; each holds a file descriptor


class ReplayStore:
    """Commit, list and read episodes under ``root``: a directory, or the URI of an object store (``s3://``, ``gs://``).

    Open it once per process and share it; one thread may commit and refresh, any may read. ``create`` makes the store if it
    is missing. ``stray_seconds`` is the age at which a temporary file counts as left behind by a killed writer,
    ``open_limit`` bounds the episodes kept mapped (by default a quarter of the files this process may open). ``read_only``
    writes and moves nothing there, not even a damaged file. StoreError if ``root`` is missing, is not a replay store, was made by
    a newer version or cannot be written.
    """

    def __init__(
        self, root: str | Path, create: bool = True, *, stray_seconds: float = 3600.0, open_limit: int | None = None,
        read_only: bool = False,
    ) -> None:  # fmt: skip
        self.storage = open_storage(root)
        self.root = Path(root) if isinstance(self.storage, LocalStorage) else self.storage.name
        if read_only:
            self.storage, create, stray_seconds = ReadOnly(self.storage), False, math.inf
        self.stray_seconds = stray_seconds
        self.quarantine = Quarantine(self.storage)
        self.marker = Marker(self.storage, create)
        self._refuse_packs()
        self._open: LeastRecentlyUsed[str, EpisodeView] = LeastRecentlyUsed(open_limit or _open_limit())
        self.catalog = Catalog(self.storage, self.marker, self.quarantine, stray_seconds, self._open.drop)
        self.index = self.catalog.index
        self._reported = 0  # how many rows refresh() has returned
        self._lock = threading.RLock()
        self._scratch = schema.Scratch()

    def commit(self, episode: Episode, *, created: float | None = None) -> bool:
        """Store ``episode`` durably: True if it is new, False if its key was committed before (by any process).

        When this returns, the episode survives a killed process and a crashed machine. ``created`` are the Unix seconds of its
        first commit where it is brought back, now by default. StoreUnavailable, and no visible file, if it cannot be written
        now; StoreError if it never can.
        """
        name, catalog = episode.key.name, self.catalog
        path = episode_path(name)
        with self._lock, explained("commit an episode to", self.storage.where(path)):
            batch, header = schema.encode(episode, created, self._scratch)
            summary = schema.summarise(header, batch.num_rows, batch.nbytes, self.storage.where(path))
            note = batch.schema.metadata[schema.HEADER_FIELD]
            self.marker.check_present()
            if self.storage.mapped:  # elsewhere the look takes a request, and the one below is what counts
                catalog.look_for_removals()
            if name in catalog.removals.evicted:
                return False
            written = self.storage.publish(path, lambda file: schema.write(batch, file), note)
            if not written:
                existing = catalog.summarise(name, path)
                if existing is None:
                    # The name was taken by a file that cannot be read, which is in quarantine now.
                    written = self.storage.publish(path, lambda file: schema.write(batch, file), note)
                elif existing.key != episode.key:
                    raise StoreError(f"{existing.path} holds another episode whose name is the same: {existing.key}")
            self.marker.check_present()  # else it went below the mount point
            catalog.look_for_removals()
            if name in catalog.removals.evicted:
                # It was evicted between the look and the write: that counts.
                if written:
                    self.storage.remove(path)
                return False
            if path in catalog.stuck:
                raise StoreUnavailable(f"{self.storage.where(path)} is damaged and cannot be moved to quarantine: move it away by hand")
            if path not in catalog.ignored:
                catalog.know(summary if written else existing or summary)
        return written

    def refresh(self) -> list[EpisodeSummary]:
        """Look for new files. Returns the summaries of the episodes that became known since the last call.

        The store lists only directories that changed and opens only new files. It moves torn and foreign files, files of another
        schema, and temporary files older than ``stray_seconds`` to quarantine and logs a warning. It leaves files of a newer
        schema version where they are and does not read them. It forgets episodes whose file is gone.
        """
        self.update()
        fresh, self._reported = self.since(self._reported)
        return fresh

    def update(self) -> None:
        """:meth:`refresh` for readers that follow :attr:`index`."""
        with self._lock, explained("list", self.storage.where(EPISODES)):
            self.marker.check_present()
            self.catalog.update()

    def since(self, cursor: int) -> tuple[list[EpisodeSummary], int]:
        """Episodes that became known after ``cursor`` (0: all), in that order, and the cursor for the next call.

        For readers that follow the store one by one; does not look for new files, see :meth:`refresh`.
        """
        rows = cursor + np.flatnonzero(self.index.alive[cursor:])
        return self.catalog.summaries(rows), len(self.index.names)

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
        with self._lock, explained("look into", self.storage.name):
            if name in self.index or self.storage.exists(self.path(name)):
                return True
            self.marker.check_present()
            self.catalog.look_for_removals()
            return name in self.catalog.removals.evicted

    def evicted(self, name: str) -> dict | None:
        """The record of an evicted episode (``success``, ``length``, ``invalid``, ``policy_version``); None if no process has evicted
        the episode."""
        with self._lock, explained("look into", self.storage.where(removals.FOLDER)):
            self.catalog.look_for_removals()
        return self.catalog.removals.evicted.get(name)

    def read(self, name: str) -> Episode:
        """A copy of the whole episode, every byte checked; StoreError if it is missing, damaged or newer."""
        try:
            with explained("read", self.storage.where(self.path(name))):
                return self.view(name).episode()
        except DamagedEpisode as error:
            if self.discard(name, str(error)):
                raise
        return self.read(name)  # only this machine's copy was damaged

    def view(self, name: str) -> EpisodeView:
        """The episode mapped into memory, from a bounded cache of open ones.

        Raises FileNotFoundError, DamagedEpisode (call :meth:`discard` then), NewerSchema, or StoreUnavailable if the whole
        store has vanished.
        """
        view = self._open.get(name)
        if view is None:
            view = self._opened(name)
            self._open.put(name, view)
        return view

    def discard(self, name: str, reason: str) -> bool:
        """Move a damaged episode to quarantine and forget it. False, and the episode stays, if only this machine's copy of its file
        was damaged; the copy is then fetched again."""
        with self._lock, explained("discard an episode of", self.storage.name):
            return self.catalog.discard(name, reason)

    def evict(self, names: Iterable[str], reason: str) -> int:
        """Delete episodes for good; returns how many. Their keys stay taken: committing one of them again is a no-op.

        The record of it is durable before anything is deleted. Names that are not known are passed over. StoreError if the
        store cannot be written.
        """
        with self._lock, explained("evict episodes of", self.storage.name):
            rows = [row for name in dict.fromkeys(names) if (row := self.index.row(name)) is not None]
            if not rows:
                return 0
            self.marker.check_present()
            summaries = self.catalog.summaries(np.array(rows))
            self.catalog.removals.add(summaries, reason)
            for summary in summaries:
                self.catalog.forget(summary.name)
                self.storage.remove(self.path(summary.name))
        return len(summaries)

    def save_manifest(self) -> None:
        """Write the manifest, so that the next process opens the store fast; StoreError if it cannot be written."""
        with self._lock, explained("write the manifest of", self.storage.name):
            self.marker.check_present()
            self.catalog.save_manifest()

    def path(self, name: str) -> str:
        """Where the episode ``name`` lies, relative to the root; a function of the name alone."""
        return episode_path(name)

    def _refuse_packs(self) -> None:
        """StoreError if the store holds packs, which earlier code wrote: their episodes must not go missing without a word."""
        with explained("open", self.storage.name):
            if any(listing.files for listing in self.storage.scan("packs", {}, float("inf"))):
                raise StoreError(f"{self.storage.where('packs')} holds packed episodes, which this version of cosmos_ray does not read: "
                                 "write them out with the version that packed them (`replay export`), or move the folder away to go "
                                 "on without them")

    def _opened(self, name: str) -> EpisodeView:
        """The episode, freshly opened."""
        try:
            return self.catalog.open(name)
        except FileNotFoundError:
            with self._lock:
                self.marker.check_present()
                self.catalog.look_for_removals()
                self.catalog.doubt()
            raise


def open_storage(root: str | Path) -> Storage:
    """The directory or object store that ``root`` names."""
    if is_uri(root):
        from cosmos_ray.replay.files.objects import ObjectStorage

        return ObjectStorage(str(root))
    return LocalStorage(root)


def is_store(root: str | Path) -> bool:
    """Whether ``root`` has the marker of a replay store."""
    storage = open_storage(root)
    with explained("look into", storage.name):
        return storage.exists(FILE)


def _open_limit() -> int:
    """How many episodes to keep mapped: a quarter of the files this process may open."""
    return min(OPEN_EPISODES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
