"""A store in an object store: S3, GCS or whatever else ``pyarrow.fs`` opens from a URI.

Objects appear whole or not at all, but there is no exclusive creation, no directory that changes its stamp and no mapping. So:

* two writers that commit one key at the same instant both think they are first; they put the same episode under the same name,
  so it is there once, only the count of "new" ones is one too high;
* a writer puts a small note ``log/<hour>/<path>`` before the object itself. A reader that has listed everything once lists
  the notes of the last hours from then on. A note without an object (its writer was killed) is looked up again until it is old.
  So clocks of writers and readers may differ by an hour, not more;
* what is read is first copied to a local cache folder, whole, and mapped from there. A copy belongs to one state of its object,
  as the server names it (its ETag): an object that was replaced is fetched again.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import tempfile
import time
from calendar import timegm
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.fs

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.files.durable import TEMPORARY, make_directory, replace
from cosmos_ray.replay.files.storage import Listing
from cosmos_ray.uri import without_credentials

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "COSMOS_RAY_CACHE"
CACHE_BYTES = 20 << 30
HOUR = 3600.0
NOTES_READ_S = 48 * HOUR  # who last looked longer ago lists all episodes instead
NOTES_KEPT_S = 96 * HOUR
# What the servers say that no later try changes.
_FINAL = (
    (re.compile(r"\b(ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|HTTP status 40[13])\b"), errno.EKEYREJECTED,
     "the server refuses this access: check the credentials and what they may do there"),
    (re.compile(r"\bNO_SUCH_BUCKET\b"), errno.ENXIO, "there is no such bucket: make it, or check the URI"),
)  # fmt: skip


class ObjectStorage:
    """Files under the URI ``name``; see :class:`cosmos_ray.replay.files.storage.Storage`.

    Copies of what is read lie in ``cache`` (by default ``$COSMOS_RAY_CACHE`` or a folder of this user's temporary directory),
    at most about ``cache_bytes``, those read longest ago deleted first. StoreError if the URI cannot be used.
    """

    mapped = mountable = False

    def __init__(self, name: str, cache: str | Path | None = None, cache_bytes: int = CACHE_BYTES) -> None:
        shown = without_credentials(name)
        self.name, self.uri = shown.partition("?")[0].rstrip("/"), name
        try:
            self.fs, root = pa.fs.FileSystem.from_uri(_with_single_puts(name))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise StoreError(f"{self.name} cannot be used as a store: {_reason(error, name)}") from None  # its text has the URI
        self._root = root.rstrip("/")
        self.cache = _cache_folder(cache) / hashlib.sha256(shown.encode()).hexdigest()[:16]
        self.cache_bytes = cache_bytes
        self._copied = cache_bytes  # bytes since the cache was last looked through, which the first copy of a process does
        self._fetched_again: set[str] = set()
        self._pending: dict[str, float] = {}  # noted paths without an object -> when first seen

    def where(self, path: str) -> str:
        return f"{self.name}/{path}"

    def publish(self, path: str, write: Callable[[BinaryIO], object], note: bytes = b"") -> bool:
        if self.exists(path):
            return False
        sink = pa.BufferOutputStream()
        write(sink)
        data, noted = sink.getvalue(), time.time()
        if note:
            self._put(_note_path(path, noted), note)
        self._put_new(path, data)
        if note and time.time() - noted > HOUR / 2:  # readers may have stopped to expect it
            self._put(_note_path(path, time.time()), note)
        return True

    def replace(self, path: str, data: bytes | memoryview) -> None:
        self._put(path, data)

    def open(self, path: str) -> pa.NativeFile:
        file = self._open(path)  # also tells whether it is still there
        size, local = file.size(), self._copy(path, _state(file))
        if not size:
            return pa.BufferReader(b"")
        with suppress(OSError):  # a cache that cannot be used costs speed only
            copy = pa.memory_map(str(local))
            if copy.size() == size:
                with suppress(OSError):
                    os.utime(local)
                return copy
        content = self._content(file, path)
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
        return self._open(path)

    def read(self, path: str) -> bytes:
        return self._content(self._open(path), path).to_pybytes()

    def exists(self, path: str) -> bool:
        try:
            self._open(path)  # one request; asking for the file's info takes another one where it is not there
            return True
        except FileNotFoundError:
            return False

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError), _answers():
            self.fs.delete_file(self._full(path))
        self.forget_copy(path)

    def move(self, path: str, target: str) -> None:
        self._open(path)
        with _answers():
            self.fs.copy_file(self._full(path), self._full(target))  # the copy is complete before the original goes
        self.remove(path)

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
        notes = self._notes(now - HOUR, now) if folder == "episodes" else {}  # before listing what they are about
        paths = self._list(folder)
        yield from _tree(folder, paths)
        state.clear()
        there = set(paths)
        state.update(hour=_hour(now - HOUR), seen=sorted(file for file, path in notes.items() if path in there))

    def tidy(self) -> None:
        """Delete the notes that nobody reads any more."""
        with _answers():
            hours = self.fs.get_file_info(pa.fs.FileSelector(self._full("log"), allow_not_found=True))
            for hour in hours:
                if 0 <= _seconds(hour.base_name) < time.time() - NOTES_KEPT_S:
                    self.fs.delete_dir(hour.path)

    # ---------------------------------------------------------------- notes

    def _noted(self, since: float, state: dict[str, Any], now: float) -> Iterator[Listing]:
        """What was noted since the last scan, with an hour's allowance for clocks that are behind. What is noted in an hour to
        come is read when that has come."""
        seen = set(state.get("seen", ()))
        noted = self._notes(since, now)
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

    def _notes(self, since: float, now: float) -> dict[str, str]:
        """The notes of the hours from ``since`` to ``now``, each with the path it is about."""
        hours = [_hour(since + HOUR * n) for n in range(int(now // HOUR - since // HOUR) + 1)]
        return {file: unquote(file.rpartition("/")[2]) for hour in hours for file in self._list(f"log/{hour}")}

    # ---------------------------------------------------------------- objects

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _open(self, path: str) -> pa.NativeFile:
        """The object, to be read from. FileNotFoundError, OSError."""
        with _answers():
            return self.fs.open_input_file(self._full(path))

    def _content(self, file: pa.NativeFile, path: str) -> pa.Buffer:
        with _answers(), file:
            size, content = file.size(), file.read_buffer()
        if content.size != size:
            raise OSError(f"{content.size} of {size} bytes of {self.where(path)} were received")
        return content

    def _put(self, path: str, data: Any) -> None:
        """One object, whole, in the place of what was there."""
        with _answers():
            stream = self.fs.open_output_stream(self._full(path))
            stream.write(data)
            stream.close()

    def _put_new(self, path: str, data: Any) -> None:
        """The same where nothing was. A stream that breaks may be closed, and so become an object, with a part of it."""
        try:
            self._put(path, data)
        except OSError:
            with suppress(OSError):
                if self._open(path).size() != memoryview(data).nbytes:
                    self.remove(path)
            raise

    def _list(self, folder: str) -> list[str]:
        """Paths of the objects below ``folder``, sorted."""
        selector = pa.fs.FileSelector(self._full(folder), recursive=True, allow_not_found=True)
        with _answers():
            files = [info.path for info in self.fs.get_file_info(selector) if info.type == pa.fs.FileType.File]
        return sorted(path[len(self._root) + 1 :] for path in files)

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
        """Delete the copies that were read longest ago once they hold too much, and what killed processes left."""
        self._copied, now = 0, time.time()
        files = [(stat, path) for path in self.cache.rglob("*") if path != newest and (stat := _stat(path))]
        copies = sorted((s.st_mtime, s.st_size, p) for s, p in files if not p.name.endswith(TEMPORARY) or now - s.st_mtime > HOUR)
        over = sum(size for _, size, _ in copies) + newest.stat().st_size - self.cache_bytes
        for _, size, path in copies:
            if over <= 0:
                return
            path.unlink(missing_ok=True)  # who has it mapped keeps it
            over -= size


@contextmanager
def _answers() -> Iterator[None]:
    """Give the servers' final answers an error number, which tells them from those that a later try may change."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            for pattern, number, advice in _FINAL:
                if pattern.search(str(error)):
                    raise OSError(number, advice) from error
        raise


def _with_single_puts(uri: str) -> str:
    """Let small objects be put by one request instead of three."""
    if not uri.startswith("s3:") or "allow_delayed_open" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true"


def _reason(error: Exception, uri: str) -> str:
    """What is wrong with a URI, without what of it nobody should read."""
    text = str(error).partition("\n")[0]
    for hidden in (_with_single_puts(uri), uri):
        text = text.replace(hidden, without_credentials(hidden))
    hidden = without_credentials(uri)
    user = uri[uri.find("://") + 3 : len(uri) - len(hidden[hidden.find("://") + 3 :])]
    for part in re.split(r"[:@]", user):
        if part:
            text = text.replace(part, "...")
    return text


def _cache_folder(given: str | Path | None) -> Path:
    """StoreError if the default one belongs to somebody else, who could put there what he likes."""
    if given or (given := os.environ.get(CACHE_VARIABLE)):
        return Path(given)
    folder = Path(tempfile.gettempdir()) / f"cosmos_ray-cache-{os.getuid()}"
    with suppress(OSError):  # a full disk costs the copies only
        folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.getuid()):
        raise StoreError(f"the cache folder {folder} belongs to another user: set ${CACHE_VARIABLE}")
    return folder


def _state(file: pa.NativeFile) -> str:
    """A name for the state of an object, from what changes whenever it is replaced."""
    said = {str(_text(k)).lower(): _text(v) for k, v in (file.metadata() or {}).items()}
    told = [said.get(name, "") for name in ("etag", "generation", "last-modified")]
    return hashlib.sha256("\n".join([str(file.size()), *told]).encode()).hexdigest()[:16]


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


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
