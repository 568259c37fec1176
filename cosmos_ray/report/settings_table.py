"""The settings of a run in the report: a table, command lines that repeat the run, and the versions of the libraries."""

from __future__ import annotations

import os
import platform
import shlex

import cosmos_ray
from cosmos_ray.config import RunConfig
from cosmos_ray.config.settings import PER_COMMAND, SETTINGS, format_value, given, new_config, value_of
from cosmos_ray.resume import installed


def settings_table(config: RunConfig) -> list[dict]:
    """Every setting as {name, value, default, changed, help}, sections together. ``default`` is what the run would have without it."""
    own, rows = given(config), []
    for name, setting in SETTINGS.items():
        value = value_of(config, name)
        usual = value_of(new_config({key: own[key] for key in own if key != name}), name) if name in own else value
        rows.append({"name": name, "value": format_value(value), "default": format_value(usual), "changed": name in own,
                     "help": setting.help})
    return rows


def commands(config: RunConfig) -> list[dict]:
    """Command lines {what, command} that repeat the evaluation, which takes a simulation, and the page. They name every setting that is
    not the default."""
    flags = [f"--name {shlex.quote(config.name)}", f"--root {shlex.quote(config.root)}"]
    flags += [f"{SETTINGS[name].flag} {shlex.quote(format_value(value))}" for name, value in given(config).items()
              if name not in PER_COMMAND]
    tail = " ".join(flags)
    lines = (("Count again from the stored episodes, running what is missing", "evaluate", ""),
             ("Repeat 5 stored episodes per arm and compare them bit by bit", "evaluate", " --repeat 5"),
             ("Draw the filmstrip of another initial state", "plan", f" --plan-seed {config.plan_seed + 1}"),
             ("Write this page again", "report", ""))[0 if config.sim.names else -1 :]
    return [{"what": what, "command": f"python -m cosmos_ray {command} {tail}{more}"} for what, command, more in lines]


def versions() -> dict[str, str]:
    """Versions of this package, Python and the installed libraries that numbers depend on, and the machine."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    return {"cosmos_ray": cosmos_ray.__version__, **installed(), "machine": machine}
