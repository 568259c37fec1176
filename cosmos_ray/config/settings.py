"""Settings by name, such as ``sim.task``: what each accepts, how a text becomes a value, and how values become a :class:`RunConfig`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import tomllib
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_ray import released
from cosmos_ray.config.libero import libero_task
from cosmos_ray.config.meaning import meant
from cosmos_ray.config.option import choices
from cosmos_ray.config.presets import preset_settings
from cosmos_ray.config.run import RunConfig
from cosmos_ray.config.sim import SimConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.uri import is_uri


@dataclass(frozen=True)
class Setting:
    """One field of a section."""

    name: str  #: such as ``sim.task``
    type: Any  #: int, float, str, bool, or a tuple of one of them
    choices: tuple  #: the values it accepts; empty = every one of its type
    low: float | None
    high: float | None
    help: str
    follows: str  #: what decides its value when none is given; empty = its default does
    rare: bool

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0] or "run"

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def settings_of_class(config_class: type, prefix: str = "") -> dict[str, Setting]:
    """``{"sim.task": Setting, ...}`` of a nested config class."""
    hints, out = typing.get_type_hints(config_class), {}
    for item in dataclasses.fields(config_class):
        hint, name = hints[item.name], prefix + item.name
        if dataclasses.is_dataclass(hint):
            out.update(settings_of_class(typing.cast(type, hint), name + "."))
            continue
        accepted, meta = choices(hint), item.metadata
        out[name] = Setting(name, type(accepted[0]) if accepted else hint, accepted, meta["low"], meta["high"], meta["help"],
                            meta["follows"], meta["rare"])
    return out


SETTINGS = settings_of_class(RunConfig)

#: Settings of one command, not of the run: a later command does not inherit them.
PER_COMMAND = ("root", "name", "address", "wandb", "repeat", "plan_seed")

#: The settings that choose other settings.
CHOSEN = ("model.preset", "model.suite")

#: Settings of the model that name files, and what finds them.
PATHS = {"tokenizer_path": released.tokenizer, "text_path": released.text}


# ---------------------------------------------------------------- a run's config from named values


def new_config(values: dict[str, Any]) -> RunConfig:
    """The config of a new run that is given ``values`` by name; the rest is the preset's, the suite's, or what it follows."""
    chosen = [str(values.get(name, value_of(RunConfig(), name))) for name in CHOSEN] + [str(values.get("model.fidelity", ""))]
    decided = {name: value for name, value in preset_settings(*chosen).items() if not name.startswith("model.")}  # ModelConfig has them
    if values.get("sim.suite") or libero_task(str(values.get("sim.task", ""))):
        decided.pop("sim.horizon", None)  # a suite of released weights has one for all, LIBERO's tasks have their own
    seen = preset_settings(*chosen)["model.image_size"]
    return from_values({"sim.image_size": values.get("model.image_size", seen), **decided, **values})


def from_values(values: dict[str, Any]) -> RunConfig:
    """The config that has ``values`` by name and no others given."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        sections.setdefault(section, {})[field] = value
    own = sections.pop("", {})
    types = typing.get_type_hints(RunConfig)
    return RunConfig(**own, **{section: types[section](**fields) for section, fields in sections.items()})


def changed(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The config of an existing run with other ``values`` by name. A setting that follows one of them, and has its value, follows on."""
    if values.get("sim.suite"):
        values = {"sim.task": "", **values}
    decisive = {name: values.get(f"sim.{name}", getattr(config.sim, name)) for name in ("task", "suite", "tasks", "quality")}
    if any(getattr(config.sim, name) != value for name, value in decisive.items()):
        values = {**_of_another_simulation(config.sim, values), **values}
    values = {**{name: values[setting.follows] for name, setting in SETTINGS.items()
                 if setting.follows in values and value_of(config, name) == value_of(config, setting.follows)}, **values}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        sections.setdefault(section, {})[field] = value
    own = sections.pop("", {})
    return dataclasses.replace(config, **own, **{section: dataclasses.replace(getattr(config, section), **fields)
                                                 for section, fields in sections.items()})


def _of_another_simulation(sim: SimConfig, values: dict[str, Any]) -> dict[str, Any]:
    """What follows the tasks and the render quality of ``values`` among the settings that those of ``sim`` decided, by name."""
    before: dict[str, Any] = {name: getattr(sim, name) for name in ("task", "suite", "tasks", "controller")}
    after = {name: values.get(f"sim.{name}", value) for name, value in before.items()}
    kept: Any = None if sim.quality == SimConfig(**before).quality else sim.quality
    own, other = SimConfig(**before, quality=kept), SimConfig(**after, quality=values.get("sim.quality", kept))
    follow = [name.removeprefix("sim.") for name, setting in SETTINGS.items() if setting.follows in ("sim.task", "sim.quality")]
    return {f"sim.{name}": getattr(other, name) for name in follow if getattr(sim, name) == getattr(own, name)}


def given(config: RunConfig) -> dict[str, Any]:
    """The fewest values that make this config: ``new_config(given(config)) == config``."""
    values = {name: value for name in CHOSEN if (value := value_of(config, name)) != value_of(RunConfig(), name)}
    usual = new_config(values)
    for name, setting in SETTINGS.items():
        if not setting.follows and value_of(config, name) != value_of(usual, name):
            values[name] = value_of(config, name)
    for name in sorted(SETTINGS, key=lambda name: not name.startswith("model.")):  # other settings follow the model's
        if SETTINGS[name].follows and value_of(new_config(values), name) != value_of(config, name):
            values[name] = value_of(config, name)
    return values


def value_of(config: RunConfig, name: str) -> Any:
    """The value of a setting of :data:`SETTINGS`, such as ``sim.task``."""
    return functools.reduce(getattr, name.split("."), config)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The files a run refers to, wherever a later command or another process is started."""
    paths: dict[str, Any] = {name: str(find(path).absolute()) for name, find in PATHS.items() if (path := getattr(config.model, name))}
    replay = config.replay
    if replay.store and not is_uri(replay.store):
        replay = dataclasses.replace(replay, store=str(Path(replay.store).expanduser().resolve()))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **paths), replay=replay)


# ---------------------------------------------------------------- values from texts and files


def format_value(value: Any) -> str:
    """A value as it would be typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_values(flags: dict[str, str | None]) -> dict[str, Any]:
    """The values of flags ``{"sim.task": text}``; None where a flag was not given."""
    return {name: parse_value(name, SETTINGS[name].type, text) for name, text in flags.items() if text is not None}


def parse_value(name: str, type_: Any, text: str) -> Any:
    """A flag's text as the field's type; ConfigError when it is not one."""
    if typing.get_origin(type_) is tuple:
        inner = typing.get_args(type_)[0]
        return tuple(parse_value(name, inner, part.strip()) for part in text.split(",") if part.strip())
    if type_ is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ConfigError(f"{name} = {text!r} is neither true nor false")
    try:
        return type_(text)
    except ValueError as error:
        raise ConfigError(f"{name} = {text!r} is not {'a whole number' if type_ is int else 'a number'}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a tree. ConfigError when it cannot be read."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def values_of_tree(path: Path, tree: dict[str, Any], renamed: dict[str, str]) -> dict[str, Any]:
    """``{"sim": {"task": x}}`` as ``{"sim.task": x}``, every value checked against its field. ConfigError names ``path``, and the
    present name of a setting that was ``renamed``."""
    return {name: _checked(path, name, value, renamed) for name, value in flat(tree).items()}


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """``{"sim": {"task": x}}`` as ``{"sim.task": x}``."""
    values = {}
    for key, value in tree.items():
        values.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    return values


def nearest(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest of ``known``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


def _question(names: list[str]) -> str:
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""


def _checked(path: Path, name: str, value: Any, renamed: dict[str, str]) -> Any:
    if name in renamed and name not in SETTINGS:
        raise ConfigError(f"{path}: the setting {name!r} is called {renamed[name]!r} now")
    if name not in SETTINGS:
        raise ConfigError(f"{path}: unknown setting {name!r}{_question(meant(name, SETTINGS))}")
    type_ = SETTINGS[name].type
    if typing.get_origin(type_) is tuple:
        inner = typing.get_args(type_)[0]
        if isinstance(value, list) and all(isinstance(v, (int, float) if inner is float else inner) for v in value):
            return tuple(inner(v) for v in value)
        raise ConfigError(f"{path}: {name} = {value!r} must be a list of {inner.__name__}")
    if type_ is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, type_) or (type_ is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: {name} = {value!r} must be of type {type_.__name__}")
    return value
