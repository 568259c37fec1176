"""Planning against the public code's way to plan: candidates, futures and values one after another, in batches of one row.

    python jobs/bench/planning.py --checkpoint runs/demo/checkpoints/refined --store runs/demo/store --json planning.json
    python jobs/bench/planning.py      # an untrained `tiny` network and random pictures

Both sides plan the same decisions with the same seeds; eight candidates, three futures of 1, 3 and 5 evaluations, and five values of 1
to 5 for each future, as in the paper. Choices and scores are compared before anything is timed.

``exact_vs_serial``: all candidates together, eager on both sides. ``exact_vs_serial_compiled``: the same, compiled on both sides.
``pruned_vs_serial``: compiled and with early rejection, against serial and eager.

A figure is the median over rounds with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

import numpy as np  # noqa: E402
import torch  # noqa: E402

from cosmos_ray.config import ModelConfig, PlannerConfig  # noqa: E402
from cosmos_ray.model.checkpoint import load_checkpoint  # noqa: E402
from cosmos_ray.model.latents import current_latents  # noqa: E402
from cosmos_ray.model.policy import CosmosPolicy, build  # noqa: E402
from cosmos_ray.model.prompts import Prompts  # noqa: E402
from cosmos_ray.model.spec import make_spec  # noqa: E402
from cosmos_ray.model.speed.accelerate import accelerate  # noqa: E402
from cosmos_ray.planning.assessment import recorded_chains  # noqa: E402
from cosmos_ray.planning.best_of_n import Decision, best_of_n  # noqa: E402
from cosmos_ray.replay.store import ReplayStore  # noqa: E402
from jobs.bench import serial_planner  # noqa: E402
from jobs.bench.replay_timing import Report, progress  # noqa: E402

PAPER = PlannerConfig(candidates=8, futures=3, future_steps=5, value_samples=5, value_steps=5, aggregate="majority_mean")
ACT_STEPS = 10  #: network evaluations of a proposed chunk, as in the paper's planning

Observed = tuple[torch.Tensor, Prompts, int]  #: latents (1, C, T, h, w), one prompt, seed


def untrained() -> tuple[CosmosPolicy, np.ndarray, np.ndarray, list[str]]:
    """(policy, images, proprioception, instructions) that need no run."""
    policy = build(make_spec(ModelConfig(), ("wrist", "front"), action_dim=4, proprio_dim=9), seed=1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 2, 64, 64, 3), dtype=np.uint8)
    policy.tokenizer.fit(torch.from_numpy(images[:, 0]))
    policy.set_statistics(np.full(4, -1.0), np.full(4, 1.0), np.full(9, -1.0), np.full(9, 1.0))
    torch.nn.init.normal_(policy.net.final_layer.linear.weight, std=0.05, generator=torch.Generator().manual_seed(5))
    return policy, images, rng.uniform(-1, 1, (64, 9)).astype(np.float32), ["lift the cube"] * 64


def trained(options: argparse.Namespace) -> tuple[CosmosPolicy, np.ndarray, np.ndarray, list[str]]:
    """The same of a checkpoint, and of states in a store."""
    policy, _ = load_checkpoint(options.checkpoint)
    store = ReplayStore(options.store)
    chains = recorded_chains([store.view(name) for name in store.keys()], policy.spec.cameras, policy.spec.chunk, 1, options.decisions, 0)
    if chains is None:
        raise SystemExit(f"no episode of {options.store} has the frames that {options.checkpoint} reads")
    return policy, chains.images[:, 0], chains.proprio[:, 0], chains.instructions


def batched(policy: CosmosPolicy, seen: Observed, steps: int, config: PlannerConfig) -> Decision:
    known, text, seed = seen
    return best_of_n(policy, known, text, torch.tensor([seed]), steps, config)


def compare(policy: CosmosPolicy, states: list[Observed], pruned: PlannerConfig) -> None:
    """Raise where the sides would not choose the same; say how the values lie."""
    worst, zeros = 0.0, 0.0
    for seen in states:
        chosen, actions, scores = serial_planner.plan(policy, *seen, ACT_STEPS, PAPER)
        exact, rejecting = (batched(policy, seen, ACT_STEPS, config) for config in (PAPER, pruned))
        worst = max(worst, float((exact.scores[0] - torch.tensor(scores)).abs().max()))
        if not chosen == exact.chosen.item() == rejecting.chosen.item() or (exact.actions[0] - actions).abs().max() > 1e-4:
            raise SystemExit(f"the sides choose differently: {chosen}, {exact.chosen.item()}, {rejecting.chosen.item()}; scores {scores}")
        zeros += float((exact.scores == 0).float().mean()) / len(states)
    progress(f"same choices; scores differ by at most {worst:.1e}; {100 * zeros:.0f} % of the candidates score 0")


def seconds(plan: Callable[[Observed], object], states: list[Observed]) -> float:
    """Per decision."""
    began = time.perf_counter()
    for seen in states:
        plan(seen)
    return (time.perf_counter() - began) / len(states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a checkpoint folder, as runs/demo/checkpoints/refined; the default is an untrained network")
    parser.add_argument("--store", help="the store whose states are planned from, as runs/demo/store")
    parser.add_argument("--decisions", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    options = parser.parse_args()
    if bool(options.checkpoint) != bool(options.store):
        parser.error("--checkpoint and --store go together")
    torch.set_num_threads(options.threads)
    policy, images, proprio, instructions = trained(options) if options.checkpoint else untrained()
    policy.eval().serve()
    states = [(current_latents(policy, images[i:i + 1], proprio[i:i + 1]), policy.embed(instructions[i:i + 1]), i)
              for i in range(min(options.decisions, len(images)))]
    pruned, report = replace(PAPER, early_rejection=True), Report(options.json)
    compare(policy, states, pruned)
    calls: dict[str, Callable[[Observed], object]] = {
        "serial": lambda seen: serial_planner.plan(policy, *seen, ACT_STEPS, PAPER),
        "exact": lambda seen: batched(policy, seen, ACT_STEPS, PAPER),
        "rejecting": lambda seen: batched(policy, seen, ACT_STEPS, pruned)}
    times: dict[str, list[float]] = {}
    for how in ("none", "compile"):
        accelerate(policy, how)
        for call in calls.values():
            seconds(call, states)  # compile every size that occurs
        for number in range(options.rounds):
            for name, call in calls.items():
                times.setdefault(f"{name} {how}", []).append(seconds(call, states))
            progress(f"round {number + 1} of {options.rounds}, {how}: "
                     + ", ".join(f"{name} {1e3 * times[f'{name} {how}'][-1]:.0f} ms" for name in calls))
    report.add("exact_vs_serial", times["serial none"], times["exact none"], "eager on both sides")
    report.add("exact_vs_serial_compiled", times["serial compile"], times["exact compile"], "compiled on both sides")
    report.add("pruned_vs_serial", times["serial none"], times["rejecting compile"], "early rejection and compilation")


if __name__ == "__main__":
    main()
