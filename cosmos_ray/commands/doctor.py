"""``doctor``: checks every node, and says what to do."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

HELP = "check every node of the cluster, or this machine, and say what to do"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", default="runs", metavar="PATH", help="folder or bucket of the runs [runs]")
    parser.add_argument("--address", default="", metavar="HOST:PORT", help="Ray cluster, or auto [$RAY_ADDRESS, else this machine alone]")
    parser.add_argument("--json", metavar="FILE", help="write the findings as JSON too")


def doctor(options: argparse.Namespace) -> tuple[str, int]:
    """What was found, and the exit code: 0 when nothing is to be done, else 1. ConfigError when the cluster does not answer."""
    from cosmos_ray.diagnosis.checks import look
    from cosmos_ray.diagnosis.table import as_json, as_text

    if options.address or os.environ.get("RAY_ADDRESS"):
        import ray

        from cosmos_ray.connection import connect
        from cosmos_ray.diagnosis.nodes import examine
        from cosmos_ray.supervision import Supervisor

        connect(options.address, simulates=False)
        try:
            found = examine(options.root, Supervisor())
        finally:
            ray.shutdown()
    else:
        found = {"this machine": look(options.root)}
    if options.json:
        Path(options.json).expanduser().write_text(as_json(found))
    return as_text(found), int(any(not finding.good for findings in found.values() for finding in findings))
