"""The command `study`: arms, training seeds and tasks of one file, as work of a Ray cluster."""

from __future__ import annotations

import argparse
from pathlib import Path

from cosmos_ray.config.study import read_study
from cosmos_ray.errors import ConfigError

HELP = "run arms x seeds x tasks of a file on the cluster"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `study`."""
    parser.add_argument("file", type=Path, metavar="STUDY.toml", help="arms, seeds, tasks and runs; docs/studies.md has the format")
    parser.add_argument("--root", metavar="FOLDER", help="folder of the study's runs [what the file says, else runs/NAME]")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="folder for NAME.json, NAME.md and NAME.log [that of the runs]")
    parser.add_argument("--address", default="", metavar="TEXT", help="Ray cluster [$RAY_ADDRESS, else a private one on this machine]")
    parser.add_argument("--at-once", type=int, metavar="N", help="cells that run at the same time [one for each node]")
    parser.add_argument("--list", action="store_true", help="show the cells and what is missing of them, run nothing")
    parser.add_argument("--quiet", action="store_true", help="print no progress lines")


def study_command(options: argparse.Namespace) -> tuple[str, int]:
    """Run a study to its end; returns its tables and the exit code. ConfigError names the key of the file and its line."""
    study = read_study(options.file, options.root)
    if options.at_once is not None and options.at_once < 1:
        raise ConfigError(f"--at-once {options.at_once} must be at least 1")
    from cosmos_ray.stages.study_results import StudyResults

    to = options.to or Path(study.root if "://" not in study.root else f"runs/{study.name}")
    results = StudyResults(study, to)
    results.check()
    if options.list:
        lines = (f"{cell.config.name}: {', '.join(arm.name for arm in cell.arms) or 'for other cells'}"
                         f"{'' if cell.arms and results.missing(cell) else ' (there)' if cell.arms else ''}" for cell in study.cells())
        return "\n".join(lines), 0
    import ray

    from cosmos_ray.connection import connect
    from cosmos_ray.stages.study import run_study

    connect(options.address)
    try:
        run_study(study, to, options.at_once, options.quiet)
    finally:
        ray.shutdown()
    return f"{results.text()}\nthe same in {results.page}, numbers and outcomes in {results.file}", 0
