"""Recipes: the settings behind a measured table, as TOML files that ship with the package (``--recipe NAME``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosmos_ray.config.run import RunConfig
from cosmos_ray.config.settings import format_value, nearest, read_toml, value_of, values_of_tree
from cosmos_ray.config.upgrade import OLD_NAMES
from cosmos_ray.errors import ConfigError

FOLDER = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Every recipe, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe, ``{"sim.task": "Door", ...}``. ConfigError when there is none of this name."""
    if name not in recipe_names():
        raise ConfigError(f"unknown recipe {name!r}{nearest(name, recipe_names()) or '; there are ' + ', '.join(recipe_names())}")
    tree = read_toml(FOLDER / f"{name}.toml")
    tree.pop("about", None)
    return values_of_tree(FOLDER / f"{name}.toml", tree, OLD_NAMES)


def recipe_list() -> str:
    """A line for each recipe: its name and what it gives."""
    names = recipe_names()
    return "\n".join(f"{name:<{max(map(len, names))}}  {read_toml(FOLDER / f'{name}.toml').get('about', '')}" for name in names)


def refuse_disagreement(name: str, values: dict[str, Any], run: RunConfig) -> None:
    """ConfigError when the existing ``run`` has other values than the recipe ``name`` gives: its results would be taken for the
    recipe's."""
    for setting, ours in values.items():
        if (theirs := value_of(run, setting)) != ours:
            raise ConfigError(f"run {run.name!r} has {setting} = {format_value(theirs)}, recipe {name!r} {format_value(ours)}: leave out "
                              "--recipe to go on with the run's settings, or give another --name")
