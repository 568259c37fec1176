"""What is in a store: the index of its episodes, kept in step with the files that any process adds and removes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import manifest, removals
from cosmos_ray.replay.files.cache import LeastRecentlyUsed
from cosmos_ray.replay.files.durable import explained
from cosmos_ray.replay.files.marker import Marker
from cosmos_ray.replay.files.quarantine import Quarantine
from cosmos_ray.replay.files.storage import Listing, Storage
from cosmos_ray.replay.format import schema
from cosmos_ray.replay.format.episode import EpisodeSummary
from cosmos_ray.replay.format.pack import Pack
from cosmos_ray.replay.format.schema import DamagedEpisode, NewerSchema
from cosmos_ray.replay.format.view import EpisodeView, read_summary
from cosmos_ray.replay.index import EpisodeIndex
from cosmos_ray.replay.removals import Removals

logger = logging.getLogger(__name__)

SUFFIX = ".arrow"
EPISODES, PACKS = "episodes", "packs"
MANIFEST_FROM = 1000  # episodes that are worth a manifest
OPEN_PACKS = 256  # kept mapped at most


def episode_path(name: str) -> str:
    """Where the episode ``name`` lies unless it is packed, relative to the root; a function of the name alone. StoreError."""
    parts = name.rsplit("-", 3)  # <source>-<task>, seed, attempt, digest
    if len(parts) != 4 or "/" in name or os.sep in name or name.startswith("."):
        raise StoreError(f"{name!r} is not an episode name; see EpisodeKey.name")
    return f"{EPISODES}/{parts[0]}/{parts[3][:2]}/{name}{SUFFIX}"


class Catalog:
    """The :attr:`index` of the store in ``storage``.

    An episode lies in a file of its own or in a pack. Where several hold it (a compaction was killed, or two ran at once), the
    pack of the greatest path counts, in every process alike: so a pack whose episodes all count elsewhere may be deleted by
    whoever sees it. ``moved`` is called with the name of an episode whose place changes or that goes away. The caller holds a
    lock; errors are OSErrors.
    """

    def __init__(
        self, storage: Storage, marker: Marker, quarantine: Quarantine, stray_seconds: float, moved: Callable[[str], None]
    ) -> None:
        self.storage, self.marker, self.quarantine, self.stray_seconds = storage, marker, quarantine, stray_seconds
        self.index = EpisodeIndex()
        self.removals = Removals(storage)
        self.ignored: set[str] = set()  # files that stay where they are: newer schema, or a read-only store
        self.stuck: set[str] = set()  # those of them that are damaged
        self._moved = moved
        self._packs: LeastRecentlyUsed[str, Pack] = LeastRecentlyUsed(OPEN_PACKS)
        self._listed_packs: set[str] = set()
        self._summaries: dict[int, EpisodeSummary] = {}  # those that were asked for
        self._members: dict[str, set[str]] | None = None  # folder -> names of the files known there
        self._scanned: dict[str, dict[str, Any]] | None = None  # area -> state of its scan, None before the first
        self._in_manifest = 0

    # ---------------------------------------------------------------- what is known

    def summary(self, row: int) -> EpisodeSummary:
        """The summary of an episode."""
        return self.summaries(np.array([row]))[0]

    def summaries(self, rows: np.ndarray) -> list[EpisodeSummary]:
        """The summaries of ``(n,)`` rows of the index."""
        missing = np.array([row for row in rows.tolist() if row not in self._summaries], np.int64)
        self._summaries.update(zip(missing.tolist(), self.index.summaries(missing, self._where), strict=True))
        return [self._summaries[row] for row in rows.tolist()]

    def pack(self, path: str) -> Pack:
        """A pack of this store, from a bounded cache of open ones. DamagedEpisode or OSError."""
        pack = self._packs.get(path)
        if pack is None:
            pack = self._opened(Pack, path)
            self._packs.put(path, pack)
        return pack

    def open(self, name: str) -> EpisodeView:
        """The episode, where it is known to be. FileNotFoundError, DamagedEpisode or NewerSchema."""
        place = self.index.place(name)
        if place is None:
            view = self._opened(EpisodeView, episode_path(name))
        else:
            view = self.pack(place[0]).view(place[1])
        if view.summary.name != name:  # found under this name before, replaced behind our back
            raise DamagedEpisode(f"{view.path} holds episode {view.summary.name}, not {name}")
        return view

    def is_removed(self, name: str, path: str) -> bool:
        """Whether the episode ``name`` in the file ``path`` is not to be read any more."""
        return name in self.removals.evicted or (path, name) in self.removals.damaged

    # ---------------------------------------------------------------- looking

    def update(self) -> None:
        """Take in what is new and forget what is gone; only places that changed are listed, only new files opened."""
        self.look_for_packs()
        for listing in self.storage.scan(EPISODES, self._state(EPISODES), self.stray_seconds):
            self._take_in(listing)
        if len(self.index) - self._in_manifest >= max(MANIFEST_FROM, self._in_manifest // 10):
            self._try_save_manifest()

    def look_for_packs(self) -> None:
        """Take in new packs and removals: cheap where there are none."""
        self.look_for_removals()
        gone = self._look_through_packs(self._state(PACKS))
        if gone:
            # What replaces them was there before they were deleted, but perhaps not yet when its folder was listed.
            self._drop_packs(gone & self._look_through_packs({}))

    def look_for_removals(self) -> None:
        """Take in what other processes have evicted or found damaged."""
        for listing in self.storage.scan(removals.FOLDER, self._state(removals.FOLDER), self.stray_seconds):
            for record in self.removals.take_in(listing):
                if record["kind"] == removals.EVICTED or self._is_in(record["name"], record["pack"]):
                    self.forget(record["name"])

    def know(self, summary: EpisodeSummary, pack: str = "", slot: int = 0) -> None:
        """Take in an episode, in the pack ``pack`` or in a file of its own."""
        place = self.index.place(summary.name)
        if place is not None and place[0] >= pack:
            return
        self.index.add(summary, pack, slot)
        self._summaries.pop(self.index.row(summary.name), None)
        self._moved(summary.name)
        if self._members is not None:
            members = self._members.setdefault(_folder(episode_path(summary.name)), set())
            (members.discard if pack else members.add)(summary.name)

    def forget(self, name: str) -> None:
        """Drop an episode from the index."""
        self._moved(name)
        if name in self.index:
            self.index.remove(name)
            if self._members is not None:
                self._members.get(_folder(episode_path(name)), set()).discard(name)

    def discard(self, name: str, reason: str) -> bool:
        """Put a damaged episode away and forget it; False if it was not the file that is damaged but a copy of it on this
        machine, which is a fresh one now."""
        place, row = self.index.place(name), self.index.row(name)
        if self._fetch_again(name):
            return False
        if place is None or row is None:
            self.forget(name)
            self.take(episode_path(name), reason)
            return True
        summary = self.summary(row)
        self.forget(name)
        try:
            found = self._find_in(place[0], name)
        except DamagedEpisode as error:
            self.take(place[0], str(error))
            self._drop_packs({place[0]})
            return True
        if found is not None and found[0] != place[1]:  # the manifest was wrong, not the pack
            self.know(found[1], place[0], found[0])
            return True
        self.strike(summary, place[0], reason)
        self.doubt(place[0])  # a killed compaction may have left a file of its own
        return True

    def doubt(self, pack: str = "") -> None:
        """List everything again at the next update: an episode was not where the index has it, which may come from a manifest."""
        self._state(EPISODES).clear()
        self._state(PACKS).clear()
        if pack and not self.storage.exists(pack):
            self._drop_packs({pack})
        else:
            self._listed_packs.discard(pack)

    def strike(self, summary: EpisodeSummary, pack: str, reason: str) -> None:
        """Record that a pack's episode is damaged; a warning where that cannot be written."""
        try:
            self.removals.add([summary], removals.DAMAGED, reason, pack)
        except OSError as error:
            self.removals.damaged.add((pack, summary.name))
            logger.warning("ignoring %s of %s (%s); that cannot be recorded: %s", summary.name, self.storage.where(pack), reason, error)
        self.quarantine.note(f"{pack}#{summary.name}", reason)

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
                summary = read_summary(self.storage.peek(path), where)
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
        """Write the manifest. A folder with files that are ignored now is to be listed again by who opens it."""
        unsettled = {_folder(path) for path in self.ignored}
        scanned = {
            area: {key: value for key, value in state.items() if key not in unsettled} for area, state in (self._scanned or {}).items()
        }
        manifest.save_manifest(self.storage, self.marker.id, self.index, scanned)
        self._in_manifest = len(self.index)

    # ---------------------------------------------------------------- inside

    def _opened(self, kind: Callable[[Any, str], Any], path: str) -> Any:
        """The Pack or EpisodeView in the file ``path``; tried again where only this machine's copy of it was damaged."""
        try:
            return kind(self.storage.open(path), self.storage.where(path))
        except DamagedEpisode:
            if not self.storage.refetch(path):
                raise
        return kind(self.storage.open(path), self.storage.where(path))

    def _state(self, area: str) -> dict[str, Any]:
        """The state of the scan of an area; the first call looks for a manifest."""
        if self._scanned is None:
            self._scanned = manifest.load_manifest(self.storage, self.marker.id, self.index) or {}
            self._scanned.pop(removals.FOLDER, None)  # read anew: the manifest does not hold what they say
            self._in_manifest = len(self.index)
            places = self.index.tables["place"].values
            self._listed_packs = {places[number] for number in np.unique(self.index["place"])} - {""}
        return self._scanned.setdefault(area, {})

    def _look_through_packs(self, state: dict[str, Any]) -> set[str]:
        """Take in new packs; those that are not there any more."""
        gone: set[str] = set()
        for listing in self.storage.scan(PACKS, state, self.stray_seconds):
            gone |= {path for path in self._listed_packs if _is_missing(path, listing)}
            for path in sorted({f"{listing.folder}/{name}" for name in listing.files} - self._listed_packs - self.ignored):
                self._take_in_pack(path)
            self._take_misfits(listing)
            _forget_folders(state, listing)
        return gone

    def _take_in_pack(self, path: str) -> None:
        try:
            pack = self.pack(path)
        except FileNotFoundError:
            return
        except DamagedEpisode as error:
            self.take(path, str(error))
            return
        self._listed_packs.add(path)
        views = list(pack.views())
        if any(isinstance(view, DamagedEpisode) for _, view in views) and self.storage.refetch(path):
            self._packs.drop(path)
            views = list(self.pack(path).views())
        for slot, view in views:
            if isinstance(view, EpisodeView):
                if not self.is_removed(view.summary.name, path):
                    self.know(view.summary, path, slot)
                continue
            logger.warning("ignoring %s", view)
            if isinstance(view, NewerSchema):
                self.ignored.add(path)

    def _drop_packs(self, paths: set[str]) -> None:
        """Forget packs, and their episodes unless these are found elsewhere."""
        for path in paths:
            self._listed_packs.discard(path)
            self._packs.drop(path)
        places = self.index.tables["place"].values
        numbers = [number for number, place in enumerate(places) if place in paths]
        lost = np.flatnonzero(self.index.alive & np.isin(self.index["place"], numbers)).tolist()
        for row in lost:
            self.forget(self.index.names[row])
        if lost:  # by no compaction: files of their own or older packs may still have them
            self._listed_packs.clear()
            self._state(EPISODES).clear()
            self._look_through_packs({})

    def _fetch_again(self, name: str) -> bool:
        """Replace a damaged copy that this machine keeps of the episode's file; whether it was that."""
        place = self.index.place(name)
        path = place[0] if place else episode_path(name)
        try:
            if not self.storage.refetch(path):
                return False
        except FileNotFoundError:
            return False
        logger.warning("the copy of %s on this machine was damaged; it was fetched again", self.storage.where(path))
        self._packs.drop(path)
        self._moved(name)
        return True

    def _find_in(self, path: str, name: str) -> tuple[int, EpisodeSummary] | None:
        """Number and summary of an episode in a pack. DamagedEpisode if that is no pack."""
        try:
            views = [(slot, view) for slot, view in self.pack(path).views() if isinstance(view, EpisodeView)]
        except FileNotFoundError:
            return None
        return next(((slot, view.summary) for slot, view in views if view.summary.name == name), None)

    def _is_in(self, name: str, pack: str) -> bool:
        place = self.index.place(name)
        return place is not None and place[0] == pack

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
        gone = self._gone(listing)
        if gone:
            self.look_for_packs()  # they may have moved into a pack since we looked
            for name in gone:
                if self.index.place(name) is None:
                    self.forget(name)
        self._take_misfits(listing)

    def _gone(self, listing: Listing) -> set[str]:
        """Names of the known files below the folder that are not there any more."""
        if not listing.complete:
            return set()
        if self._members is None:
            self._members = {}
            for name in self.index:
                if self.index.place(name) is None:
                    self._members.setdefault(_folder(episode_path(name)), set()).add(name)
        gone = self._members.get(listing.folder, set()) - {file.removesuffix(SUFFIX) for file in listing.files}
        if listing.folder.count("/") < 2:
            gone.update(*(names for folder, names in self._members.items() if _is_missing(f"{folder}/", listing)))
            _forget_folders(self._state(EPISODES), listing)
        return gone

    def _take_misfits(self, listing: Listing) -> None:
        for name in listing.strays:
            self.take(f"{listing.folder}/{name}", "temporary file left behind, its writer is gone")
        for name in listing.others:
            self.take(f"{listing.folder}/{name}", "neither a file nor a directory, not part of a replay store")

    def _summarise_note(self, name: str, path: str, note: bytes) -> EpisodeSummary | None:
        """Summary from what the writer noted about the file."""
        try:
            header = json.loads(note)
            return self._belongs(schema.summarise(header, None, 0, self.storage.where(path)), name, path)
        except (DamagedEpisode, KeyError, TypeError, ValueError, RecursionError):
            return self.summarise(name, path)  # the file itself decides

    def _belongs(self, summary: EpisodeSummary, name: str, path: str) -> EpisodeSummary:
        if summary.name != name or episode_path(name) != path:
            raise DamagedEpisode(f"{self.storage.where(path)} holds episode {summary.name}: it does not belong under this name")
        return summary

    def _where(self, name: str, pack: str) -> str:
        return self.storage.where(pack or episode_path(name))

    def _try_save_manifest(self) -> None:
        try:
            with explained("write the manifest of", self.storage.name):
                self.save_manifest()
        except StoreError as error:
            logger.warning("%s; the next process opens every episode instead", error)
            self._in_manifest = len(self.index)  # not again until many more are there


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _forget_folders(state: dict[str, Any], listing: Listing) -> None:
    """Drop what was noted of folders that are gone: should one come back as it was, its stamp would not tell."""
    for folder in [folder for folder in state if _is_missing(f"{folder}/", listing)]:
        del state[folder]


def _is_missing(path: str, listing: Listing) -> bool:
    """Whether a listing shows that ``path``, at any depth below its folder, is not there."""
    if not listing.complete or not path.startswith(f"{listing.folder}/"):
        return False
    first, _, deeper = path[len(listing.folder) + 1 :].partition("/")
    return first not in (listing.folders if deeper or path.endswith("/") else listing.files)
