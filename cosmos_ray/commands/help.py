"""What ``--help`` says: the commands a line each, and the settings that a command reads a line each."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from typing import Any

from cosmos_ray.commands.command import COMMANDS, REPLAY, Command
from cosmos_ray.commands.tools import TOOLS
from cosmos_ray.config import RunConfig
from cosmos_ray.config.presets import PRESETS
from cosmos_ray.config.settings import SETTINGS, Setting, format_value, given, value_of

CHOOSERS = {"sim.task": "the task's", "model.preset": "", "model.suite": ""}
"""How a default names what it follows; empty: by the value of the default preset."""


def command_list() -> str:
    """Every command with what it does, a line each."""
    commands = {**{name: one.help for group in (COMMANDS, TOOLS) for name, one in group.items()}, "replay": REPLAY}
    return "\n".join(["usage: cosmos_ray COMMAND --name RUN [--SETTING VALUE ...]", "",
                      *(f"  {name:<9} {text}" for name, text in commands.items()), "",
                      "`cosmos_ray COMMAND --help` shows the settings that a command reads."]) + "\n"


def usage(name: str) -> str:
    """How a command is called."""
    return f"cosmos_ray {name}{'' if name == 'demo' else ' --name RUN'} [--SETTING VALUE ...]"


def command_help(name: str, parser: argparse.ArgumentParser, defaults: RunConfig) -> str:
    """The help of a command: its own flags, then the settings that it reads, a line each, with ``defaults``. Rare settings are named."""
    command = COMMANDS[name]
    own = [("/".join(action.option_strings), action.help or "") for action in parser._actions
           if action.option_strings and action.dest not in SETTINGS]
    shown, rare = _read(command, defaults)
    width = max([len(flag) for flag, _ in own] + [len(setting.flag) for settings in shown.values() for setting in settings])
    lines = [f"usage: {usage(name)}", "", command.help[0].upper() + command.help[1:] + ".", ""]
    lines += [_line(flag, text, "", width) for flag, text in own]
    told = given(defaults)
    for section, settings in shown.items():
        lines.append(section)
        for setting in settings:
            default = "" if setting.name == "name" and name != "demo" else default_text(setting, defaults, setting.name in told)
            lines.append(_line(setting.flag, setting.help, default, width))
        if section in rare:
            lines += textwrap.wrap("more: " + ", ".join(rare[section]), _columns(), initial_indent="  ", subsequent_indent="        ",
                                   break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def _read(command: Command, defaults: RunConfig) -> tuple[dict[str, list[Setting]], dict[str, list[str]]]:
    """By section, the settings to show and the flags of those to name."""
    shown: dict[str, list[Setting]] = {"run": [SETTINGS["name"], SETTINGS["root"]]}
    rare: dict[str, list[str]] = {"run": [SETTINGS[name].flag for name in ("address", "wandb")]}
    for name, setting in SETTINGS.items():
        if not {name, setting.section} & set(command.reads):
            continue
        if not setting.rare or setting.section not in shown and name in command.reads:
            shown.setdefault(setting.section, []).append(setting)
        else:
            rare.setdefault(setting.section, []).append(setting.flag)
    return shown, rare


def default_text(setting: Setting, defaults: RunConfig, told: bool) -> str:
    """The default as the help names it: the value that acts, and the setting that it follows."""
    value = format_value(value_of(defaults, setting.name))
    if setting.follows and not told and (text := CHOOSERS.get(setting.follows, setting.follows)):
        return f"{value}, {text}"
    return value


def full_help(setting: Setting, defaults: RunConfig, told: bool) -> str:
    """All that is known of a setting, for ``--help-all``."""
    default = default_text(setting, defaults, told)
    tiny, large = (preset.get(setting.name) for preset in PRESETS.values())
    if large is not None and large != tiny:
        default += f"; {list(PRESETS)[1]}: {format_value(large)}"
    return f"{setting.help} [{default}]" if default else setting.help


def metavar(setting: Setting) -> str:
    """What stands for the value of a flag."""
    if setting.choices:
        return "{" + ",".join(map(str, setting.choices)) + "}"
    return {int: "N", float: "X", str: "TEXT", bool: "true|false"}.get(setting.type, "A,B,...")


def _columns() -> int:
    return max(60, shutil.get_terminal_size().columns)


def _line(flag: str, text: str, default: str, width: int) -> str:
    """One line: the flag, the help up to its first semicolon as far as it fits, the default."""
    short, tail = text.split(";")[0].rstrip("."), f" [{default}]" if default else ""
    room = _columns() - width - 4 - len(tail)
    if len(short) > room:
        short = short[: max(0, room - 1)].rstrip() + "…"
    return f"  {flag:<{width}}  {short}{tail}".rstrip()


class ShortHelp(argparse.Action):
    """``--help`` of a command."""

    def __init__(self, option_strings, dest, *, command: str, defaults: RunConfig, **_: Any):
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help="show this")
        self.command, self.defaults = command, defaults

    def __call__(self, parser, *_: Any):
        sys.stdout.write(command_help(self.command, parser, self.defaults))
        parser.exit()
