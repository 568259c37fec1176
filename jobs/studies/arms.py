"""Draw the outcome of the studies: the success rate of every arm on every task, from learning.json.

    python jobs/studies/arms.py
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

from matplotlib.figure import Figure  # noqa: E402

from cosmos_ray.errors import ConfigError  # noqa: E402
from cosmos_ray.replay.files.durable import replace  # noqa: E402
from cosmos_ray.report import style  # noqa: E402
from jobs.studies.results import read_results  # noqa: E402

TITLES = {"wide_lift": "Lift within 10 cm", "wide_door": "Door within 10 cm", "can": "PickPlaceCan within 4 cm"}


def draw(results: dict[str, dict]) -> Figure:
    """A panel per task: a bar per arm, its 95 % Wilson interval as a line and its count as text."""
    figure, axes = style.figure(11.0, 2.9, columns=len(results), sharey=True)
    for axis, (task, result) in zip(axes, results.items(), strict=True):
        style.tidy(axis, grid="x")
        names = list(result["arms"])
        for row, (name, arm) in enumerate(result["arms"].items()):
            refined = "refined" in name
            axis.barh(row, arm["successes"] / arm["episodes"], height=0.7, color=style.BLUE if refined else "#b9c1c9")
            axis.hlines(row, arm["low"], arm["high"], color=style.INK, linewidth=1.2)
            axis.text(0.015, row, f"{arm['successes']}/{arm['episodes']}", va="center", fontsize=style.FONT - 1,
                      color=style.PAPER if refined else style.INK)
        axis.set(xlim=(0, 1), yticks=range(len(names)), yticklabels=names)
        axis.set_ylim(len(names) - 0.5, -0.5)  # the base policy at the top
        style.label(axis, "success rate", "", TITLES.get(task, task))
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--to", type=Path, default=Path("docs/results"), help="folder of learning.json and the picture [docs/results]")
    folder = parser.parse_args(arguments).to
    try:
        if not (results := read_results(folder / "learning.json")):
            raise ConfigError(f"no results in {folder / 'learning.json'}: run jobs/studies/learning.py first, or give another --to")
        replace(style.png(draw(results)), folder / "arms.png")
    except ConfigError as error:
        sys.stderr.write(f"arms: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
