"""Durable files: a file appears whole under its name or not at all, and stays after a crash once that is reported."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cosmos_ray.errors import StoreError

TEMPORARY = ".tmp"  # suffix of a file that is being written

_ADVICE = {
    errno.ENOSPC: "the disk is full: free space or move the store to a larger one",
    errno.EDQUOT: "the disk quota is used up: free space or move the store elsewhere",
    errno.EFBIG: "the file size limit is reached: raise it (ulimit -f)",
    errno.EROFS: "the file system is read-only: choose a writable directory",
    errno.EACCES: "permission denied: choose a directory this user may write",
    errno.EPERM: "permission denied: choose a directory this user may write",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.ENOTDIR: "a part of the path is a file: choose another directory",
}
# What file systems without hard links answer to link(2).
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@contextmanager
def explained(action: str, path: str | Path) -> Iterator[None]:
    """Turn an OSError into a StoreError of one line: what failed, on which path, and what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno, error.strerror or str(error))
        raise StoreError(f"cannot {action} {path}: {advice}") from error


def make_directory(path: Path) -> None:
    """Create ``path`` and its missing parents so that they survive a crash."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with suppress(FileExistsError):
        path.mkdir()
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in ``path`` durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(data: bytes | memoryview, path: Path) -> bool:
    """Write ``data`` to ``path`` durably unless the name is taken: True if written, False if it existed.

    The order is write, fsync, link, fsync of the directory: a reader sees the whole file or none, and of several
    processes publishing one name exactly one gets True. The directory is synced in either case, so False also means
    that the other writer's file is durable. Raises OSError and leaves nothing under ``path`` when it cannot write.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        written = _link(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    sync_directory(path.parent)
    return written


def _link(temporary: Path, path: Path) -> bool:
    """Give ``temporary`` its final name unless that is taken."""
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    # Without hard links a writer that loses the race below replaces the winner's file by its own. Both hold the
    # episode of one key, so readers cannot tell; only the count of "new" commits is one too high.
    if path.exists():
        return False
    os.rename(temporary, path)
    return True
