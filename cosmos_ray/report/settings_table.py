"""The settings of a run in the report: a table, command lines that repeat the run, and the versions of the libraries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex

import cosmos_ray
from cosmos_ray.config import RunConfig
from cosmos_ray.settings import FIELDS, format_value, value_of
from cosmos_ray.uri import without_credentials

PACKAGES = ("torch", "deepspeed", "ray", "robosuite", "mujoco", "numpy", "pyarrow")


def settings_table(config: RunConfig) -> list[dict]:
    """Every setting as {name, value, default, changed, help}, sections together."""
    default, rows = RunConfig(), []
    for name, (item, _) in FIELDS.items():
        value, usual = (without_credentials(format_value(value_of(c, name))) for c in (config, default))
        rows.append({"name": name, "value": value, "default": usual, "changed": value != usual, "help": item.metadata["help"]})
    return rows


def commands(config: RunConfig) -> list[dict]:
    """Command lines {what, command} that repeat the evaluation. They name every setting that is not the default."""
    flags = [f"--name {shlex.quote(config.name)}", f"--root {shlex.quote(config.root)}"]
    left_out = ["name", "root", "repeat", "plan_seed", "address", "wandb"]
    if without_credentials(config.replay.store) != config.replay.store:
        left_out.append("replay.store")  # the run has it; without its credentials it would be another one
    for row in settings_table(config):
        if row["changed"] and row["name"] not in left_out:
            flags.append(f"--{row['name'].replace('_', '-')} {shlex.quote(row['value'])}")
    tail = " ".join(flags)
    lines = (("Count again from the stored episodes, running what is missing", "evaluate", ""),
             ("Repeat 5 stored episodes per arm and compare them bit by bit", "evaluate", " --repeat 5"),
             ("Draw the filmstrip of another initial state", "plan", f" --plan-seed {config.plan_seed + 1}"),
             ("Write this page again", "report", ""))
    return [{"what": what, "command": f"python -m cosmos_ray {command} {tail}{more}"} for what, command, more in lines]


def versions() -> dict[str, str]:
    """Versions of this package, Python and the installed libraries that numbers depend on, and the machine."""
    found = {"cosmos_ray": cosmos_ray.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"}
