"""The replay store: a directory of immutable episode files that any number of processes write and read.

Layout: ``<root>/store.json`` marks the directory, ``<root>/episodes/<source>-<task>/<hh>/<name>.arrow`` are the
episodes (``hh`` are two hex digits of the name's digest, so 256 directories share a task's episodes), and
``<root>/quarantine/`` takes what cannot be read.

There is no lock and no index to keep consistent: a committed episode is a file with its final name.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import schema
from cosmos_ray.replay.cache import LeastRecentlyUsed
from cosmos_ray.replay.episode import Episode, EpisodeSummary
from cosmos_ray.replay.files import TEMPORARY, explained, make_directory, publish
from cosmos_ray.replay.quarantine import Quarantine
from cosmos_ray.replay.schema import DamagedEpisode, EpisodeView, NewerSchema

logger = logging.getLogger(__name__)

SUFFIX = ".arrow"
LAYOUT_VERSION = 1

# A directory whose last change is younger than this is listed again at the next refresh, because a file added within
# one tick of the clock that stamped it would leave the stamp as it was. Generous, for servers whose clock is off.
_SETTLED_SECONDS = 10.0


class ReplayStore:
    """Commit, list and read episodes under ``root``.

    Open it once per process and share it; one instance is meant for one thread. ``create`` makes the directory if it
    is missing. ``stray_seconds`` is the age at which a temporary file counts as left behind by a killed writer,
    ``open_limit`` bounds the episodes kept mapped (each holds a file descriptor). StoreError if ``root`` is missing,
    is not a replay store, was made by a newer version or cannot be written.
    """

    def __init__(
        self, root: str | Path, create: bool = True, *, stray_seconds: float = 3600.0, open_limit: int = 256
    ) -> None:
        self.root = Path(root)
        self.quarantine = Quarantine(self.root)
        self.stray_seconds = stray_seconds
        self._episodes = self.root / "episodes"
        self._open: LeastRecentlyUsed[str, EpisodeView] = LeastRecentlyUsed(open_limit)
        self._known: dict[str, EpisodeSummary] = {}
        self._found: list[EpisodeSummary] = []  # every one that was ever known, in order of discovery
        self._reported = 0  # how many of those refresh() has returned
        self._listed: dict[str, int] = {}  # settled shard directory -> its mtime_ns when listed
        self._ignored: set[str] = set()  # files that stay where they are: newer schema, or a read-only store
        self._check_marker(create)

    def commit(self, episode: Episode) -> bool:
        """Store ``episode`` durably: True if it is new, False if its key was committed before (by any process).

        When this returns, the episode survives a killed process and a crashed machine. StoreError, and no visible
        file, if it cannot be written.
        """
        name = episode.key.name
        path = self._path(name)
        data = memoryview(schema.encode(episode))
        with explained("commit an episode to", path):
            make_directory(path.parent)
            written = publish(data, path)
            if not written and self._summarise(name, path) is None:
                # The name was taken by a file that cannot be read, which is in quarantine now.
                written = publish(data, path)
        summary = self._summarise(name, path)
        if summary is not None:
            self._add(summary)
        elif written:
            raise StoreError(f"{path} could not be read back right after it was written: check the disk")
        return written

    def refresh(self) -> list[EpisodeSummary]:
        """Look for new files; summaries of the episodes that became known since the last call, this one's included.

        Only directories that changed are listed and only new files opened. Files that are torn, foreign or of another
        schema, and temporary files older than ``stray_seconds``, are moved to quarantine with a logged warning. Files
        of a newer schema version stay and are left out.
        """
        with explained("list", self._episodes):
            for task in _directories(self._episodes, self._take_stray):
                for shard in _directories(task.path, self._take_stray):
                    self._list(shard)
        fresh, self._reported = self.since(self._reported)
        return fresh

    def since(self, cursor: int) -> tuple[list[EpisodeSummary], int]:
        """Episodes that became known after ``cursor`` (0: all), in that order, and the cursor for the next call.

        For readers that follow the store one by one; does not look for new files, see :meth:`refresh`.
        """
        found = self._found[cursor:]
        return [summary for summary in found if self._known.get(summary.name) is summary], len(self._found)

    def summaries(self) -> list[EpisodeSummary]:
        """Every known episode (as of the last :meth:`refresh` and this instance's commits)."""
        return list(self._known.values())

    def keys(self) -> list[str]:
        """Names of the known episodes, sorted."""
        return sorted(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, name: str) -> bool:
        """Whether an episode is committed under ``name``, known yet or not."""
        return name in self._known or self._path(name).exists()

    def read(self, name: str) -> Episode:
        """A copy of the whole episode, every byte checked; StoreError if it is missing, damaged or newer."""
        try:
            with explained("read", self._path(name)):
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
            view = EpisodeView(str(self._path(name)))
            self._open.put(name, view)
        return view

    def discard(self, name: str, reason: str) -> None:
        """Move a damaged episode to quarantine and forget it."""
        self._open.drop(name)
        self._known.pop(name, None)
        self._take(self._path(name), reason)

    def _check_marker(self, create: bool) -> None:
        marker = self.root / "store.json"
        if create:
            text = json.dumps({"format": "cosmos_ray replay store", "version": LAYOUT_VERSION})
            with explained("create a replay store in", self.root):
                if not marker.exists():
                    make_directory(self._episodes)
                    publish(text.encode(), marker)
        with explained("open", marker):
            if not marker.exists():
                raise StoreError(f"{self.root} is not a replay store (it has no store.json): check the path")
            content = marker.read_bytes()
        try:
            version = int(json.loads(content)["version"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{marker} does not describe a replay store: restore it or choose another root") from error
        if version > LAYOUT_VERSION:
            raise StoreError(f"{self.root} is a store of version {version}, newer than {LAYOUT_VERSION}: upgrade")

    def _path(self, name: str) -> Path:
        """Where the episode ``name`` lies, a function of the name alone."""
        parts = name.rsplit("-", 3)  # <source>-<task>, seed, attempt, digest
        if len(parts) != 4 or os.sep in name or name.startswith("."):
            raise StoreError(f"{name!r} is not an episode name; see EpisodeKey.name")
        return self._episodes / parts[0] / parts[3][:2] / (name + SUFFIX)

    def _list(self, shard: os.DirEntry) -> None:
        """Take in one shard directory, unless it is as it was when it was last listed."""
        changed = os.stat(shard.path).st_mtime_ns  # before listing: a later change shows as another stamp
        if self._listed.get(shard.path) == changed:
            return
        waiting = False
        with os.scandir(shard.path) as entries:
            for entry in entries:
                name = entry.name.removesuffix(SUFFIX)
                if name in self._known or entry.path in self._ignored:
                    continue
                if entry.name.endswith(TEMPORARY):
                    waiting |= not self._take_stray(entry)
                    continue
                summary = self._summarise(name, Path(entry.path))
                if summary is not None:
                    self._add(summary)
        if not waiting and time.time() - changed / 1e9 > _SETTLED_SECONDS:
            self._listed[shard.path] = changed
        else:
            self._listed.pop(shard.path, None)

    def _add(self, summary: EpisodeSummary) -> None:
        if summary.name not in self._known:
            self._known[summary.name] = summary
            self._found.append(summary)

    def _summarise(self, name: str, path: Path) -> EpisodeSummary | None:
        """Summary from the footer of ``path``, or None: gone, in quarantine now, or of a newer schema."""
        try:
            if path.suffix != SUFFIX or not path.is_file():
                raise DamagedEpisode(f"{path} is not an episode file")
            summary = EpisodeView(str(path)).summary
            if summary.name != name or self._path(name) != path:
                raise DamagedEpisode(f"{path} holds episode {summary.name}: it does not belong under this name")
            return summary
        except FileNotFoundError:
            return None
        except NewerSchema as error:
            logger.warning("ignoring %s", error)
            self._ignored.add(str(path))
        except DamagedEpisode as error:
            self._take(path, str(error))
        return None

    def _take(self, path: Path, reason: str) -> None:
        if not self.quarantine.take(path, reason):
            self._ignored.add(str(path))

    def _take_stray(self, entry: os.DirEntry) -> bool:
        """Quarantine a temporary file that is too old to be in use, or any other file that has no place here; False
        if it may still be in use."""
        try:
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime
        except FileNotFoundError:
            return True
        if entry.name.endswith(TEMPORARY):
            if age < self.stray_seconds:
                return False
            self._take(Path(entry.path), f"temporary file left behind {age:.0f} s ago, its writer is gone")
        else:
            self._take(Path(entry.path), "foreign file, not part of a replay store")
        return True


def _directories(path: str | Path, foreign: Callable[[os.DirEntry], bool]) -> list[os.DirEntry]:
    """Directories in ``path``; ``foreign`` is called for every other entry."""
    directories = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry)
            else:
                foreign(entry)
    return directories
