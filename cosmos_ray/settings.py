"""From defaults, a TOML file and flags to a :class:`RunConfig`. One flag per config field, help text from the field."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import tomllib
import typing
from pathlib import Path
from typing import Any

from cosmos_ray.config import RunConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.presets import preset_settings
from cosmos_ray.uri import is_uri


def fields_of(config_class: type, prefix: str = "") -> dict[str, tuple[dataclasses.Field, type]]:
    """``{"sim.task": (field, type), ...}`` of a nested config class."""
    hints, out = typing.get_type_hints(config_class), {}
    for item in dataclasses.fields(config_class):
        kind, name = hints[item.name], prefix + item.name
        out.update(fields_of(kind, name + ".") if dataclasses.is_dataclass(kind) else {name: (item, kind)})
    return out


FIELDS = fields_of(RunConfig)

#: Settings of one command, not of the run: a later command does not inherit them.
PER_COMMAND = ("root", "name", "address", "wandb", "repeat", "plan_seed")

#: Names that settings had before, in the files of runs of then.
OLD_NAMES = {"planner.value": "planner.rank_by", "planner.values": "planner.value_samples",
             "learner.advantage": "learner.advantage_temperature", "learner.base_value": "learner.base_value_mode", "verify": "repeat"}

#: Settings of the model that name files.
PATHS = ("tokenizer_path", "text_path")


def add_flags(parser: argparse.ArgumentParser, defaults: RunConfig) -> None:
    """Add ``--config`` and a flag for every field, grouped by section; the help names ``defaults``."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of the settings below; flags win over it")
    groups: dict[str, Any] = {}
    for name, (item, kind) in FIELDS.items():
        section = name.rpartition(".")[0] or "run"
        group = groups.setdefault(section, parser.add_argument_group(section))
        default = value_of(defaults, name)
        text = f"{item.metadata['help']} [{format_value(default)}]"
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, dest=name, default=None, metavar=_metavar(item, kind), help=text.replace("%", "%%"))


def _metavar(item: dataclasses.Field, kind: type) -> str:
    if item.metadata["choices"]:
        return "{" + ",".join(map(str, item.metadata["choices"])) + "}"
    return {int: "N", float: "X", str: "TEXT", bool: "true|false"}.get(kind, "A,B,...")


def value_of(config: RunConfig, name: str) -> Any:
    """The value of a setting of :data:`FIELDS`, such as ``sim.task``."""
    return functools.reduce(getattr, name.split("."), config)


def format_value(value: Any) -> str:
    """A value as it would be typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_value(name: str, kind: type, text: str) -> Any:
    """A flag's text as the field's type; ConfigError when it is not one."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return tuple(parse_value(name, inner, part.strip()) for part in text.split(",") if part.strip())
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ConfigError(f"{name} = {text!r} is neither true nor false")
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"{name} = {text!r} is not {'a whole number' if kind is int else 'a number'}") from error


def make_config(base: RunConfig, file: str | None, flags: dict[str, str | None], new: bool = True) -> RunConfig:
    """``base`` overridden by a TOML file, overridden by flags ``{"sim.task": text}`` (None where not given).

    For a ``new`` run, what comes with the chosen preset and suite is laid over ``base`` first.
    """
    values: dict[str, Any] = {}
    if file:
        values.update(_read_toml(Path(file)))
    values.update({name: parse_value(name, FIELDS[name][1], text) for name, text in flags.items() if text is not None})
    if new:
        base = _replace(base, preset_settings(*(values.get(f"model.{name}", getattr(base.model, name)) for name in ("preset", "suite"))))
    return _replace(base, values)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The files a run refers to, wherever a later command or another process is started."""
    paths = {name: str(Path(path).expanduser().resolve()) for name in PATHS if (path := getattr(config.model, name))}
    replay = config.replay
    if replay.store and not is_uri(replay.store):
        replay = dataclasses.replace(replay, store=str(Path(replay.store).expanduser().resolve()))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **paths), replay=replay)


def stored_config(config: RunConfig) -> RunConfig | None:
    """The settings that the run of ``config.root`` and ``config.name`` was last used with, or None when there is no such run."""
    file = Path(config.root).expanduser() / config.name / "config.json"
    try:
        tree = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read the run's settings in {file}: {error}") from error
    kept = {k: v for k, v in _flatten(file, tree).items() if k not in PER_COMMAND}
    return _replace(RunConfig(), kept | {"root": config.root, "name": config.name})


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        tree = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return _flatten(path, tree)


def _flatten(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """``{"sim": {"task": x}}`` as ``{"sim.task": x}``, every value checked against its field."""
    values = {}
    for key, value in tree.items():
        values.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    values = {OLD_NAMES.get(name, name): value for name, value in values.items()}
    return {name: _checked(path, name, value) for name, value in values.items()}


def _checked(path: Path, name: str, value: Any) -> Any:
    if name not in FIELDS:
        close = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.4)
        raise ConfigError(f"{path}: unknown setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    kind = FIELDS[name][1]
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if isinstance(value, list) and all(isinstance(v, (int, float) if inner is float else inner) for v in value):
            return tuple(inner(v) for v in value)
        raise ConfigError(f"{path}: {name} = {value!r} must be a list of {inner.__name__}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: {name} = {value!r} must be of type {kind.__name__}")
    return value


def _replace(base: Any, values: dict[str, Any]) -> Any:
    changes: dict[str, Any] = {}
    for name, value in values.items():
        section, _, field = name.partition(".")
        if field:
            changes[section] = dataclasses.replace(changes.get(section, getattr(base, section)), **{field: value})
        else:
            changes[section] = value
    return dataclasses.replace(base, **changes)
