"""How success depends on one thing at a time, on the runs of `jobs/studies/learning.py`. One command, which continues where it stopped.

    python jobs/studies/curves.py --task wide_lift --seed 0 --over candidates
    python jobs/studies/curves.py --task wide_lift --seed 0 --over rollouts

A point with fewer rollouts than the study had (`--at 64`) needs the study's base policy alone, and the job trains that policy if there is
none. `--over successes` shows what failures teach; `--over uniform` compares the paper's hybrid noise with others. The job writes
curves.json and one picture per curve under --to and keeps the points of other runs there. Every point is counted on the study's held-out
initial states.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

from matplotlib.figure import Figure  # noqa: E402

from cosmos_ray.config import RunConfig  # noqa: E402
from cosmos_ray.config.settings import changed  # noqa: E402
from cosmos_ray.errors import ConfigError  # noqa: E402
from cosmos_ray.evidence import wilson  # noqa: E402
from cosmos_ray.replay.files.durable import replace  # noqa: E402
from cosmos_ray.report import style  # noqa: E402
from cosmos_ray.run import Run, open_run  # noqa: E402
from cosmos_ray.stages.collect import collect  # noqa: E402
from cosmos_ray.stages.evaluate import evaluate  # noqa: E402
from cosmos_ray.stages.pretrain import pretrain  # noqa: E402
from cosmos_ray.stages.refine import refine  # noqa: E402
from cosmos_ray.stages.rollout import rollout  # noqa: E402
from jobs.studies.learning import (  # noqa: E402
    ACTION,
    BASE,
    FUTURE,
    REFINED,
    TASKS,
    VALUES,
    Study,
    exit_code,
    planned,
    refuse_other_settings,
    study_parser,
)
from jobs.studies.results import by_seed, changing, differences, read_results, settings_of  # noqa: E402

#: The usual points of each curve. A curve over rollouts also has a point with as many rollouts as the study had.
POINTS = {"candidates": (1, 2, 4, 8, 16), "rollouts": (64, 100, 200, 500), "successes": (0.5, 1.0), "uniform": (0.0, 0.3, 1.0)}
PLANNED = (FUTURE, ACTION)  #: the planning arms that every point counts
FEW = 65  #: up to so many rollouts, the settings of :func:`_few` apply
SHARES = {"successes": "share of successes among the rollout samples", "uniform": "share of U(1, 85) among the drawn training sigmas"}

Point = dict[str, list[float]]  #: name of a line -> [x, successes, episodes]
Curve = dict[str, list[list[float]]]  #: name of a line -> its points, by x


def over_candidates(main: RunConfig, n: int) -> Point:
    """The study's refined policy, planning by each value among ``n`` candidates. With one candidate no arm plans."""
    with open_run(main) as run:
        alone = evaluate(run, ["refined"])["arms"]["refined"] if n == 1 else None
        return {arm: _counts(n, alone or planned(run, candidates=n, rank_by=VALUES[arm])) for arm in PLANNED}


def over_rollouts(main: RunConfig, n: int) -> Point:
    """The study's base policy, refined on ``n`` rollouts of all rounds together, with the study's steps and rounds.

    With as many rollouts as the study had, the point uses the study's own networks. Up to :data:`FEW` rollouts, the settings of
    :func:`_few` apply.
    """
    return _refined(main, _with_rollouts(main, n), n)


def _with_rollouts(main: RunConfig, n: int) -> RunConfig:
    """The run with ``n`` rollouts. ConfigError when ``n`` does not divide into its rounds, or when the run began with other settings."""
    if n == _rollouts(main):
        return main
    like = _few(main) if n <= FEW else main
    if n % like.rounds:
        raise ConfigError(f"{n} rollouts do not divide into {like.rounds} rounds: give another --at")
    return _variant(main, f"rollouts{n}", dataclasses.replace(like, rollouts=n // like.rounds, refine_rollouts=0))


def _few(main: RunConfig) -> RunConfig:
    """The settings for few rollouts: one round, little noise, and twice the time for a rollout to succeed. The policy imitates fewer
    failures, because a value that has seen few episodes weighs failures badly."""
    return changed(main, {"rounds": 1, "rollout.chunk_noise": 0.15, "rollout.horizon": 2 * main.rollout.horizon,
                          "learner.self_imitation": 0.4, "replay.success_share": 0.7})


def over_successes(main: RunConfig, share: float) -> Point:
    """The study's base policy, refined with a ``share`` of successes among the rollout samples; a share of 1 leaves all failures out."""
    config = changed(main, {"replay.success_share": float(share)})
    return _refined(main, _variant(main, f"successes{share:g}", config), share)


def over_uniform(main: RunConfig, share: float) -> Point:
    """The base policy, trained with a ``share`` of uniform noise levels."""
    config = changed(main, {"model.uniform_share": float(share)})
    with open_run(_variant(main, f"uniform{share:g}", config)) as run:
        collect(run)
        pretrain(run)
        return {BASE: _counts(share, evaluate(run, ["base"])["arms"]["base"])}


def _variant(main: RunConfig, suffix: str, config: RunConfig) -> RunConfig:
    """The run with the settings of ``config``, under its own name and with its own store; ``main`` where the settings are the same.
    ConfigError when that run exists and began with other settings."""
    if config == main:
        return main
    config = dataclasses.replace(config, name=f"{main.name}-{suffix}", replay=dataclasses.replace(config.replay, store=""))
    refuse_other_settings(config)
    return config


def _refined(main: RunConfig, config: RunConfig, x: float) -> Point:
    """The point of the run ``config``. A run other than ``main`` refines the base policy of ``main``."""
    base = None if config is main else _base(main)
    with open_run(config) as run:
        if base:
            collect(run)
            _adopt(run, base)
            rollout(run)
            refine(run)
        return {REFINED: _counts(x, evaluate(run, ["refined"])["arms"]["refined"]),
                **{arm: _counts(x, planned(run, rank_by=VALUES[arm])) for arm in PLANNED}}


def _rollouts(main: RunConfig) -> int:
    """The number of rollouts of a study, all rounds together."""
    return main.rounds * (main.rollouts + main.refine_rollouts)


def _base(main: RunConfig) -> Path:
    """The checkpoint of the study's base policy; trains the policy if there is none yet."""
    base = Path(main.root) / main.name / "checkpoints" / "base"
    if not (base / "policy.json").exists():
        with open_run(main) as run:
            collect(run)
            pretrain(run)
    return base


def _adopt(run: Run, base: Path) -> None:
    """Make ``run`` begin from another run's base policy."""
    target = run.folder.checkpoint("base")
    target.parent.mkdir(exist_ok=True)
    if not target.is_symlink():
        target.symlink_to(os.path.relpath(base.resolve(), target.parent.resolve()), target_is_directory=True)


def _counts(x: float, arm: dict) -> list[float]:
    return [x, arm["successes"], arm["episodes"]]


OVER = {"candidates": over_candidates, "rollouts": over_rollouts, "successes": over_successes, "uniform": over_uniform}


def with_point(curve: Curve, point: Point) -> Curve:
    """The curve with ``point``, which replaces a point at the same x."""
    return {name: sorted([*(p for p in curve.get(name, []) if p[0] != counts[0]), counts]) for name, counts in point.items()}


def joined(curves: list[Curve]) -> Curve:
    """Counts of several training seeds, added up where every seed has a point: seeds differ more than neighbouring points do."""
    lines: Curve = {}
    for name in curves[0]:
        points = [{point[0]: point for point in curve[name]} for curve in curves]
        lines[name] = [[x, *(sum(p[x][i] for p in points) for i in (1, 2))] for x in sorted(set.intersection(*map(set, points)))]
    return lines


def draw(curves: dict[int, Curve], over: str, task: str) -> Figure:
    """Success rates with Wilson intervals, one line per name. Each training seed has a panel; where all seeds have common points, a last
    panel shows them together."""
    panels = {f"{task}, training seed {seed}": curve for seed, curve in curves.items()}
    if len(curves) > 1 and all((together := joined(list(curves.values()))).values()):
        panels[f"{task}, {len(curves)} training seeds together"] = together
    figure, axes = style.figure(6.0 if len(panels) == 1 else 4.0 * len(panels), 3.2, columns=len(panels))
    for axis, (title, curve) in zip(axes, panels.items(), strict=True):
        for (name, points), colour in zip(curve.items(), (style.BLUE, style.VERMILION, style.GREEN), strict=False):
            x = [p[0] for p in points]
            intervals = [wilson(p[1], p[2]) for p in points]
            axis.plot(x, [p[1] / p[2] for p in points], "o-", color=colour, label=name)
            axis.vlines(x, [i[0] for i in intervals], [i[1] for i in intervals], color=colour, alpha=0.4, linewidth=4)
        if over not in SHARES:
            axis.set_xscale("log", base=2)
        axis.set(xticks=x, xticklabels=[f"{n:g}" for n in x], ylim=(0, 1))  # every line has the same points
        axis.minorticks_off()
        style.label(axis, SHARES.get(over, over), "success rate", title)
        style.legend(axis)
    return figure


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser(__doc__, "curves.json and the pictures")
    parser.add_argument("--over", action="append", choices=OVER,
                        help="what changes: the candidates of a decision, the rollouts to refine on, the share of successes among the "
                             "rollout samples, or the share of uniform noise levels; may be given several times [candidates and rollouts]")
    parser.add_argument("--at", action="append", type=float, metavar="X",
                        help="only this point; may be given several times ["
                             + "; ".join(f"{over}: {', '.join(f'{x:g}' for x in points)}" for over, points in POINTS.items())
                             + "; and as many rollouts as the study had]")
    options = parser.parse_args(arguments)
    options.over = options.over or ["candidates", "rollouts"]
    if options.at and len(options.over) > 1:
        parser.error("--at needs one curve: give --over candidates, say")
    for x in options.at or ():
        if options.over[0] in SHARES and not 0 <= x <= 1:
            parser.error(f"--at {x:g} must be a share, from 0 to 1")
        if options.over[0] not in SHARES and (x < 1 or x % 1):
            parser.error(f"--at {x:g} must be a whole number, at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    return exit_code("curves", run_curves, parse(arguments))


def _studied(task: str, seed: int, root: Path, flags: dict[str, str], over: str, at: Sequence[float]) -> tuple[RunConfig, list[float]]:
    """The settings of a study's run and the points to make, which are the usual points unless ``at`` names others.

    ConfigError when the study was run with other settings, when a point cannot be made, or when the study has no refined policy. A curve
    of base policies and points of fewer rollouts need no refined policy.
    """
    main = Study(task, seed, root, flags).main
    points = sorted(set(at or (*POINTS[over], *([_rollouts(main)] if over == "rollouts" else []))))
    alone = over == "uniform" or over == "rollouts" and at and _rollouts(main) not in points
    if not alone and not (root / main.name / "checkpoints" / "refined" / "policy.json").exists():
        raise ConfigError(f"there is no study of {task} with training seed {seed} in {root}: run "
                          f"`python jobs/studies/learning.py --task {task} --seed {seed} --root {root}` first")
    refuse_other_settings(main)
    for n in points if over == "rollouts" else ():
        _with_rollouts(main, int(n))
    return main, points


def _settings(main: RunConfig, over: str) -> dict[str, str]:
    """The settings behind a curve: the study's, and those for few rollouts."""
    settings = settings_of(main)
    if over == "rollouts":
        settings |= {f"{name} (up to {FEW} rollouts)": value for name, (_, value) in differences(main, _few(main)).items()}
    return settings


def run_curves(options: argparse.Namespace) -> None:
    """Make every point that the options name, one after another, and write the results after each."""
    file, seeds = options.to / "curves.json", options.seed or [0, 1]
    asked = [(task, over, *_studied(task, seed, options.root, dict(options.set), over, options.at or ()))
             for task in options.task or TASKS for over in options.over for seed in seeds]
    before = read_results(file)
    for task, over, main, _ in asked:
        by_seed(before, f"{task} over {over}", "by_seed", _settings(main, over), file)  # refused before anything runs
    options.to.mkdir(parents=True, exist_ok=True)
    for task, over, main, points in asked:
        for x in points:
            point, settings, name = OVER[over](main, x if over in SHARES else int(x)), _settings(main, over), f"{task} over {over}"
            with changing(file) as results:
                curves = by_seed(results, name, "by_seed", settings, file)
                curves[main.seed] = with_point(curves.get(main.seed, {}), point)
                results[name] = {"settings": settings, "lines": joined(list(curves.values())),
                                 "by_seed": {str(seed): curve for seed, curve in curves.items()}}
                replace(style.png(draw(curves, over, task)), options.to / f"{task}_{over}.png")


if __name__ == "__main__":
    raise SystemExit(main())
