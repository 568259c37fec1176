"""Folders on this machine for what can be made or fetched again: of libraries, where the user has no home that can be written, and our own
copies of what lies in a bucket."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from urllib.parse import quote, unquote

from cosmos_ray.errors import StoreError
from cosmos_ray.uri import is_uri

CACHE_VARIABLE = "COSMOS_RAY_CACHE"

#: Variables that name such a folder. numba and torch fail without one, matplotlib and Mesa warn. XDG_CACHE_HOME is not among them: below
#: the cache at home may lie released weights, which are only read.
FOLDERS = ("NUMBA_CACHE_DIR", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MESA_SHADER_CACHE_DIR")


def use_temporary_caches() -> None:
    """Name a temporary folder of this user to every library that would keep files at home, if nothing can be written there.

    To be called before those libraries are imported; child processes inherit it.
    """
    home = os.path.expanduser("~")  # stays "~" for a user without a home and without an entry among the users
    if os.access(home, os.W_OK):
        return
    folder = _own(Path(tempfile.gettempdir()) / f"cosmos_ray_{os.getuid()}")
    for name in FOLDERS:
        os.environ.setdefault(name, str(folder / name.lower()))


def _own(folder: Path) -> Path:
    """``folder``, or a new one where another user may have put files there: numba and torch run what their caches hold."""
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix="cosmos_ray_"))


def cache_folder(given: str | Path | None = None) -> Path:
    """The folder of our own copies: ``given``, or ``$COSMOS_RAY_CACHE``, or one of this user's temporary directory. StoreError if the last
    belongs to another user, who could put anything there."""
    if given or (given := os.environ.get(CACHE_VARIABLE)):
        return Path(given)
    folder = Path(tempfile.gettempdir()) / f"cosmos_ray-cache-{os.getuid()}"
    with contextlib.suppress(OSError):  # a full disk costs the copies only
        folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.getuid()):
        raise StoreError(f"the cache folder {folder} belongs to another user: set ${CACHE_VARIABLE}")
    return folder


def working_copy_at(path: str | Path) -> int | None:
    """Which part of ``path`` is the URI of a bucket: what lies below is the working copy of a run there. None for any other path."""
    parts = Path(path).parts
    return next((i for i, part in enumerate(parts[:-1]) if "%3A%2F%2F" in part and is_uri(unquote(part))), None)


def local_root(root: str) -> Path:
    """The folder on this machine that holds the runs of ``root``: ``root`` itself, or for a URI that of the working copies. Its last part
    is the URI, so that a path below says where its original lies."""
    return cache_folder().absolute() / "runs" / quote(root, safe="") if is_uri(root) else Path(root).expanduser()
