"""A store in an object store: an S3 or GCS bucket, through ``obstore``.

Objects appear whole or not at all, and of several writers that put one name the server lets exactly one create it. But there is no
directory that changes its stamp, and no mapping. So:

* a writer puts a small note ``log/<hour>/<path>`` before the object itself. A reader that has listed everything once lists only the
  newer notes from then on. A reader looks up a note without an object (its writer was killed) again until the note is old.
  So clocks of writers and readers may differ by an hour, not more;
* a reader first copies an object to a local cache folder, whole, and maps the copy. A copy belongs to one state of its object, as
  the server names it (its ETag): the reader fetches an object that was replaced again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from calendar import timegm
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import quote, unquote

import obstore
import pyarrow as pa
from obstore.exceptions import AlreadyExistsError, BaseError

from cosmos_ray.caches import cache_folder
from cosmos_ray.replay.files.bucket import answers, open_bucket
from cosmos_ray.replay.files.durable import TEMPORARY, make_directory, replace
from cosmos_ray.replay.files.storage import Listing

if TYPE_CHECKING:
    from obstore import ObjectMeta

logger = logging.getLogger(__name__)

CACHE_BYTES = 20 << 30
HOUR = 3600.0
NOTES_READ_S = 48 * HOUR  # a process that last looked longer ago lists all episodes instead
NOTES_KEPT_S = 96 * HOUR
TAIL = 1 << 16  # bytes at the end of an object that hold the header of an episode, unless that is very long


class ObjectStorage:
    """Files under the URI ``name``; see :class:`cosmos_ray.replay.files.storage.Storage`.

    Copies of what is read lie in ``cache`` (by default ``$COSMOS_RAY_CACHE`` or a folder of this user's temporary directory),
    at most about ``cache_bytes``, those read longest ago deleted first. StoreError if the URI cannot be used.
    """

    mapped = mountable = False

    def __init__(self, name: str, cache: str | Path | None = None, cache_bytes: int = CACHE_BYTES) -> None:
        self.name = name.partition("?")[0].rstrip("/")
        self.client = open_bucket(name)
        self.cache = cache_folder(cache) / hashlib.sha256(name.encode()).hexdigest()[:16]
        self.cache_bytes = cache_bytes
        self._copied = cache_bytes  # bytes since the cache was last looked through, which the first copy of a process does
        self._fetched_again: set[str] = set()
        self._pending: dict[str, float] = {}  # noted paths without an object -> when first seen

    def where(self, path: str) -> str:
        return f"{self.name}/{path}"

    def publish(self, path: str, write: Callable[[BinaryIO], object], note: bytes = b"") -> bool:
        sink = pa.BufferOutputStream()
        write(cast(BinaryIO, sink))
        noted = time.time()
        if note:
            self._put(_note_path(path, noted), note)
        try:
            with answers():
                self._create(path, memoryview(sink.getvalue()))
        except FileExistsError:
            return False
        if note and time.time() - noted > HOUR / 2:  # readers may have stopped to expect it
            self._put(_note_path(path, time.time()), note)
        return True

    def replace(self, path: str, data: bytes | memoryview) -> None:
        self._put(path, data)

    def open(self, path: str) -> pa.NativeFile:
        meta = self._head(path)  # also tells whether it is still there
        if not meta["size"]:
            return pa.BufferReader(b"")
        local = self._copy(path, _state(meta))
        with suppress(OSError):  # a cache that cannot be used costs speed only
            copy = pa.memory_map(str(local))
            if copy.size() == meta["size"]:
                with suppress(OSError):
                    os.utime(local)
                return copy
        meta, content = self._get(path)
        local = self._copy(path, _state(meta))  # it may have been replaced between the two requests
        try:
            self._keep(path, local, content)
            return pa.memory_map(str(local))
        except OSError as error:
            logger.warning("no copy of %s is kept in %s: %s", self.where(path), self.cache, error)
            return pa.BufferReader(content)

    def refetch(self, path: str) -> bool:
        old = [copy.read_bytes() for copy in self._copies(path)]
        again, first = path in self._fetched_again, not old
        self._fetched_again.add(path)
        self.forget_copy(path)
        return self.open(path).read_buffer().to_pybytes() not in old and not (first and again)

    def forget_copy(self, path: str) -> None:
        for copy in self._copies(path):
            copy.unlink(missing_ok=True)

    def peek(self, path: str) -> pa.NativeFile:
        with suppress(BaseError):  # an empty object has no last bytes
            return pa.BufferReader(obstore.get(self.client, path, options={"range": {"suffix": TAIL}}).bytes())
        return self.open(path)

    def read(self, path: str) -> bytes:
        return self._get(path)[1].to_pybytes()

    def exists(self, path: str) -> bool:
        try:
            self._head(path)
            return True
        except FileNotFoundError:
            return False

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError), answers():
            obstore.delete(self.client, path)
        self.forget_copy(path)

    def move(self, path: str, target: str) -> None:
        with answers():
            obstore.rename(self.client, path, target)  # the copy is complete before the original goes
        self.forget_copy(path)

    def append(self, path: str, line: str) -> None:
        """Every line is an object of its own: objects cannot grow."""
        self._put(f"{path}/{time.time_ns()}-{os.getpid()}-{secrets.token_hex(4)}", line.encode() + b"\n")

    def lines(self, path: str) -> list[str]:
        return [line for file in self._list(path) for line in self.read(file).decode(errors="replace").splitlines()]

    def scan(self, folder: str, state: dict[str, Any], stray_seconds: float) -> Iterator[Listing]:
        """``state`` holds the hour up to which notes were read; folders without notes are listed each time."""
        now = time.time()
        since = _seconds(state.get("hour"))
        if folder == "episodes" and now - NOTES_READ_S <= since <= now:
            yield from self._noted(since, state, now)
            return
        notes = self._notes(now - HOUR) if folder == "episodes" else {}  # before listing what they are about
        paths = self._list(folder)
        yield from _tree(folder, paths)
        state.clear()
        there = set(paths)
        state.update(hour=_hour(now - HOUR), seen=sorted(file for file, path in notes.items() if path in there))

    def tidy(self) -> None:
        """Delete the notes that nobody reads any more."""
        old = [file for file in self._list("log") if 0 <= _seconds(file.split("/")[1]) < time.time() - NOTES_KEPT_S]
        with answers():
            for first in range(0, len(old), 1000):
                obstore.delete(self.client, old[first : first + 1000])

    # ---------------------------------------------------------------- notes

    def _noted(self, since: float, state: dict[str, Any], now: float) -> Iterator[Listing]:
        """The notes since the last scan, with an hour's allowance for clocks that are behind."""
        seen = set(state.get("seen", ()))
        noted = self._notes(since)
        for file, path in noted.items():
            if file in seen:
                continue
            if not self.exists(path):
                if now - self._pending.setdefault(file, now) < HOUR:
                    continue  # still being written, or its writer was killed
            else:
                parent, _, name = path.rpartition("/")
                yield Listing(parent, [name], complete=False, entries={name: self.read(file)})
            self._pending.pop(file, None)
            seen.add(file)
        state["hour"] = _hour(now - HOUR)
        state["seen"] = sorted(seen & noted.keys())

    def _notes(self, since: float) -> dict[str, str]:
        """The notes from the hour ``since`` on, each with the path it is about."""
        return {file: unquote(file.rpartition("/")[2]) for file in self._list("log", after=f"log/{_hour(since)}")}

    # ---------------------------------------------------------------- objects

    def _head(self, path: str) -> ObjectMeta:
        with answers():
            return obstore.head(self.client, path)

    def _get(self, path: str) -> tuple[ObjectMeta, pa.Buffer]:
        with answers():
            found = obstore.get(self.client, path)
            return found.meta, pa.py_buffer(found.bytes())

    def _put(self, path: str, data: bytes | memoryview) -> None:
        """One object, whole, in the place of what was there."""
        with answers():
            obstore.put(self.client, path, memoryview(data).cast("B"), use_multipart=False)

    def _create(self, path: str, data: memoryview) -> None:
        """One object, whole, where nothing was: the server decides. FileExistsError if the name is taken."""
        try:
            obstore.put(self.client, path, data.cast("B"), mode="create", use_multipart=False)
        except AlreadyExistsError as error:
            raise FileExistsError(path) from error

    def _list(self, folder: str, after: str | None = None) -> list[str]:
        """Paths of the objects below ``folder`` that sort behind ``after``, sorted."""
        with answers():
            return sorted(found["path"] for page in obstore.list(self.client, prefix=folder, offset=after) for found in page)

    # ---------------------------------------------------------------- local copies

    def _copy(self, path: str, state: str) -> Path:
        """Where the copy of an object in a state is kept."""
        name = hashlib.sha256(path.encode()).hexdigest()[:32]
        return self.cache / name[:2] / f"{name}-{state}"

    def _copies(self, path: str) -> list[Path]:
        pattern = self._copy(path, "*")
        return [copy for copy in pattern.parent.glob(pattern.name) if not copy.name.endswith(TEMPORARY)]

    def _keep(self, path: str, local: Path, content: pa.Buffer) -> None:
        self.forget_copy(path)  # of earlier states
        make_directory(local.parent)
        replace(memoryview(content), local)
        self._copied += content.size
        if self._copied > self.cache_bytes // 10:
            self._trim(local)

    def _trim(self, newest: Path) -> None:
        """Delete the least recently read copies once all together are too large, and the temporary files of killed processes."""
        self._copied, now = 0, time.time()
        files = [(stat, path) for path in self.cache.rglob("*") if path != newest and (stat := _stat(path))]
        copies = sorted((s.st_mtime, s.st_size, p) for s, p in files if not p.name.endswith(TEMPORARY) or now - s.st_mtime > HOUR)
        over = sum(size for _, size, _ in copies) + newest.stat().st_size - self.cache_bytes
        for _, size, path in copies:
            if over <= 0:
                return
            path.unlink(missing_ok=True)  # a process that has the file mapped keeps it
            over -= size


def _state(meta: ObjectMeta) -> str:
    """A name for the state of an object, from what changes whenever it is replaced."""
    told = [str(meta[name]) for name in ("size", "e_tag", "version", "last_modified")]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def _tree(folder: str, paths: list[str]) -> Iterator[Listing]:
    """All files below ``folder`` as listings of the folders they would lie in."""
    listings = {folder: Listing(folder, [])}
    for path in paths:
        parts = path[len(folder) + 1 :].split("/")
        parent = folder
        for name in parts[:-1]:
            inner = f"{parent}/{name}"
            if inner not in listings:
                listings[inner] = Listing(inner, [])
                listings[parent].folders.append(name)
            parent = inner
        listings[parent].files.append(parts[-1])
    yield from listings.values()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat() if path.is_file() else None
    except FileNotFoundError:
        return None


def _note_path(path: str, seconds: float) -> str:
    return f"log/{_hour(seconds)}/{quote(path, safe='')}"


def _hour(seconds: float) -> str:
    return time.strftime("%Y%m%dT%H", time.gmtime(seconds))


def _seconds(hour: Any) -> float:
    """Unix seconds at the begin of an hour; -1 where that is none."""
    try:
        return float(timegm(time.strptime(hour, "%Y%m%dT%H")))
    except (TypeError, ValueError):
        return -1.0
