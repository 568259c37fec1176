"""The settings that a run was last used with, from the ``config.json`` in its folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from cosmos_ray.caches import local_root
from cosmos_ray.config.run import RunConfig
from cosmos_ray.config.settings import PER_COMMAND, changed, value_of
from cosmos_ray.config.upgrade import FORMAT, read_config
from cosmos_ray.errors import ConfigError
from cosmos_ray.uri import below, is_uri


def stored_config(config: RunConfig) -> RunConfig | None:
    """The settings that the run of ``config.root`` and ``config.name`` was last used with, or None when there is no such run."""
    file = local_root(config.root) / config.name / "config.json"
    tree = read_object(file)
    if tree is None:
        return None
    usual = RunConfig(root=config.root, name=config.name)
    return changed(read_config(file, tree), {name: value_of(usual, name) for name in PER_COMMAND})


def store_of(config: RunConfig) -> str:
    """The replay store of the run: its own folder or bucket, or where ``replay.store`` says."""
    own = below(config.root, config.name, "replay") if is_uri(config.root) else str(local_root(config.root) / config.name / "replay")
    return config.replay.store or own


def read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in one of a run's files, or None when there is no such file. ConfigError for a file that is anything else."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
        raise ConfigError(f"{file} is damaged ({error}): bring it back from a copy of the run") from error
    if not isinstance(held, dict):
        raise ConfigError(f"{file} is damaged (it holds {type(held).__name__} instead of an object): bring it back from a copy of the run")
    return held


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose names must differ."""
    held = dict(pairs)
    if len(held) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return held


def config_tree(config: RunConfig) -> dict[str, Any]:
    """The content of a ``config.json``: every setting, as JSON holds it."""
    return json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(config)}))
