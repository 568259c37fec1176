"""Folders for what libraries keep between runs, where the user has no home that can be written."""

from __future__ import annotations

import os
import tempfile

#: Variables that name such a folder. numba and torch fail without one, matplotlib warns.
FOLDERS = ("NUMBA_CACHE_DIR", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")


def use_temporary_caches() -> None:
    """Name a temporary folder of this user to every library that would keep files at home, if nothing can be written there.

    To be called before those libraries are imported; child processes inherit it.
    """
    home = os.path.expanduser("~")  # stays "~" for a user without a home and without an entry among the users
    if os.access(home, os.W_OK):
        return
    for name in FOLDERS:
        os.environ.setdefault(name, os.path.join(tempfile.gettempdir(), f"cosmos_ray_{os.getuid()}", name.lower()))
