"""Chaos for the loop: `refine` on two real Ray nodes, and one of its processes killed at one instant after the other.

    python jobs/chaos/loop.py                                       # all 35 cells
    python jobs/chaos/loop.py --cells "learner rank:mid-push,driver:idle"
    python jobs/chaos/loop.py --episodes 300                        # a worker killed every 20 s, a node once, until 300 are stored
    python jobs/chaos/loop.py --episodes 1000 --stage evaluate      # the same for the episodes of an evaluation
    python jobs/chaos/loop.py --throughput 4                        # pairs of minutes with a worker killed every 30 s, and without

Prints a table; the exit status is 1 if anything was lost, doubled, damaged or trained never, or did not recover.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

from jobs.chaos.cells import FLAGS, MOMENTS, PARTS, Cell, campaign  # noqa: E402
from jobs.chaos.nodes import environment  # noqa: E402
from jobs.chaos.pace import PLAYS, play_under_kills, throughput  # noqa: E402
from jobs.chaos.watch import ROOT, Books  # noqa: E402

MADE = ["--demos", "6", "--pretrain-steps", "30", "--rollouts", "4", "--eval-episodes", "1"]
KEPT = 0.85  # of the throughput, with a worker killed every 30 s


def make_run(root: Path) -> Path:
    """A small run with a base policy and rollouts, on a private Ray."""
    for stage in ("collect", "pretrain", "rollout", "evaluate"):  # a report needs an evaluation
        subprocess.run([sys.executable, "-m", "cosmos_ray", stage, "--root", str(root), "--name", "chaos", *FLAGS, *MADE], cwd=ROOT,
                       env=environment(), check=True, stdout=subprocess.DEVNULL)
    return root / "chaos"


def show(cell: Cell) -> None:
    outcome = "recovered" if cell.recovered else "NOT RECOVERED"
    print(f"{cell.part:<16} {cell.moment:<15} {outcome:<14} lost {cell.lost}  doubled {cell.doubled}  {cell.seconds:6.1f} s, of which "
          f"{cell.start:5.1f} s process start{'  (command started again)' if cell.restarted else ''}", flush=True)
    if cell.problem:
        print("    " + cell.problem.strip().replace("\n", "\n    "), flush=True)


def print_books(books: Books) -> None:
    print(f"\n{books.acknowledged} episodes acknowledged, {books.stored} stored, {len(books.lost)} lost, {len(books.doubled)} doubled, "
          f"{len(books.damaged)} damaged; steps trained without a gap: {'no' if books.untrained else 'yes'}")
    for detail in (*books.lost, *books.doubled, *books.damaged):
        print(f"    {detail}")


def parse(text: str) -> list[tuple[str, str]]:
    """Cells as "part:moment,part:moment"; "all" is every part at every moment, in an order in which the learner's restarts stay within
    their budget: the driver begins anew after every five kills."""
    if text == "all":
        return [(part, moment) for moment in MOMENTS for part in PARTS]
    cells = [tuple(cell.strip().split(":")) for cell in text.split(",")]
    for cell in cells:
        if len(cell) != 2 or cell[0] not in PARTS or cell[1] not in MOMENTS:
            raise SystemExit(f"no cell {':'.join(cell)}: give part:moment of {', '.join(PARTS)} and {', '.join(MOMENTS)}")
    return cells


def all_cells(run: Path, work: Path, cells: list[tuple[str, str]]) -> tuple[bool, dict]:
    done, books = campaign(run, work, cells, show)
    print_books(books)
    good = [cell for cell in done if cell.recovered and not cell.lost and not cell.doubled]
    median = statistics.median(cell.seconds for cell in good) if good else float("nan")
    beyond = statistics.median(cell.seconds - cell.start for cell in good) if good else float("nan")
    print(f"{len(good)} of {len(done)} recovered; median {median:.1f} s, {beyond:.1f} s beyond process start")
    result = {"cells": [vars(cell) for cell in done], "books": dataclasses.asdict(books), "recovered": len(good), "median_s": median,
              "median_beyond_start_s": beyond}
    return len(good) == len(done) and books.right, result


def under_kills(run: Path, work: Path, stage: str, count: int, every_s: float) -> tuple[bool, dict]:
    done = play_under_kills(run, work, stage, count, every_s)
    print(f"{done.stored} of {done.wanted} episodes stored, {done.doubled} doubled, in {done.seconds:.0f} s; {len(done.killed)} workers "
          f"and {int(bool(done.node_killed))} node killed; {len(done.deaths)} deaths recorded, {done.unnamed} of them not in the report")
    for row in done.deaths:
        print(f"    {row['who']} ({row['why']}): {row['then']}")
    return done.right, dataclasses.asdict(done)


def paced(run: Path, work: Path, pairs: int, every_s: float) -> tuple[bool, dict]:
    done = throughput(run, work, pairs, every_s)
    ratios = {name: done.ratio(name) for name in done.pairs[0]}
    for name, (median, low, high) in ratios.items():
        print(f"{name}: {median:.2f} of the throughput without kills (from {low:.2f} to {high:.2f})")
    return min(ratios["learner steps"][0], ratios["control steps"][0]) >= KEPT, {"pairs": done.pairs, "ratios": ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="all", help='"part:moment" with commas between them; all of them by default')
    parser.add_argument("--run", type=Path, help="folder of a run with rollouts to work on, which this changes; made when left out")
    parser.add_argument("--directory", help="where to work (a temporary directory)")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--episodes", type=int, default=0, help="instead of cells: play so many under kills")
    parser.add_argument("--stage", choices=PLAYS, default="rollout", help="command that plays them")
    parser.add_argument("--throughput", type=int, default=0, metavar="PAIRS", help="instead of cells: windows with and without kills")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="between two kills (20 with --episodes, 30 with --throughput); more "
                        "where a worker takes longer to start")
    arguments = parser.parse_args()
    cells = parse(arguments.cells)
    with contextlib.ExitStack() as stack:
        work = Path(arguments.directory or stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-loop-"))).resolve()
        run = (arguments.run or make_run(work / "runs")).resolve()
        if arguments.episodes:
            good, result = under_kills(run, work, arguments.stage, arguments.episodes, arguments.every or 20.0)
        elif arguments.throughput:
            good, result = paced(run, work, arguments.throughput, arguments.every or 30.0)
        else:
            good, result = all_cells(run, work, cells)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
