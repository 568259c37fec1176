"""The operations that a store needs of a directory or an object store, and their implementation for a directory."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa

from cosmos_ray.replay.files.durable import TEMPORARY, append_line, make_directory, publish_with, replace
from cosmos_ray.replay.format.schema import DamagedEpisode

# A directory whose last change is younger than this is listed again at the next scan, because a file added within
# one tick of the clock that stamped it would leave the stamp as it was. Generous, for servers whose clock is off.
SETTLED_SECONDS = 10.0
LARGEST = 1 << 40  # bytes of a file that is opened
ABANDONED_SECONDS = 3600.0  # age at which the temporary file of a replacement must be that of a killed process


@dataclass
class Listing:
    """What a scan found at one place. Paths are relative to the store, names to ``folder``."""

    folder: str
    files: list[str]
    strays: list[str] = field(default_factory=list)  #: temporary files whose writer must be gone
    others: list[str] = field(default_factory=list)  #: neither file nor folder: links, pipes
    folders: list[str] = field(default_factory=list)  #: subdirectories, where there are such things
    complete: bool = True  #: whether ``files`` and ``folders`` are all there are in ``folder``
    entries: dict[str, bytes] = field(default_factory=dict)  #: what the writer noted about a file, where it noted something


class Storage(Protocol):
    """Files under one root, named by relative paths with ``/``. Errors are OSErrors."""

    name: str  #: of the root, for messages
    mapped: bool  #: whether opening a file costs nothing before its bytes are looked at
    mountable: bool  #: whether the root can vanish and leave an empty directory in its place

    def where(self, path: str) -> str:
        """The full name of a file, for messages."""

    def publish(self, path: str, write: Callable[[BinaryIO], object], note: bytes = b"") -> bool:
        """Have ``write`` fill the file ``path``, durably, whole or not at all; False if the name is taken.

        ``note`` tells scanning readers what is in it, where that saves them from opening it.
        """

    def replace(self, path: str, data: bytes | memoryview) -> None:
        """Put ``data`` under ``path`` whatever is there, whole or not at all."""

    def open(self, path: str) -> pa.NativeFile:
        """The file for reading in place. DamagedEpisode if it is larger than any episode."""

    def refetch(self, path: str) -> bool:
        """Fetch this machine's copy of the file again, if there is one. Returns whether the old copy differed from the file."""

    def forget_copy(self, path: str) -> None:
        """Delete this machine's copy of the file, if there is one."""

    def peek(self, path: str) -> pa.NativeFile:
        """The end of the file, or all of it: enough for the header of most episodes."""

    def read(self, path: str) -> bytes:
        """The file's content."""

    def exists(self, path: str) -> bool: ...

    def remove(self, path: str) -> None:
        """Delete the file if it is there."""

    def move(self, path: str, target: str) -> None: ...

    def append(self, path: str, line: str) -> None:
        """Add a line to a text file; lines of several processes do not mix."""

    def lines(self, path: str) -> list[str]:
        """The lines of a text file, none if there is no such file."""

    def scan(self, folder: str, state: dict[str, Any], stray_seconds: float) -> Iterator[Listing]:
        """Places below ``folder`` that may hold new files since ``state``. The iteration brings ``state`` up to date.

        ``state`` is plain JSON, empty for everything there is.
        """

    def tidy(self) -> None:
        """Delete old notes of :meth:`publish`."""


class LocalStorage:
    """A directory on a local disk or of a file server."""

    mapped = mountable = True

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.name = str(root)

    def where(self, path: str) -> str:
        return f"{self.name}/{path}"

    def publish(self, path: str, write: Callable[[BinaryIO], object], note: bytes = b"") -> bool:
        file = self.root / path
        make_directory(file.parent)
        return publish_with(write, file)

    def replace(self, path: str, data: bytes | memoryview) -> None:
        file = self.root / path
        make_directory(file.parent)
        replace(data, file)
        for stray in file.parent.glob(f".{file.name}.*{TEMPORARY}"):  # of killed processes that wanted to replace it
            if _age(stray) >= ABANDONED_SECONDS:
                stray.unlink(missing_ok=True)

    def open(self, path: str) -> pa.NativeFile:
        file = self._regular(path)
        size = file.stat().st_size
        if size > LARGEST:  # sparse: mapping it may fail, and that must not look like trouble with the store
            raise DamagedEpisode(f"{file} has {size} bytes, more than any episode")
        return pa.memory_map(os.fsencode(file))

    peek = open

    def refetch(self, path: str) -> bool:
        return False

    def forget_copy(self, path: str) -> None:
        pass

    def tidy(self) -> None:
        pass

    def read(self, path: str) -> bytes:
        return self._regular(path).read_bytes()

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.root / path)

    def remove(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def move(self, path: str, target: str) -> None:
        make_directory((self.root / target).parent)
        os.rename(self.root / path, self.root / target)

    def append(self, path: str, line: str) -> None:
        make_directory((self.root / path).parent)
        append_line(self.root / path, line)

    def lines(self, path: str) -> list[str]:
        return self.read(path).decode(errors="replace").splitlines() if self.exists(path) else []

    def scan(self, folder: str, state: dict[str, Any], stray_seconds: float) -> Iterator[Listing]:
        """``state`` maps a directory that has settled to its stamp when it was listed and its subdirectories: only the
        others are listed, all are looked at."""
        try:
            stamp = os.stat(f"{self.name}/{folder}").st_mtime_ns  # before listing: a later change shows as another stamp
            seen = _remembered(state.get(folder))
            if seen is not None and seen[0] == stamp:
                folders = seen[1]
            else:
                listing, waiting = self._list(folder, stray_seconds)
                folders = listing.folders
                yield listing
                if not waiting and time.time() - stamp / 1e9 > SETTLED_SECONDS:
                    state[folder] = [stamp, folders]
                else:
                    state.pop(folder, None)
        except FileNotFoundError:
            state.pop(folder, None)
            return
        for name in folders:
            yield from self.scan(f"{folder}/{name}", state, stray_seconds)

    def _regular(self, path: str) -> Path:
        """The file's full path. OSError if something else is there: a pipe would be waited for without end."""
        file = self.root / path
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(file))
        return file

    def _list(self, folder: str, stray_seconds: float) -> tuple[Listing, bool]:
        """One directory, and whether it holds a temporary file that may still be in use."""
        listing, waiting = Listing(folder, []), False
        with os.scandir(self.root / folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    listing.folders.append(entry.name)
                elif not entry.is_file(follow_symlinks=False):
                    listing.others.append(entry.name)
                elif not entry.name.endswith(TEMPORARY):
                    listing.files.append(entry.name)
                elif _age(entry) >= stray_seconds:
                    listing.strays.append(entry.name)
                else:
                    waiting = True
        return listing, waiting


class ReadOnly:
    """A storage that this process leaves as it is, whoever might write there."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def replace(self, path: str, data: bytes | memoryview) -> None:
        """Nothing: what a store replaces is its manifest, a cache."""

    def tidy(self) -> None:
        """Nothing."""

    def _refuse(self, *arguments: Any, **named: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    publish = remove = move = append = _refuse


def _remembered(entry: Any) -> tuple[int, list[str]] | None:
    """Stamp and subdirectories from the state of a scan; None where it has no such thing. A state comes from a file: a name
    that leads elsewhere must not be followed."""
    match entry:
        case [int(stamp), list(names)] if all(map(_is_plain, names)):
            return stamp, names
    return None


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _age(entry: os.DirEntry | Path) -> float:
    """Seconds since the last change; 0 when it is gone, which is as good as in use."""
    try:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return 0.0
