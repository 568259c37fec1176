"""Durable files: a file appears whole under its name or not at all, and stays after a crash once that is reported."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cosmos_ray.errors import StoreError, StoreUnavailable

TEMPORARY = ".tmp"  # suffix of a file that is being written

_ADVICE = {
    errno.ENOSPC: "the disk is full: free space or move the store to a larger one",
    errno.EDQUOT: "the disk quota is used up: free space or move the store elsewhere",
    errno.EROFS: "the file system is read-only: choose a writable directory",
    errno.EIO: "the disk or the file server reports an error: check it",
    errno.ESTALE: "the file server no longer knows this directory: mount it again",
    errno.ENOTCONN: "the file system is not connected: mount it again",
    errno.ETIMEDOUT: "the file server does not answer: check the network",
    errno.EFBIG: "the file size limit is reached: raise it (ulimit -f)",
    errno.EACCES: "permission denied: choose a directory this user may write",
    errno.EPERM: "permission denied: choose a directory this user may write",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.ENOTDIR: "a part of the path is a file: choose another directory",
}
# What may be over in a minute; errors without a number come from an object store's server. The others stay until somebody
# changes something.
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, None}
# What file systems without hard links answer to link(2), and those without unnamed files to O_TMPFILE.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_UNNAMED = _NO_LINKS | {errno.EISDIR, errno.ENOENT, errno.EINVAL}


@contextmanager
def explained(action: str, path: str | Path) -> Iterator[None]:
    """Turn an OSError into a StoreError of one line: what failed, on which path, and what to do.

    It is a StoreUnavailable where trying again later may help.
    """
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, error.strerror or str(error).partition("\n")[0])
        raised = StoreUnavailable if error.errno in _PASSING else StoreError
        raise raised(f"cannot {action} {path}: {advice}") from error


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
    """:func:`publish_with` of bytes that are at hand."""
    return publish_with(lambda file: file.write(data), path)


def publish_with(write: Callable[[BinaryIO], object], path: Path) -> bool:
    """Have ``write`` fill a file that becomes ``path`` unless the name is taken: True if it did, False if it existed.

    The order is write, fsync, link, fsync of the directory: a reader sees the whole file or none, and of several
    processes publishing one name exactly one gets True. The directory is synced in either case, so False also means
    that the other writer's file is durable. Raises OSError and leaves nothing under ``path`` when it cannot write.
    """
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        written = _publish_unnamed(write, path, parent)
        if written is None:
            written = _publish_named(write, path)
        os.fsync(parent)
    finally:
        os.close(parent)
    return written


def replace(data: bytes | memoryview, path: Path) -> None:
    """Put ``data`` under ``path``, whole or not at all, durably, whatever was there."""
    temporary = _temporary(path)
    try:
        _write(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), lambda file: file.write(data))
        os.rename(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file: lines of several processes do not mix, and one that a crash has torn costs only itself."""
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
    try:
        end = os.fstat(handle).st_size
        torn = end and os.pread(handle, 1, end - 1) != b"\n"
        os.write(handle, (b"\n" if torn else b"") + line.encode() + b"\n")  # in one write
    finally:
        os.close(handle)


def _publish_unnamed(write: Callable[[BinaryIO], object], path: Path, parent: int) -> bool | None:
    """Through a file that has no name until it is complete, so that a killed writer leaves nothing; None where the file
    system has no such files."""
    try:
        handle = os.open(".", os.O_WRONLY | os.O_TMPFILE, 0o666, dir_fd=parent)
    except OSError as error:
        if error.errno in _NO_UNNAMED:
            return None
        raise
    with open(handle, "wb") as file:
        _fill(file, write)
        try:
            # With a directory handle this is linkat(2), which follows the link in /proc, instead of link(2). It is the handle
            # the file was made through: should another file system appear under the path meanwhile, it stays where it is.
            os.link(f"/proc/self/fd/{handle}", path.name, dst_dir_fd=parent, follow_symlinks=True)
            return True
        except FileExistsError:
            return os.fstat(handle).st_nlink == 1  # see _link: it was our own
        except OSError as error:
            if error.errno in _NO_UNNAMED:
                return None
            raise


def _publish_named(write: Callable[[BinaryIO], object], path: Path) -> bool:
    """Through a temporary file beside ``path``."""
    temporary = _temporary(path)
    try:
        _write(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), write)
        return _link(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")


def _write(handle: int, write: Callable[[BinaryIO], object]) -> None:
    with open(handle, "wb") as file:
        _fill(file, write)


def _fill(file: BinaryIO, write: Callable[[BinaryIO], object]) -> None:
    write(file)
    file.flush()
    os.fsync(file.fileno())


def _link(temporary: Path, path: Path) -> bool:
    """Give ``temporary`` its final name unless that is taken."""
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        # A file server that lost its answer says so of our own link when the client asks again.
        return os.stat(temporary).st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    # Without hard links a writer that loses the race below replaces the winner's file by its own. Both hold the
    # episode of one key, so readers cannot tell; only the count of "new" commits is one too high.
    if os.path.lexists(path):
        return False
    os.rename(temporary, path)
    return True
