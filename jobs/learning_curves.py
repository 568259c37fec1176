"""How success depends on the number of candidates and of rollouts, with what `jobs/learning.py` has trained. One resumable command.

    python jobs/learning_curves.py --task wide_lift --seed 0 --over candidates
    python jobs/learning_curves.py --task wide_lift --seed 0 --over rollouts

Writes curves.json and one picture per curve under --to. Every point is counted on the study's held-out initial states.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

from learning import ACTION, FUTURE, PLANNED, REFINED, TASKS, Study, planning, study_parser  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from cosmos_ray.config import RunConfig  # noqa: E402
from cosmos_ray.errors import ConfigError, CosmosRayError  # noqa: E402
from cosmos_ray.replay.files import replace  # noqa: E402
from cosmos_ray.report import style  # noqa: E402
from cosmos_ray.report.statistics import wilson  # noqa: E402
from cosmos_ray.run import Run, open_run  # noqa: E402
from cosmos_ray.settings import stored_config  # noqa: E402
from cosmos_ray.stages.collect import collect  # noqa: E402
from cosmos_ray.stages.evaluate import evaluate  # noqa: E402
from cosmos_ray.stages.refine import refine  # noqa: E402
from cosmos_ray.stages.rollout import rollout  # noqa: E402

CANDIDATES = (1, 2, 4, 8, 16)
ROLLOUTS = (50, 100, 200, 500)

Curve = dict[str, list[list[int]]]  #: name of a line -> points [x, successes, episodes]


def over_candidates(main: RunConfig, at: Sequence[int]) -> Curve:
    """The study's refined network, planning by each value among 1, 2, ... candidates."""
    lines: Curve = {"V(s')": [], "Q(s,a)": []}
    for n in at or CANDIDATES:
        for value, line in zip(("future", "action"), lines.values(), strict=True):
            arm = REFINED if n == 1 else PLANNED
            with open_run(planning(main, candidates=n, value=value)) as run:
                line.append(_point(n, evaluate(run, [arm])["arms"][arm]))
    return lines


def over_rollouts(main: RunConfig, at: Sequence[int]) -> Curve:
    """The study's base policy, refined with as many steps and rounds on fewer or more rollouts, all rounds together; with as many as the
    study had, its own networks."""
    lines: Curve = {REFINED: [], FUTURE: [], ACTION: []}
    base, own = Path(main.root) / main.name / "checkpoints" / "base", main.rounds * (main.rollouts + main.refine_rollouts)
    for n in at or sorted({*ROLLOUTS, own}):
        fewer = dataclasses.replace(main, name=f"{main.name}-rollouts{n}", rollouts=n // main.rounds, refine_rollouts=0)
        config = main if n == own else fewer
        with open_run(config) as run:
            if n != own:
                collect(run)
                _adopt(run, base)
                rollout(run)
                refine(run)
            arms = evaluate(run, [REFINED, PLANNED])["arms"]
        with open_run(planning(config, value="action")) as run:
            by_action = evaluate(run, [PLANNED])["arms"][PLANNED]
        for line, arm in zip(lines.values(), (arms[REFINED], arms[PLANNED], by_action), strict=True):
            line.append(_point(n, arm))
    return lines


def _adopt(run: Run, base: Path) -> None:
    """Begin from another run's base policy."""
    target = run.folder.checkpoint("base")
    target.parent.mkdir(exist_ok=True)
    if not target.exists():
        target.symlink_to(base.absolute(), target_is_directory=True)


def _point(x: int, arm: dict) -> list[int]:
    return [x, arm["successes"], arm["episodes"]]


OVER = {"candidates": over_candidates, "rollouts": over_rollouts}


def joined(curves: list[Curve]) -> Curve:
    """Counts of several training seeds, added up."""
    return {name: [[points[0][0], sum(p[1] for p in points), sum(p[2] for p in points)]
                   for points in zip(*(curve[name] for curve in curves), strict=True)] for name in curves[0]}


def draw(curve: Curve, over: str, title: str) -> Figure:
    """Success rates with Wilson intervals, one line per name."""
    figure, (axis,) = style.figure(6.0, 3.2)
    for (name, points), colour in zip(curve.items(), (style.BLUE, style.VERMILION, style.GREEN), strict=False):
        x = [p[0] for p in points]
        intervals = [wilson(p[1], p[2]) for p in points]
        axis.plot(x, [p[1] / p[2] for p in points], "o-", color=colour, label=name)
        axis.vlines(x, [i[0] for i in intervals], [i[1] for i in intervals], color=colour, alpha=0.4, linewidth=4)
    axis.set_xscale("log", base=2)
    axis.set(xticks=x, xticklabels=[str(n) for n in x], ylim=(0, 1))
    axis.minorticks_off()
    style.label(axis, over, "success rate", title)
    style.legend(axis)
    return figure


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser(__doc__, "curves.json and the pictures")
    parser.add_argument("--over", action="append", choices=OVER, help="which curve; may be given several times [both]")
    parser.add_argument("--at", action="append", type=int, metavar="N",
                        help="let the curve have only the points with N candidates or rollouts; may be given several times "
                             f"[{CANDIDATES} candidates, {ROLLOUTS} rollouts and as many as the study had]")
    options = parser.parse_args(arguments)
    if options.at and len(options.over or OVER) > 1:
        parser.error("--at needs one curve: give --over candidates or --over rollouts")
    if options.at and min(options.at) < 1:
        parser.error(f"--at {min(options.at)} must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        run_curves(options)
    except CosmosRayError as error:
        sys.stderr.write(f"learning_curves: {error}\n")
        return 1
    return 0


def _studied(task: str, seed: int, root: Path) -> RunConfig:
    """Settings of a study's run, as they are kept with it. ConfigError while it has not refined."""
    main = Study(task, seed, root, {}).main
    folder = root / main.name
    if not (folder / "checkpoints" / "refined" / "policy.json").exists():
        raise ConfigError(f"there is no study of {task} with training seed {seed} in {root}: run `python jobs/learning.py --task {task} "
                          f"--seed {seed} --root {root}` first")
    return dataclasses.replace(stored_config(main), planner=main.planner)  # the run was last used with another number of candidates


def run_curves(options: argparse.Namespace) -> None:
    """Every curve asked for; results are written as each is done."""
    file = options.to / "curves.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    options.to.mkdir(parents=True, exist_ok=True)
    at = sorted(set(options.at or ()))
    for task in options.task or TASKS:
        for over in options.over or OVER:
            seeds = options.seed or [0, 1]
            curve = joined([OVER[over](_studied(task, seed, options.root), at) for seed in seeds])
            results[f"{task} over {over}"] = {"seeds": seeds, "lines": curve}
            replace((json.dumps(results, indent=1) + "\n").encode(), file)
            title = f"{task}, {len(seeds)} training seed{'s' * (len(seeds) > 1)}"
            replace(style.png(draw(curve, over, title)), options.to / f"{task}_{over}.png")


if __name__ == "__main__":
    raise SystemExit(main())
