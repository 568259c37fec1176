"""``python -m cosmos_ray COMMAND``: the stages of the loop, and ``demo`` for all of them."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from cosmos_ray import __version__
from cosmos_ray.caches import use_temporary_caches
from cosmos_ray.commands.command import COMMANDS, REPLAY
from cosmos_ray.commands.configure import configure
from cosmos_ray.commands.help import ShortHelp, command_list, full_help, metavar, usage
from cosmos_ray.commands.suggest import command_meant, flag_meant
from cosmos_ray.commands.tools import TOOLS
from cosmos_ray.config import RunConfig
from cosmos_ray.config.recipes import recipe, recipe_list
from cosmos_ray.config.settings import SETTINGS, given, new_config, with_absolute_paths
from cosmos_ray.config.upgrade import OLD_NAMES
from cosmos_ray.errors import BadFile, ConfigError, CosmosRayError
from cosmos_ray.uri import is_uri
from cosmos_ray.use import never

RENAMED = {**OLD_NAMES, "kind": "class"}  #: flags of before

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  #: Ray gives this variable to the entry point of a job
INTERRUPTED = "interrupted; the same command continues where it stopped"


class _Parser(argparse.ArgumentParser):
    """One line per mistake, with the nearest flag there is."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments:"):
            bad = message.split(":", 1)[1].split()[0].split("=")[0]
            name = bad.lstrip("-").replace("-", "_")
            if name in RENAMED:
                raise ConfigError(f"unknown flag {bad}: it is called --{RENAMED[name].replace('_', '-')} now")
            if name == "recipe":
                raise ConfigError("--recipe is for the commands that make a run (collect, demo, import): a run keeps its settings")
            if not bad.startswith("-"):
                raise ConfigError(f"unexpected word {bad!r}: did you mean --name {bad}? Several values of a setting are written with "
                                  "commas, as in --sim.tasks 0,3")
            message = f"unknown flag {bad}" + flag_meant(bad, [s for action in self._actions for s in action.option_strings])
        elif wrong := re.match(r"argument (COMMAND|VERB): invalid choice: '(.*?)' ", message):
            message = f"unknown command {wrong[2]!r}" + command_meant(wrong[2]) if wrong[1] == "COMMAND" else message
        raise ConfigError(message)


def make_parser(with_verbs: bool = True) -> argparse.ArgumentParser:
    """The command line's parser; the verbs of `replay` come with the libraries that they need."""
    parser = _Parser(prog="cosmos_ray", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="version", version=f"cosmos_ray {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    usual, demo = ((defaults, given(defaults)) for defaults in (RunConfig(), new_config(recipe("demo"))))
    for name, command in COMMANDS.items():
        defaults, told = demo if name == "demo" else usual
        sub = commands.add_parser(name, usage=usage(name), description=command.help[0].upper() + command.help[1:] + ".",
                                  allow_abbrev=False, add_help=False)
        sub.add_argument("-h", "--help", action=ShortHelp, command=name, defaults=defaults)
        sub.add_argument("--help-all", action="help", help="show every setting with all that is known of it")
        sub.add_argument("--config", metavar="FILE", help="TOML file with settings; flags win over it")
        sub.add_argument("--quiet", action="store_true", help="print no progress lines")
        if command.use.creates:
            sub.add_argument("--recipe", metavar="NAME", help="settings of a measured table; 'list' shows the recipes. --config and flags "
                             "win over it")
            sub.add_argument("--fresh", action="store_true", help="move a run of this name aside and start anew")
        for flag, keywords in command.options:
            sub.add_argument(flag, **keywords)
        if name == "demo":
            sub.add_argument("--quick", action="store_true", help="every stage at small counts, five minutes on two cores")
        _add_settings(sub, defaults, told, named=name == "demo")
    for name, tool in TOOLS.items():
        tool.add_flags(commands.add_parser(name, description=tool.help[0].upper() + tool.help[1:] + ".", allow_abbrev=False))
    replay = commands.add_parser("replay", description=REPLAY.capitalize() + ".")
    if with_verbs:
        from cosmos_ray.commands.replay import add_verbs

        add_verbs(replay, _Parser)
    return parser


def _add_settings(parser: argparse.ArgumentParser, defaults: RunConfig, told: dict[str, Any], named: bool) -> None:
    """A flag for every setting, grouped by section. ``named`` says whether the run's name has a default."""
    groups: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        group = groups.setdefault(setting.section, parser.add_argument_group(setting.section))
        text = full_help(setting, defaults, name in told) if name != "name" or named else setting.help
        group.add_argument(setting.flag, dest=name, default=None, metavar=metavar(setting), help=text.replace("%", "%%"))


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 (failed), 2 (wrong input), 130 (interrupted)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return _run(_parse(sys.argv[1:] if arguments is None else arguments))
    except (BadFile, ConfigError) as error:
        return _fail(f"error: {error}", 2)
    except CosmosRayError as error:
        return _fail(f"{type(error).__name__}: {error}", 1)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, 130)
    except SystemExit as leaving:  # --help, or Ray's own handler of SIGTERM while it starts
        if leaving.code == signal.SIGTERM:
            return _fail(INTERRUPTED, 130)
        return leaving.code if isinstance(leaving.code, int) else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser(with_verbs=arguments[:1] == ["replay"])
    # Subparsers hand unknown flags up to the main parser, whose flags would then be suggested: parse them on the right one.
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        for level in ("command", "verb"):
            if getattr(options, level, None):
                parser = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[getattr(options, level)]
        parser.error("unrecognized arguments: " + " ".join(unknown))
    return options


def _run(options: argparse.Namespace) -> int:
    if options.command is None:
        # Without --help the command was forgotten: a script that lost it must not go on as if all was well.
        (sys.stdout if options.help else sys.stderr).write(command_list())
        return 0 if options.help else 2
    if options.command in TOOLS:
        _Interrupts().catch()
        text, code = TOOLS[options.command].run(options)
        sys.stdout.write(text + "\n")
        return code
    if options.command == "replay":
        from cosmos_ray.commands.replay import run_verb

        text, code = run_verb(options)
        sys.stdout.write(text + "\n")
        return code
    if options.command == "watch":
        from cosmos_ray.commands.watch import watch

        sys.stdout.write(watch(options) + "\n")
        return 0
    command, fresh = COMMANDS[options.command], getattr(options, "fresh", False)
    if getattr(options, "recipe", None) == "list":
        sys.stdout.write(recipe_list() + "\n")
        return 0
    own = {name: getattr(options, name) for flag, _ in command.options for name in [flag.removeprefix("--").replace("-", "_")]}
    config = with_absolute_paths(configure(options))
    _check_job(config.root)

    interrupts = _Interrupts()
    interrupts.catch()
    from cosmos_ray.commands.stage import run_stage
    from cosmos_ray.run import open_run

    interrupts.check()
    use = replace(command.use, simulates=never) if own.get("suite") else command.use  # a suite brings its own simulation
    with open_run(config, use, fresh=fresh, quiet=options.quiet) as run:
        interrupts.check()
        interrupts.catch()  # again: Ray has put its own handler of SIGTERM there
        sys.stdout.write(run_stage(options.command, run, own) + "\n")
    return 0


def _check_job(root: str) -> None:
    """ConfigError for a run that would lie in the folder of a Ray job, which Ray deletes after the job."""
    if JOB in os.environ and not is_uri(root) and not Path(root).expanduser().is_absolute():
        raise ConfigError(f"--root {root} lies in the folder of this Ray job, which goes with the job: give a folder that all nodes see, "
                          "from / on, or a bucket")


class _Interrupts:
    """Ctrl-C and SIGTERM (a stopped Ray job, a scheduler) end a run alike.

    Some libraries swallow the exception while they are imported or started: what has come is remembered until the next check.
    """

    def __init__(self) -> None:
        self.came = False

    def catch(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def check(self) -> None:
        if self.came:
            raise KeyboardInterrupt

    def _interrupt(self, *_: object) -> None:
        self.came = True
        raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"cosmos_ray: {message}\n")
    return code


def entry(arguments: list[str] | None = None) -> None:
    """Console entry point; ``arguments`` default to the command line's.

    Leaves without interpreter teardown, where GL and Ray threads abort now and then.
    """
    # OpenMP threads that spin while they wait take the cores from the simulators; set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    use_temporary_caches()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of plain ASCII has no "…"
    try:
        code = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        code = 128 + signal.SIGPIPE
    os._exit(code)
