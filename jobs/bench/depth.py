"""How long plans of one, two and three chunks take.

    python jobs/bench/depth.py --checkpoint runs/demo/checkpoints/refined --store runs/demo/store --json depth.json
    python jobs/bench/depth.py      # an untrained `tiny` network and random pictures

Eight candidates and one future and value of each, as the `tiny` preset plans, with all plans looked further into and with a beam of two.
Every plan is first compared with a serial planner, which makes one chunk, future and value at a time. ``depth_2_over_1`` and so on are
ratios of the time of a decision; the median over rounds with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from dataclasses import replace

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

import torch  # noqa: E402

from cosmos_ray.config import ModelConfig, PlannerConfig  # noqa: E402
from cosmos_ray.model.checkpoint import load_checkpoint  # noqa: E402
from cosmos_ray.model.policy import CosmosPolicy  # noqa: E402
from cosmos_ray.model.spec import make_spec  # noqa: E402
from cosmos_ray.model.speed.accelerate import accelerate  # noqa: E402
from jobs.bench import serial_planner  # noqa: E402
from jobs.bench.planning import Observed, add_source, batched, observed, parse, random_states, recorded_states, seconds, untrained  # noqa: E402
from jobs.bench.replay_timing import Report, progress  # noqa: E402

ONE = PlannerConfig(candidates=8)
PLANS = {"1": ONE, "2": replace(ONE, depth=2), "2_branch_2": replace(ONE, depth=2, branch=2), "2_beam_2": replace(ONE, depth=2, beam=2),
         "3": replace(ONE, depth=3), "3_branch_2_beam_2": replace(ONE, depth=3, branch=2, beam=2)}


def compare(policy: CosmosPolicy, states: list[Observed], steps: int) -> None:
    """Raise where a plan is not that of the serial planner."""
    for name, config in PLANS.items():
        for seen in states:
            chosen, actions, scores = serial_planner.plan(policy, *seen, steps, config)
            decision = batched(policy, seen, steps, config)
            if decision.chosen.item() != chosen or (decision.actions[0] - actions).abs().max() > 1e-4:
                raise SystemExit(f"depth {name}: the serial planner chooses {chosen}, the batched one {decision.chosen.item()}; {scores}")
    progress(f"same choices as the serial planner, at {len(PLANS)} depths")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser)
    parser.add_argument("--decisions", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="network evaluations of a proposed chunk")
    parser.add_argument("--accelerate", choices=("none", "compile"), default="none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    options = parse(parser)
    torch.set_num_threads(options.threads)
    spec = make_spec(ModelConfig(), ("wrist", "front"), action_dim=4, proprio_dim=9)
    policy = load_checkpoint(options.checkpoint)[0] if options.checkpoint else untrained(spec)
    images, proprio, instructions = recorded_states(options, policy.spec) if options.store else random_states(spec, options.decisions)
    policy.eval().serve()
    states = observed(policy, images, proprio, instructions)
    compare(policy, states, options.steps)
    accelerate(policy, options.accelerate)
    times: dict[str, list[float]] = {name: [] for name in PLANS}
    for number in range(-1, options.rounds):  # the first round warms up
        for name, config in PLANS.items():
            taken = seconds(lambda seen, config=config: batched(policy, seen, options.steps, config), states)
            times[name] += [taken] if number >= 0 else []
    report = Report(options.json)
    for name in PLANS:
        report.add(f"depth_{name}_over_1", times[name], times["1"], f"{1e3 * statistics.median(times[name]):.0f} ms a decision")


if __name__ == "__main__":
    main()
