"""The settings that a command works with: the run's own, a recipe's, a file's and those of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosmos_ray.config import RunConfig
from cosmos_ray.config.recipes import recipe, refuse_disagreement
from cosmos_ray.config.settings import SETTINGS, changed, new_config, parse_values, read_toml, values_of_tree
from cosmos_ray.config.stored import stored_config
from cosmos_ray.config.upgrade import OLD_NAMES
from cosmos_ray.errors import ConfigError
from cosmos_ray.uri import is_uri


def configure(options: argparse.Namespace, usual: Mapping[str, Any] | None = None) -> RunConfig:
    """The run's config that a command works with: the stored one with what the command line gives, or that of a new run.

    A new run has ``usual`` values where neither the command line nor a recipe gives others.
    ConfigError when the command needs a --name and has none, or has a recipe that an existing run disagrees with.
    """
    told: dict[str, Any] = {}
    if options.config:
        told.update(values_of_tree(Path(options.config), read_toml(Path(options.config)), OLD_NAMES))
    told.update(parse_values({name: getattr(options, name) for name in SETTINGS}))
    chosen = getattr(options, "recipe", None)
    base = recipe(chosen) if chosen else {}
    if options.command == "demo":
        quick = recipe("quick") if options.quick else {}
        if not chosen and not any(name in told for name in ("sim.task", "model.preset", "model.suite")) and not options.config:
            base = recipe("demo")
        base, told = {**base, **quick}, {**quick, **told}
        told.setdefault("name", "quick" if quick else chosen or RunConfig().name)
    if "name" not in told:
        raise ConfigError(f"`{options.command}` needs the name of its run: give --name{_runs(told.get('root', RunConfig().root))}")
    config = new_config({**(usual or {}), **base, **told})
    _fetch(config)
    stored = None if getattr(options, "fresh", False) else stored_config(config)
    if stored is None:
        return config
    if chosen:
        refuse_disagreement(chosen, {name: value for name, value in base.items() if name not in told}, stored)
    return changed(stored, told)


def _fetch(config: RunConfig) -> None:
    """Have this machine know the settings of a run in a bucket."""
    if is_uri(config.root):
        from cosmos_ray.bucket_run import fetch_settings

        fetch_settings(config.root, config.name)


def _runs(root: str) -> str:
    """The runs there are, to choose a --name from."""
    names = [] if is_uri(root) else sorted(file.parent.name for file in Path(root).expanduser().glob("*/config.json"))
    return f"; {root} has {', '.join(names[:5])}{' and others' if len(names) > 5 else ''}" if names else ""
