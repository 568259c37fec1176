"""One setting: a dataclass field with its help, its range and the setting that it follows."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import field
from typing import Any

from cosmos_ray.errors import ConfigError

MOST = 10**9  #: of a whole number that names no bound of its own: more is a typing error, or a number in another unit


def option(default: Any, help: str, low: float | None = None, high: float | None = None, follows: str = "", rare: bool = False) -> Any:
    """A dataclass field of a section.

    ``help`` begins with a short sentence, which ``--help`` prints up to the first semicolon. Numbers must satisfy
    ``low <= value <= high``; a whole number without ``high`` is at most :data:`MOST`. A field of type ``Literal`` accepts its arguments.
    ``follows`` names what decides the value when none is given (the default is then None, and the section replaces it when it is made).
    ``--help`` names a ``rare`` setting without its text.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, "follows": follows, "rare": rare})


def fill(section: Any, values: dict[str, Any]) -> None:
    """Give the fields of a frozen ``section`` that are None the value of ``values``. For ``__post_init__`` alone."""
    for name, value in values.items():
        if getattr(section, name) is None:
            object.__setattr__(section, name, value)


def filled(section: Any, values: dict[str, Any]) -> Any:
    """``section`` with the value of ``values`` in every field that is None."""
    return dataclasses.replace(section, **{name: value for name, value in values.items() if getattr(section, name) is None})


def choices(type_: Any) -> tuple:
    """What a field of this type accepts; empty when its type is no ``Literal``."""
    return typing.get_args(type_) if typing.get_origin(type_) is typing.Literal else ()


def check_ranges(section: Any, where: str = "") -> None:
    """Raise :class:`ConfigError` for the first field of a (nested) section that is out of its range or choices."""
    hints = typing.get_type_hints(type(section))
    for item in dataclasses.fields(section):
        value, name = getattr(section, item.name), f"{where}{item.name}"
        if dataclasses.is_dataclass(value):
            check_ranges(value, name + ".")
            continue
        accepted, low, high = choices(hints[item.name]), item.metadata["low"], item.metadata["high"]
        high = MOST if high is None and hints[item.name] is int else high
        if accepted and value not in accepted:
            raise ConfigError(f"{name} = {value!r} is not one of {', '.join(str(c) or 'an empty text' for c in accepted)}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{name} = {value!r} is not a finite number")
            if (low is not None and number < low) or (high is not None and number > high):
                bounds = " and ".join(f"{word} {bound:g}" for word, bound in (("at least", low), ("at most", high)) if bound is not None)
                raise ConfigError(f"{name} = {value!r} is out of range: it must be {bounds}")
