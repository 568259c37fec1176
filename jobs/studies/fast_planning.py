"""What do fewer evaluations cost in success? Plans of the paper's size, small plans and no plans, on the same held-out initial states.

    python jobs/studies/fast_planning.py --root runs --name lift --name door --episodes 500
    python jobs/studies/fast_planning.py --root runs --name lift --states-seed 7 --episodes 100 --arm fast --arm "one step"   # to choose

Each run needs a refined policy. Every arm keeps the run's spread and rank and changes the evaluations of a plan. The exact plan is the
paper's: 10 evaluations for each of 8 candidates, 3 futures of up to 5 and 5 values of up to 5 of each, where a candidate that cannot win
any more is dropped, which changes no choice. How long the plans take is `jobs/bench/planning.py`'s matter. The job continues where it
stopped, writes fast_planning.json under --to, and prints every arm against the exact plan, run by run and over all runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

import numpy as np  # noqa: E402

from cosmos_ray.config import RunConfig  # noqa: E402
from cosmos_ray.config.settings import changed  # noqa: E402
from cosmos_ray.config.stored import stored_config  # noqa: E402
from cosmos_ray.errors import ConfigError  # noqa: E402
from cosmos_ray.evidence import paired_with_interval  # noqa: E402
from cosmos_ray.run import open_run  # noqa: E402
from cosmos_ray.stages.evaluate import evaluate  # noqa: E402
from jobs.studies.learning import exit_code  # noqa: E402
from jobs.studies.results import changing  # noqa: E402

EXACT, NONE = "exact", "no planning"
PAPER = {"inference.steps": 10, "planner.futures": 3, "planner.future_steps": 5, "planner.value_samples": 5, "planner.value_steps": 5,
         "planner.aggregate": "majority_mean", "planner.early_rejection": True}
SMALL = {"planner.futures": 1, "planner.future_steps": 1, "planner.value_samples": 1, "planner.value_steps": 1}
#: Settings of each arm; all have eight candidates but the last
ARMS = {EXACT: PAPER, "usual": {**SMALL, "inference.steps": 5}, "three steps": {**SMALL, "inference.steps": 3},
        "fast": {**SMALL, "inference.steps": 2}, "one step": {**SMALL, "inference.steps": 1}, NONE: {"inference.steps": 5}}


def outcomes(main: RunConfig, names: list[str], options: argparse.Namespace) -> dict[str, list[int]]:
    """The outcome (0 or 1) of every arm on every state."""
    with open_run(main) as run:
        found = {}
        for name in names:
            config = changed(run.config, {"planner.candidates": 8, "planner.depth": 1, "inference.accelerate": options.accelerate,
                                          "eval_episodes": options.episodes, **ARMS[name]})
            if options.states_seed is not None:
                config = dataclasses.replace(config, seed=options.states_seed)
            arm = "refined" if name == NONE else "refined + planning"
            found[name] = evaluate(dataclasses.replace(run, config=config), [arm])["arms"][arm]["outcomes"]
        return found


def table(runs: dict[str, dict[str, list[int]]], names: list[str]) -> list[str]:
    """Every arm against the exact plan, with 95 % bootstrap intervals over initial states."""
    both = {name: sum((arms[name] for arms in runs.values()), []) for name in names}
    lines = []
    for title, arms in {**runs, **({"all": both} if len(runs) > 1 else {})}.items():
        for name in names:
            mine, against = np.array(arms[name]), arms.get(EXACT)
            line = f"{title:12} {name:12} {mine.sum():5}/{len(mine)}"
            if against is not None and name != EXACT:
                pair = paired_with_interval(mine, np.array(against))
                line += (f"  {pair['gain_points']:+5.1f} ({pair['ci_low']:+.1f} to {pair['ci_high']:+.1f}) points over the exact plan, "
                         f"won {pair['won']}, lost {pair['lost']}")
            lines.append(line)
    return lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of the runs [runs]")
    parser.add_argument("--name", action="append", required=True, help="a run with a refined policy; may be given several times")
    parser.add_argument("--arm", action="append", choices=ARMS, help="may be given several times [all]")
    parser.add_argument("--episodes", type=int, default=500, help="held-out initial states of each run [500]")
    parser.add_argument("--states-seed", type=int, help="seed of the initial states, where others than the run's own are wanted")
    parser.add_argument("--accelerate", choices=("none", "compile"), default="compile", help="[compile]")
    parser.add_argument("--to", type=Path, default=Path("docs/results"), help="folder for fast_planning.json [docs/results]")
    return parser.parse_args(arguments)


def run_arms(options: argparse.Namespace) -> None:
    names = options.arm or list(ARMS)
    configs = {}
    for name in options.name:
        like = RunConfig(name=name, root=str(options.root))
        if (stored := stored_config(like)) is None:
            raise ConfigError(f"there is no run {name!r} in {options.root}: train it first")
        configs[name] = stored
    options.to.mkdir(parents=True, exist_ok=True)
    runs: dict[str, dict[str, list[int]]] = {}
    for name, config in configs.items():
        runs[name] = outcomes(config, names, options)
        with changing(options.to / "fast_planning.json") as results:
            key = name if options.states_seed is None else f"{name}, states of seed {options.states_seed}"
            results[key] = {**results.get(key, {}), **runs[name]}
    print("\n".join(table(runs, names)))


def main(arguments: list[str] | None = None) -> int:
    return exit_code("fast_planning", run_arms, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
