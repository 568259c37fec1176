"""What does refinement on a policy's own experience bring, and which part brings it? One command, which continues where it stopped.

    python jobs/studies/learning.py --task wide_lift --seed 0 --seed 1

A task is a recipe (`--recipe list` of `python -m cosmos_ray collect` shows the recipes). Each task and training seed has seven arms:
the base policy, trained on demonstrations; the same compute again on demonstrations; behaviour cloning of demonstrations and
successes; the refined policy, whose rollouts are weighted by advantage; and best-of-N planning of the refined policy by V(s'), by
Q(s, a) and by the mean of both. All arms meet the same held-out initial states under the same noise.

The job writes learning.json and learning.md under --to and keeps the results of other training seeds there. So the studies of a task may
run one after another, side by side, or on several machines that share --to.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

import numpy as np  # noqa: E402

from cosmos_ray.commands.cli import INTERRUPTED  # noqa: E402
from cosmos_ray.config import RunConfig, check  # noqa: E402
from cosmos_ray.config.recipes import recipe  # noqa: E402
from cosmos_ray.config.settings import SETTINGS, new_config, parse_values  # noqa: E402
from cosmos_ray.config.stored import stored_config  # noqa: E402
from cosmos_ray.errors import ConfigError, CosmosRayError  # noqa: E402
from cosmos_ray.evidence import paired_with_interval, wilson  # noqa: E402
from cosmos_ray.replay.files.durable import replace  # noqa: E402
from cosmos_ray.run import Run, open_run  # noqa: E402
from cosmos_ray.stages.collect import collect  # noqa: E402
from cosmos_ray.stages.evaluate import evaluate  # noqa: E402
from cosmos_ray.stages.pretrain import pretrain  # noqa: E402
from cosmos_ray.stages.refine import refine  # noqa: E402
from cosmos_ray.stages.rollout import rollout  # noqa: E402
from jobs.studies.results import by_seed, changing, differences, read_results, settings_of  # noqa: E402

TASKS = ("wide_lift", "wide_door", "can")  #: the recipes that are studied: their base policies fail often, not always

BASE, COMPUTE, CLONED = "base", "base + same compute on demonstrations", "filtered behaviour cloning"
REFINED, FUTURE, ACTION, MEAN = "refined", "refined + V(s')", "refined + Q(s,a)", "refined + mean of V(s') and Q(s,a)"
ARMS = (BASE, COMPUTE, CLONED, REFINED, FUTURE, ACTION, MEAN)
VALUES = {FUTURE: "future", ACTION: "action", MEAN: "both"}  #: `planner.rank_by` of each arm that plans
OWN = ("name", "root", "seed", "planner.rank_by")  #: settings that the study chooses for its runs


class Study:
    """The runs of one task and training seed. All of them read the main run's store, so all learn from the same experience."""

    def __init__(self, task: str, seed: int, root: Path, flags: dict[str, str]):
        self.main = new_config({**recipe(task), **parse_values(flags), "name": f"{task}-{seed}", "root": str(root), "seed": seed})
        check(self.main)

    def outcomes(self) -> dict[str, list[int]]:
        """Run what is missing, and return the outcome (0 or 1) of every arm on every held-out initial state.

        ConfigError when a run of this study exists with other settings: its results would pass for results of these settings.
        """
        main = self.main
        refuse_other_settings(main)
        with open_run(main) as run:
            for stage in (collect, pretrain, rollout, refine):
                stage(run)
            arms = evaluate(run)["arms"]
            out = {BASE: arms["base"]["outcomes"], REFINED: arms["refined"]["outcomes"]}
            out |= {arm: planned(run, rank_by=value)["outcomes"] for arm, value in VALUES.items()}
            base, store = run.folder.checkpoint("base"), str(run.folder.replay)
        for name, arm, share in (("compute", COMPUTE, 0.0), ("cloned", CLONED, main.learner.self_imitation)):
            control = self._control(name, str(base), store, share)
            refuse_other_settings(control)
            with open_run(control) as run:
                pretrain(run)
                out[arm] = evaluate(run, ["base"])["arms"]["base"]["outcomes"]
        return out

    def _control(self, name: str, base: str, store: str, share: float) -> RunConfig:
        """A control: as many steps from the same base policy at the same rate, a ``share`` of policy samples from successful rollouts."""
        main, learner = self.main, self.main.learner
        learner = dataclasses.replace(learner, lr=learner.refine_lr, base_mix=learner.refine_mix, self_imitation=share,
                                      advantage_temperature=0.0)
        steps = main.rounds * (main.planning_steps + main.refine_steps)
        return dataclasses.replace(main, name=f"{main.name}-{name}", init=base, pretrain_steps=steps, planning_steps=0, learner=learner,
                                   replay=dataclasses.replace(main.replay, store=store))


def planned(run: Run, **settings) -> dict:
    """What :func:`evaluate` counts for the refined policy with other ``settings`` of the planner. The run keeps its own settings."""
    config, arm = run.config, "refined + planning"
    config = dataclasses.replace(config, planner=dataclasses.replace(config.planner, **settings))
    return evaluate(dataclasses.replace(run, config=config), [arm])["arms"][arm]


def refuse_other_settings(config: RunConfig) -> None:
    """ConfigError when the run exists with settings that give other results: its results would pass for results of these settings.

    The planner's settings may differ, because evaluations know them. So may the places of the base policy and the store, because a study
    may be moved.
    """
    before = stored_config(config)
    if before is None:
        return
    replay = dataclasses.replace(config.replay, store=before.replay.store)
    if others := differences(before, dataclasses.replace(config, planner=before.planner, init=before.init, replay=replay)):
        name, (theirs, ours) = next(iter(others.items()))
        raise ConfigError(f"study {config.name} in {config.root} was run with {name} = {theirs}, not {ours}: give another --root, or the "
                          "same --set")


def summarise(outcomes: list[dict[str, list[int]]]) -> dict:
    """Counts of every arm over all training seeds, and paired differences: {"arms": {...}, "pairs": {"a over b": {...}}}.

    A pair is the same initial state of the same training seed under two arms. Intervals are 95 % percentile bootstrap over the pairs, in
    points.
    """
    joined = {arm: np.concatenate([np.array(o[arm]) for o in outcomes]) for arm in ARMS if all(arm in o for o in outcomes)}
    arms = {}
    for arm, won in joined.items():
        low, high = wilson(int(won.sum()), len(won))
        arms[arm] = {"successes": int(won.sum()), "episodes": len(won), "low": low, "high": high,
                     "by_seed": [int(sum(o[arm])) for o in outcomes]}
    pairs = {}
    for arm, other in [(a, BASE) for a in ARMS[1:]] + [
            (REFINED, COMPUTE), (REFINED, CLONED), (FUTURE, COMPUTE), (FUTURE, CLONED), (FUTURE, REFINED), (FUTURE, ACTION),
            (MEAN, COMPUTE), (MEAN, CLONED), (MEAN, REFINED), (MEAN, FUTURE), (MEAN, ACTION)]:
        if arm in joined and other in joined:
            pairs[f"{arm} over {other}"] = paired_with_interval(joined[arm], joined[other])
    return {"arms": arms, "pairs": pairs}


def table(task: str, result: dict) -> str:
    """The table of one task as Markdown."""
    lines = [f"### {task}", "", "| arm | successes (each training seed) | 95 % (Wilson) | over base, points (95 %) | won, lost |",
             "|---|---|---|---|---|"]
    for name, arm in result["arms"].items():
        pair = result["pairs"].get(f"{name} over {BASE}")
        gain = " | "
        if pair:
            gain = f"{pair['gain_points']:+.1f} ({pair['ci_low']:+.1f} to {pair['ci_high']:+.1f}) | {pair['won']}, {pair['lost']}"
        lines.append(f"| {name} | {arm['successes']}/{arm['episodes']} ({', '.join(map(str, arm['by_seed']))}) | "
                     f"{100 * arm['low']:.1f} to {100 * arm['high']:.1f} % | {gain} |")
    return "\n".join(lines) + "\n"


def study_parser(text: str, written: str) -> argparse.ArgumentParser:
    """The flags that choose the studies of a job. ``text`` is the job's docstring, ``written`` names what it writes under --to."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--task", action="append", choices=TASKS, help="task to study; may be given several times [all]")
    parser.add_argument("--seed", action="append", type=int, help="training seed; may be given several times [0 and 1]")
    parser.add_argument("--root", type=Path, default=Path("runs/learning"), help="folder of the study's runs [runs/learning]")
    parser.add_argument("--to", type=Path, default=Path("docs/results"), help=f"folder for {written} [docs/results]")
    parser.add_argument("--set", action="append", default=[], type=_setting, metavar="NAME=VALUE",
                        help="a setting of every run of the study, such as rollouts=200; may be given several times")
    return parser


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name not in SETTINGS:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE with the name of a setting, such as rollouts=200")
    if name in OWN:
        raise argparse.ArgumentTypeError(f"{text!r}: {name} is the study's own, from --task, --seed and --root or an arm's")
    return name, value


def main(arguments: list[str] | None = None) -> int:
    return exit_code("learning", run_studies, study_parser(__doc__, "learning.json and learning.md").parse_args(arguments))


def exit_code(job: str, work: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Do ``work`` and return the exit code. An error or an interrupt is one line on stderr."""
    try:
        work(options)
    except CosmosRayError as error:
        sys.stderr.write(f"{job}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{job}: {INTERRUPTED}\n")
        return 130
    return 0


def run_studies(options: argparse.Namespace) -> None:
    """Run every study that the options name, one training seed after another, and write the results after each."""
    flags, file = dict(options.set), options.to / "learning.json"
    studies = {task: [Study(task, seed, options.root, flags) for seed in options.seed or [0, 1]] for task in options.task or TASKS}
    before = read_results(file)
    for task, of_task in studies.items():
        by_seed(before, task, "outcomes", settings_of(of_task[0].main), file)  # refused before anything runs
    options.to.mkdir(parents=True, exist_ok=True)
    for task, of_task in studies.items():
        for study in of_task:
            outcomes, settings = study.outcomes(), settings_of(study.main)
            texts = {arm: "".join(str(int(won)) for won in wins) for arm, wins in outcomes.items()}
            with changing(file) as results:
                results[task] = entry({**by_seed(results, task, "outcomes", settings, file), study.main.seed: texts}, settings)
                replace((page(results) + "\n").encode(), options.to / "learning.md")
        print(table(task, results[task]))


def entry(outcomes: dict[int, dict[str, str]], settings: dict[str, str]) -> dict:
    """What learning.json holds for a task: :func:`summarise`, the headline, and the outcomes, which other seeds are joined with.

    ``outcomes`` are by training seed and arm, a text with a 0 or 1 for each initial state.
    """
    outcomes = {seed: outcomes[seed] for seed in sorted(outcomes)}
    summary = summarise([{arm: list(map(int, wins)) for arm, wins in arms.items()} for arms in outcomes.values()])
    headline = summary["pairs"][f"{FUTURE} over {BASE}"]
    return {"arms": summary["arms"], **{k: headline[k] for k in ("gain_points", "ci_low", "ci_high")}, "pairs": summary["pairs"],
            "seeds": list(outcomes), "settings": settings, "outcomes": {str(seed): arms for seed, arms in outcomes.items()}}


def page(results: dict) -> str:
    """Every task's table as Markdown."""
    return "\n".join(table(task, result) for task, result in results.items())


if __name__ == "__main__":
    raise SystemExit(main())
