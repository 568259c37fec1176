"""The settings that a run was last used with, from the ``config.json`` in its folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from cosmos_ray.config.run import RunConfig
from cosmos_ray.config.settings import PER_COMMAND, changed, value_of
from cosmos_ray.config.upgrade import FORMAT, read_config
from cosmos_ray.errors import ConfigError


def stored_config(config: RunConfig) -> RunConfig | None:
    """The settings that the run of ``config.root`` and ``config.name`` was last used with, or None when there is no such run."""
    file = Path(config.root).expanduser() / config.name / "config.json"
    try:
        tree = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read the run's settings in {file}: {error}") from error
    usual = RunConfig(root=config.root, name=config.name)
    return changed(read_config(file, tree), {name: value_of(usual, name) for name in PER_COMMAND})


def config_tree(config: RunConfig) -> dict[str, Any]:
    """The content of a ``config.json``: every setting, as JSON holds it."""
    return json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(config)}))
