"""``python -m cosmos_ray COMMAND``: the stages of the loop, and ``demo`` for all of them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import os
import signal
import sys
import warnings
from dataclasses import dataclass

from cosmos_ray.config import DEMO, QUICK_COUNTS, RunConfig
from cosmos_ray.errors import ConfigError, CosmosRayError
from cosmos_ray.settings import FIELDS, add_flags, make_config, stored_config, with_absolute_paths


@dataclass(frozen=True)
class Command:
    """A stage as a command."""

    help: str
    needs_ray: bool = True
    creates: bool = False  #: whether it may start a new run
    options: tuple[tuple[str, dict], ...] = ()  #: flags of its own, as ``argparse`` takes them; handed to the stage


COMMANDS = {
    "demo": Command("run every stage and write the report, on Lift within 10 cm unless told a task, model or file", creates=True),
    "collect": Command("record scripted demonstrations", creates=True),
    "pretrain": Command("train the base policy on the demonstrations"),
    "rollout": Command("run episodes of the base policy: successes and failures"),
    "refine": Command("train on rollouts while acting, pushing new weights to the pool"),
    "evaluate": Command("compare base, refined and planning on held-out initial states"),
    "plan": Command("run one planned episode and draw what was imagined", needs_ray=False),
    "audit": Command("measure what planning could win and which learned part stands in the way", options=(
        ("--checkpoint", {"choices": ("base", "refined"), "help": "which policy of the run [the newest]"}),
        ("--probes", {"type": int, "default": 24, "metavar": "N", "help": "episodes along which candidates are judged in every way [24]"}),
    )),
    "report": Command("write report.html and report.json", needs_ray=False),
    "import": Command("start a run from a released or exported policy", needs_ray=False, creates=True, options=(
        ("--weights", {"required": True, "metavar": "PATH", "help": "public .pt, .safetensors, DCP folder or diffusers folder"}),
        ("--statistics", {"required": True, "metavar": "FILE", "help": "dataset statistics JSON with actions_min, actions_max, "
                                                                     "proprio_min and proprio_max"}),
    )),
    "export": Command("write a run's policy for other projects", needs_ray=False, options=(
        ("--checkpoint", {"choices": ("initial", "base", "refined"), "help": "which policy of the run [the newest]"}),
        ("--format", {"default": "pt", "choices": ("pt", "dcp", "diffusers", "safetensors"), "help": "file format [pt]"}),
        ("--to", {"required": True, "metavar": "PATH", "help": "file or folder to write"}),
        ("--overwrite", {"action": "store_true", "help": "replace what is there"}),
    )),
}


INTERRUPTED = "interrupted; the same command continues where it stopped"


class _Parser(argparse.ArgumentParser):
    """One line per mistake, with the nearest flag there is."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments:"):
            bad = message.split(":", 1)[1].split()[0].split("=")[0]
            known = [s for action in self._actions for s in action.option_strings]
            close = difflib.get_close_matches(bad, known, n=1, cutoff=0.5)
            message = f"unknown flag {bad}" + (f"; did you mean {close[0]}?" if close else "; see --help")
        raise ConfigError(message)


def make_parser(with_verbs: bool = True) -> argparse.ArgumentParser:
    """The command line's parser; the verbs of `replay` come with the libraries that they need."""
    parser = _Parser(prog="cosmos_ray", description="Closed-loop Cosmos Policy: collect, train, roll out, refine, plan.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help[0].upper() + command.help[1:] + ".", allow_abbrev=False)
        sub.add_argument("--quiet", action="store_true", help="no progress lines")
        if command.creates:
            sub.add_argument("--fresh", action="store_true", help="move an existing run of this name aside and start anew")
        for flag, keywords in command.options:
            sub.add_argument(flag, **keywords)
        if name == "demo":
            sub.add_argument("--quick", action="store_true", help="every stage at small counts, about five minutes on two cores")
        add_flags(sub, DEMO if name == "demo" else RunConfig())
    text = "look at a replay store, check it, mend it, shrink it, exchange it"
    replay = commands.add_parser("replay", help=text, description=text.capitalize() + ".")
    if with_verbs:
        from cosmos_ray.commands.replay import add_verbs

        add_verbs(replay, _Parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 (failed), 2 (wrong input), 130 (interrupted)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return _run(_parse(sys.argv[1:] if arguments is None else arguments))
    except ConfigError as error:
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
            if hasattr(options, level):
                parser = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[getattr(options, level)]
        parser.error("unrecognized arguments: " + " ".join(unknown))
    return options


def _run(options: argparse.Namespace) -> int:
    if options.command == "replay":
        from cosmos_ray.commands.replay import run_verb

        text, code = run_verb(options)
        sys.stdout.write(text + "\n")
        return code
    command, fresh = COMMANDS[options.command], getattr(options, "fresh", False)
    quick = getattr(options, "quick", False)
    flags = {name: getattr(options, name) for name in FIELDS}
    base = starting_point(options.command, options.config, flags)
    if quick:
        base = dataclasses.replace(base, name="quick", **QUICK_COUNTS)
    own = {flag.removeprefix("--"): getattr(options, flag.removeprefix("--")) for flag, _ in command.options}
    config = make_config(base, options.config, flags)
    if not fresh and (stored := stored_config(config)) is not None:
        if quick:
            stored = dataclasses.replace(stored, **QUICK_COUNTS)
        config = make_config(stored, options.config, flags, new=False)  # a run keeps its settings from stage to stage

    config = with_absolute_paths(config)

    from cosmos_ray.commands.stage import run_stage
    from cosmos_ray.run import open_run

    signal.signal(signal.SIGTERM, _interrupt)
    with open_run(config, fresh=fresh, quiet=options.quiet, create=command.creates, with_ray=command.needs_ray) as run:
        signal.signal(signal.SIGTERM, _interrupt)  # again: Ray has put its own handler there
        sys.stdout.write(run_stage(options.command, run, own) + "\n")
    return 0


def starting_point(command: str, file: str | None, flags: dict[str, str | None]) -> RunConfig:
    """The defaults of a new run: ``demo`` has a task of its own, unless it is told what to run."""
    told = file or flags["sim.task"] or flags["model.preset"] or flags["model.suite"]
    return DEMO if command == "demo" and not told else RunConfig()


def _interrupt(*_: object) -> None:
    """SIGTERM (a stopped Ray job, a scheduler) ends a run as Ctrl-C does."""
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
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
