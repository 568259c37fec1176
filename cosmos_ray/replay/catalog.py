"""The index of a store's episodes, kept in step with the files that any process adds and removes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import manifest, removals
from cosmos_ray.replay.files.durable import explained
from cosmos_ray.replay.files.marker import Marker
from cosmos_ray.replay.files.quarantine import Quarantine
from cosmos_ray.replay.files.storage import Listing, Storage
from cosmos_ray.replay.format import schema
from cosmos_ray.replay.format.episode import EpisodeSummary
from cosmos_ray.replay.format.schema import DamagedEpisode, NewerSchema
from cosmos_ray.replay.format.view import EpisodeView, read_summary
from cosmos_ray.replay.index import EpisodeIndex
from cosmos_ray.replay.removals import Removals

logger = logging.getLogger(__name__)

SUFFIX = ".arrow"
EPISODES = "episodes"
MANIFEST_FROM = 1000  # episodes that are worth a manifest


def episode_path(name: str) -> str:
    """Where the episode ``name`` lies, relative to the root; a function of the name alone. StoreError."""
    parts = name.rsplit("-", 3)  # <source>-<task>, seed, attempt, digest
    if len(parts) != 4 or "/" in name or os.sep in name or name.startswith("."):
        raise StoreError(f"{name!r} is not an episode name; see EpisodeKey.name")
    return f"{EPISODES}/{parts[0]}/{parts[3][:2]}/{name}{SUFFIX}"


class Catalog:
    """The :attr:`index` of the store in ``storage``.

    ``gone`` is called with the name of an episode that is no longer where it was. The caller holds a lock; errors are OSErrors.
    """

    def __init__(
        self, storage: Storage, marker: Marker, quarantine: Quarantine, stray_seconds: float, gone: Callable[[str], None]
    ) -> None:
        self.storage, self.marker, self.quarantine, self.stray_seconds = storage, marker, quarantine, stray_seconds
        self.index = EpisodeIndex()
        self.removals = Removals(storage)
        self.ignored: set[str] = set()  # files that stay where they are: newer schema, or a read-only store
        self.stuck: set[str] = set()  # those of them that are damaged
        self._gone = gone
        self._summaries: dict[int, EpisodeSummary] = {}  # those that were asked for
        self._members: dict[str, set[str]] | None = None  # folder -> names of the files known there
        self._scanned: dict[str, dict[str, Any]] | None = None  # area -> state of its scan, None before the first
        self._in_manifest = 0

    # ---------------------------------------------------------------- what is known

    def summaries(self, rows: np.ndarray) -> list[EpisodeSummary]:
        """The summaries of ``(n,)`` rows of the index."""
        missing = np.array([row for row in rows.tolist() if row not in self._summaries], np.int64)
        self._summaries.update(zip(missing.tolist(), self.index.summaries(missing, self._where), strict=True))
        return [self._summaries[row] for row in rows.tolist()]

    def open(self, name: str) -> EpisodeView:
        """The episode, mapped. FileNotFoundError, DamagedEpisode or NewerSchema."""
        view = self._opened(episode_path(name))
        if view.summary.name != name:  # found under this name before, replaced behind our back
            raise DamagedEpisode(f"{view.path} holds episode {view.summary.name}, not {name}")
        return view

    # ---------------------------------------------------------------- looking

    def update(self) -> None:
        """Take in new files and forget missing ones. The update lists only directories that changed and opens only new files."""
        self.look_for_removals()
        for listing in self.storage.scan(EPISODES, self._state(EPISODES), self.stray_seconds):
            self._take_in(listing)
        if len(self.index) - self._in_manifest >= max(MANIFEST_FROM, self._in_manifest // 10):
            self._try_save_manifest()

    def look_for_removals(self) -> None:
        """Take in the evictions of other processes."""
        for listing in self.storage.scan(removals.FOLDER, self._state(removals.FOLDER), self.stray_seconds):
            for record in self.removals.take_in(listing):
                self.forget(record["name"])

    def know(self, summary: EpisodeSummary) -> None:
        """Take in an episode; a known one stays as it is."""
        self.index.add(summary)
        self._gone(summary.name)  # the file that was known under this name, if any
        if self._members is not None:
            self._members.setdefault(_folder(episode_path(summary.name)), set()).add(summary.name)

    def forget(self, name: str) -> None:
        """Drop an episode from the index."""
        self._gone(name)
        if name in self.index:
            self.index.remove(name)
            if self._members is not None:
                self._members.get(_folder(episode_path(name)), set()).discard(name)

    def discard(self, name: str, reason: str) -> bool:
        """Move a damaged episode to quarantine and forget it. False if only this machine's copy of the file was damaged; the copy is
        then fetched again."""
        if self._fetch_again(name):
            return False
        self.forget(name)
        self.take(episode_path(name), reason)
        return True

    def doubt(self) -> None:
        """List everything again at the next update, because the index, perhaps from a manifest, named a missing episode."""
        self._state(EPISODES).clear()

    def take(self, path: str, reason: str) -> None:
        """Move a file to quarantine, or ignore it where that cannot be done."""
        if self.quarantine.take(path, reason):
            self.stuck.discard(path)
        else:
            self.ignored.add(path)
            self.stuck.add(path)

    def summarise(self, name: str, path: str) -> EpisodeSummary | None:
        """Summary from the file ``path``, or None: gone, in quarantine now, or of a newer schema."""
        where = self.storage.where(path)
        try:
            if not path.endswith(SUFFIX):
                raise DamagedEpisode(f"{where} is not an episode file: foreign to a replay store")
            if self.storage.mapped:
                summary = EpisodeView(self.storage.open(path), where).summary
            else:
                summary = self._peek(path, where)
            return self._belongs(summary, name, path)
        except FileNotFoundError:
            return None
        except NewerSchema as error:
            logger.warning("ignoring %s", error)
            self.ignored.add(path)
        except DamagedEpisode as error:
            self.take(path, str(error))
        return None

    def save_manifest(self) -> None:
        """Write the manifest. Its readers list folders again in which this process ignores files."""
        unsettled = {_folder(path) for path in self.ignored}
        scanned = {
            area: {key: value for key, value in state.items() if key not in unsettled} for area, state in (self._scanned or {}).items()
        }
        manifest.save_manifest(self.storage, self.marker.id, self.index, scanned)
        self._in_manifest = len(self.index)
        self.storage.tidy()

    # ---------------------------------------------------------------- inside

    def _opened(self, path: str) -> EpisodeView:
        """The episode in the file ``path``; tried again where only this machine's copy of the file was damaged."""
        try:
            return EpisodeView(self.storage.open(path), self.storage.where(path))
        except DamagedEpisode:
            if not self.storage.refetch(path):
                raise
        return EpisodeView(self.storage.open(path), self.storage.where(path))

    def _state(self, area: str) -> dict[str, Any]:
        """The state of the scan of an area; the first call looks for a manifest."""
        if self._scanned is None:
            self._scanned = manifest.load_manifest(self.storage, self.marker.id, self.index) or {}
            self._scanned.pop(removals.FOLDER, None)  # read anew: the manifest does not hold what they say
            self._in_manifest = len(self.index)
        return self._scanned.setdefault(area, {})

    def _fetch_again(self, name: str) -> bool:
        """Replace a damaged copy that this machine keeps of the episode's file; whether it was that."""
        path = episode_path(name)
        try:
            if not self.storage.refetch(path):
                return False
        except FileNotFoundError:
            return False
        logger.warning("the copy of %s on this machine was damaged; it was fetched again", self.storage.where(path))
        self._gone(name)
        return True

    def _take_in(self, listing: Listing) -> None:
        """Take in the files of one folder of episodes, and forget those that are gone."""
        for file in listing.files:
            name, path = file.removesuffix(SUFFIX), f"{listing.folder}/{file}"
            if path in self.ignored or (name in self.index and episode_path(name) == path):
                continue
            if name in self.removals.evicted:
                continue  # about to be deleted by whoever evicted it
            noted = listing.entries.get(file)
            summary = self._summarise_note(name, path, noted) if noted else self.summarise(name, path)
            if summary is not None:
                self.know(summary)
        for name in self._missing(listing):
            self.forget(name)
        for name in listing.strays:
            self.take(f"{listing.folder}/{name}", "temporary file left behind, its writer is gone")
        for name in listing.others:
            self.take(f"{listing.folder}/{name}", "neither a file nor a directory, not part of a replay store")

    def _missing(self, listing: Listing) -> set[str]:
        """Names of the known files below the folder that are not there any more."""
        if not listing.complete:
            return set()
        if self._members is None:
            self._members = {}
            for name in self.index:
                self._members.setdefault(_folder(episode_path(name)), set()).add(name)
        gone = self._members.get(listing.folder, set()) - {file.removesuffix(SUFFIX) for file in listing.files}
        if listing.folder.count("/") < 2:
            gone.update(*(names for folder, names in self._members.items() if _is_missing(folder, listing)))
            state = self._state(EPISODES)
            for folder in [folder for folder in state if _is_missing(folder, listing)]:
                del state[folder]  # should the folder come back as it was, its stamp would not tell
        return gone

    def _summarise_note(self, name: str, path: str, note: bytes) -> EpisodeSummary | None:
        """Summary from what the writer noted about the file."""
        try:
            header = json.loads(note)
            return self._belongs(schema.summarise(header, None, 0, self.storage.where(path)), name, path)
        except (DamagedEpisode, KeyError, TypeError, ValueError, RecursionError):
            return self.summarise(name, path)  # the file itself decides

    def _peek(self, path: str, where: str) -> EpisodeSummary:
        """The summary from the last bytes of a file that is far away; from all of them where these do not hold the header."""
        try:
            return read_summary(self.storage.peek(path), where)
        except DamagedEpisode:
            return read_summary(self.storage.open(path), where)

    def _belongs(self, summary: EpisodeSummary, name: str, path: str) -> EpisodeSummary:
        if summary.name != name or episode_path(name) != path:
            raise DamagedEpisode(f"{self.storage.where(path)} holds episode {summary.name}: it does not belong under this name")
        return summary

    def _where(self, name: str) -> str:
        return self.storage.where(episode_path(name))

    def _try_save_manifest(self) -> None:
        try:
            with explained("write the manifest of", self.storage.name):
                self.save_manifest()
        except StoreError as error:
            logger.warning("%s; the next process opens every episode instead", error)
            self._in_manifest = len(self.index)  # not again until many more are there


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _is_missing(folder: str, listing: Listing) -> bool:
    """Whether a listing shows that ``folder``, at any depth below the listing's, is not there."""
    if not folder.startswith(f"{listing.folder}/"):
        return False
    return folder[len(listing.folder) + 1 :].partition("/")[0] not in listing.folders
