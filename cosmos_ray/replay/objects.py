"""A store in an object store: S3, GCS or whatever else ``pyarrow.fs`` opens from a URI.

Objects appear whole or not at all, but there is no exclusive creation, no directory that changes its stamp and no mapping. So:

* two writers that commit one key at the same instant both think they are first; they put the same episode under the same name,
  so it is there once, only the count of "new" ones is one too high;
* a writer puts a small note ``log/<hour>/<path>`` before the object itself. A reader that has listed everything once lists
  the notes of the last hours from then on. A note without an object (its writer was killed) is looked up again until it is old;
* what is read is first copied to a local cache folder, whole, and mapped from there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import tempfile
import time
from calendar import timegm
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.fs

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.files import TEMPORARY, make_directory, replace
from cosmos_ray.replay.storage import Listing

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "COSMOS_RAY_CACHE"
CACHE_BYTES = 20 << 30
HOUR = 3600.0


class ObjectStorage:
    """Files under the URI ``name``; see :class:`cosmos_ray.replay.storage.Storage`.

    Copies of what is read lie in ``cache`` (by default ``$COSMOS_RAY_CACHE`` or a folder of this user's temporary directory),
    at most about ``cache_bytes``, those read longest ago deleted first. StoreError if the URI cannot be used.
    """

    mapped = mountable = False

    def __init__(self, name: str, cache: str | Path | None = None, cache_bytes: int = CACHE_BYTES) -> None:
        self.name = re.sub(r"://[^/@]*@", "://", name.partition("?")[0]).rstrip("/")  # without what nobody should read
        self.uri = name
        try:
            self.fs, root = pa.fs.FileSystem.from_uri(name)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise StoreError(f"{self.name} cannot be used as a store: {str(error).partition(chr(10))[0]}") from error
        self._root = root.rstrip("/")
        digest = hashlib.sha256(self.name.encode()).hexdigest()[:16]
        folder = cache or os.environ.get(CACHE_VARIABLE) or Path(tempfile.gettempdir()) / f"cosmos_ray-cache-{os.getuid()}"
        self.cache, self.cache_bytes = Path(folder) / digest, cache_bytes
        self._copied = 0  # bytes since the cache was last looked through
        self._pending: dict[str, float] = {}  # noted paths without an object -> when first seen

    def where(self, path: str) -> str:
        return f"{self.name}/{path}"

    def publish(self, path: str, write: Callable[[BinaryIO], object], note: bytes = b"") -> bool:
        if self.exists(path):
            return False
        sink = pa.BufferOutputStream()
        write(sink)
        if note:
            self._put(f"log/{_hour(time.time())}/{quote(path, safe='')}", note)
        self._put(path, sink.getvalue())
        return True

    def replace(self, path: str, data: bytes | memoryview) -> None:
        self._put(path, data)
        self.forget_copy(path)

    def open(self, path: str) -> pa.NativeFile:
        local = self.cache / path
        size = self._size(path)  # also tells whether it is still there
        if not local.exists() or local.stat().st_size != size:
            with self.fs.open_input_file(self._full(path)) as file:
                content = file.read_buffer()
            make_directory(local.parent)
            replace(memoryview(content), local)
            self._copied += size
            if self._copied > self.cache_bytes // 10:
                self._trim()
        os.utime(local)
        return pa.memory_map(str(local))

    def forget_copy(self, path: str) -> bool:
        """Delete the local copy of an object, which may be damaged; whether there was one."""
        local = self.cache / path
        there = local.exists()
        local.unlink(missing_ok=True)
        return there

    def peek(self, path: str) -> pa.NativeFile:
        return self.fs.open_input_file(self._full(path))

    def read(self, path: str) -> bytes:
        self._size(path)
        with self.fs.open_input_file(self._full(path)) as file:
            return file.read()

    def exists(self, path: str) -> bool:
        return self._info(path).type == pa.fs.FileType.File

    def remove(self, path: str) -> None:
        if self.exists(path):
            self.fs.delete_file(self._full(path))
        self.forget_copy(path)

    def move(self, path: str, target: str) -> None:
        self._size(path)
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
        if folder == "episodes" and "hour" in state:
            yield from self._noted(state, now)
            return
        listings: dict[str, Listing] = {}
        for path in self._list(folder):
            parent, _, name = path.rpartition("/")
            listings.setdefault(parent, Listing(parent, [], complete=False)).files.append(name)
        yield from listings.values()
        state["hour"] = _hour(now - HOUR)

    # ---------------------------------------------------------------- notes

    def _noted(self, state: dict[str, Any], now: float) -> Iterator[Listing]:
        """What was noted since the last scan, with an hour's allowance for clocks that differ."""
        hours, at = [], _seconds(state["hour"])
        while at <= now + HOUR:
            hours.append(_hour(at))
            at += HOUR
        seen = set(state.get("seen", ()))
        noted = {file: unquote(file.rpartition("/")[2]) for hour in hours for file in self._list(f"log/{hour}")}
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

    # ---------------------------------------------------------------- objects

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _info(self, path: str) -> pa.fs.FileInfo:
        return self.fs.get_file_info(self._full(path))

    def _size(self, path: str) -> int:
        info = self._info(path)
        if info.type != pa.fs.FileType.File:
            raise FileNotFoundError(2, "no such object", self.where(path))
        return info.size

    def _put(self, path: str, data: Any) -> None:
        """One object, whole. A stream that broke could have been closed with a part of it: the size tells."""
        with self.fs.open_output_stream(self._full(path)) as stream:
            stream.write(data)
        if self._size(path) != memoryview(data).nbytes:
            self.fs.delete_file(self._full(path))
            raise OSError(f"{self.where(path)} was not written whole")

    def _list(self, folder: str) -> list[str]:
        """Paths of the objects below ``folder``, sorted."""
        selector = pa.fs.FileSelector(self._full(folder), recursive=True, allow_not_found=True)
        files = [info.path for info in self.fs.get_file_info(selector) if info.type == pa.fs.FileType.File]
        return sorted(path[len(self._root) + 1 :] for path in files)

    def _trim(self) -> None:
        """Delete the copies that were read longest ago once they hold too much."""
        self._copied = 0
        files = [path for path in self.cache.rglob("*") if path.is_file() and not path.name.endswith(TEMPORARY)]
        stats = sorted((stat.st_atime, stat.st_size, path) for path in files if (stat := _stat(path)))
        over = sum(size for _, size, _ in stats) - self.cache_bytes
        for _, size, path in stats:
            if over <= 0:
                return
            path.unlink(missing_ok=True)  # who has it mapped keeps it
            over -= size


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _hour(seconds: float) -> str:
    return time.strftime("%Y%m%dT%H", time.gmtime(seconds))


def _seconds(hour: str) -> float:
    return float(timegm(time.strptime(hour, "%Y%m%dT%H")))
