"""Planning against the public code's way to plan: candidates, futures and values one after another, in batches of one row.

    python jobs/bench/planning.py --checkpoint runs/demo/checkpoints/refined --store runs/demo/store --json planning.json
    python jobs/bench/planning.py      # an untrained `tiny` network and random pictures

Both sides plan the same decisions with the same seeds; eight candidates, three futures of 1, 3 and 5 evaluations, and five values of 1
to 5 for each future, as in the paper. Choices and scores are compared before anything is timed.

``exact_vs_serial``: all candidates together, eager on both sides. ``exact_vs_serial_compiled``: the same, compiled on both sides.
``pruned_vs_serial``: compiled and with early rejection, against serial and eager. ``one_way_vs_serial``: a network of
``model.attention one-way``, which reads a state once, compiled, against a serial and eager network of the same size with full attention.
``fast_vs_serial``: another plan, compiled: two evaluations for a candidate, one for its future and one for the value of that;
``one_way_fast_vs_serial`` is the same with one-way attention. `jobs/studies/fast_planning.toml` is the study of what that costs in success.
Time does not depend on the weights, except with early rejection: what a checkpoint does not give is untrained.

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
from cosmos_ray.model.spec import PolicySpec, make_spec  # noqa: E402
from cosmos_ray.model.speed.accelerate import accelerate  # noqa: E402
from cosmos_ray.planning.assessment import recorded_chains  # noqa: E402
from cosmos_ray.planning.best_of_n import Decision, best_of_n  # noqa: E402
from cosmos_ray.replay.store import ReplayStore  # noqa: E402
from jobs.bench import serial_planner  # noqa: E402
from jobs.bench.replay_timing import Report, progress  # noqa: E402

PAPER = PlannerConfig(candidates=8, futures=3, future_steps=5, value_samples=5, value_steps=5, aggregate="majority_mean")
FAST, FAST_STEPS = PlannerConfig(candidates=8), 2
ACT_STEPS = 10  #: network evaluations of a proposed chunk, as in the paper's planning

Observed = tuple[torch.Tensor, Prompts, int]  #: latents (1, C, T, h, w), one prompt, seed


def untrained(spec: PolicySpec) -> CosmosPolicy:
    """A policy of these dimensions whose output is not zero."""
    policy = build(spec, seed=1)
    policy.tokenizer.fit(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)))
    torch.nn.init.normal_(policy.net.final_layer.linear.weight, std=0.05, generator=torch.Generator().manual_seed(5))
    return policy


def random_states(spec: PolicySpec, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(images, proprioception, instructions) that need no run."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, len(spec.cameras), spec.image_size, spec.image_size, 3), dtype=np.uint8)
    return images, rng.uniform(-1, 1, (count, spec.proprio_dim)).astype(np.float32), ["lift the cube"] * count


def recorded_states(options: argparse.Namespace, spec: PolicySpec) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The same from the episodes of a store."""
    store = ReplayStore(options.store, create=False)
    store.refresh()
    chains = recorded_chains([store.view(name) for name in store.keys()], spec.cameras, spec.chunk, 1, options.decisions, 0)
    if chains is None:
        raise SystemExit(f"no episode of {options.store} has the frames that {options.checkpoint} reads")
    return chains.images[:, 0], chains.proprio[:, 0], chains.instructions


def add_source(parser: argparse.ArgumentParser) -> None:
    """The flags that say whose plans are timed."""
    parser.add_argument("--checkpoint", help="a checkpoint folder, as runs/demo/checkpoints/refined; the default is an untrained network")
    parser.add_argument("--store", help="the store whose states are planned from, as runs/demo/store")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags, where ``--checkpoint`` and ``--store`` go together."""
    options = parser.parse_args()
    if bool(options.checkpoint) != bool(options.store):
        parser.error("--checkpoint and --store go together")
    return options


def observed(policy: CosmosPolicy, images: np.ndarray, proprio: np.ndarray, instructions: list[str]) -> list[Observed]:
    """One decision for every state, with its number as seed."""
    return [(current_latents(policy, images[i:i + 1], proprio[i:i + 1]), policy.embed(instructions[i:i + 1]), i)
            for i in range(len(images))]


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


def time_all(policy: CosmosPolicy, states: list[Observed], pruned: PlannerConfig, kind: str, rounds: int,
             times: dict[str, list[float]]) -> None:
    """Seconds per decision of every way to plan, eager and compiled, in turn; into ``times``."""
    calls: dict[str, Callable[[Observed], object]] = {
        "serial": lambda seen: serial_planner.plan(policy, *seen, ACT_STEPS, PAPER),
        "exact": lambda seen: batched(policy, seen, ACT_STEPS, PAPER),
        "rejecting": lambda seen: batched(policy, seen, ACT_STEPS, pruned),
        "fast": lambda seen: batched(policy, seen, FAST_STEPS, FAST)}
    for how in ("none", "compile"):
        accelerate(policy, how)
        for call in calls.values():
            seconds(call, states)  # compile every size that occurs
        for number in range(rounds):
            for name, call in calls.items():
                times.setdefault(f"{kind}{name} {how}", []).append(seconds(call, states))
            progress(f"{kind}round {number + 1} of {rounds}, accelerate {how}: "
                     + ", ".join(f"{name} {1e3 * times[f'{kind}{name} {how}'][-1]:.0f} ms" for name in calls))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser)
    parser.add_argument("--decisions", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    options = parse(parser)
    torch.set_num_threads(options.threads)
    given = load_checkpoint(options.checkpoint)[0] if options.checkpoint else None
    spec = given.spec if given else make_spec(ModelConfig(), ("wrist", "front"), action_dim=4, proprio_dim=9)
    images, proprio, instructions = recorded_states(options, spec) if given else random_states(spec, options.decisions)
    pruned, report = replace(PAPER, early_rejection=True), Report(options.json)
    times: dict[str, list[float]] = {}
    for one_way in (False, True):
        policy = given if given and spec.transformer.one_way == one_way else untrained(
            replace(spec, transformer=replace(spec.transformer, one_way=one_way)))
        policy.eval().serve()
        states = observed(policy, images, proprio, instructions)
        compare(policy, states, pruned)
        time_all(policy, states, pruned, "one-way " if one_way else "", options.rounds, times)
    report.add("exact_vs_serial", times["serial none"], times["exact none"], "eager on both sides")
    report.add("exact_vs_serial_compiled", times["serial compile"], times["exact compile"], "compiled on both sides")
    report.add("pruned_vs_serial", times["serial none"], times["rejecting compile"], "early rejection and compilation")
    report.add("one_way_vs_serial", times["serial none"], times["one-way exact compile"], "one-way attention and compilation")
    report.add("fast_vs_serial", times["serial none"], times["fast compile"], "few evaluations and compilation: other choices")
    report.add("one_way_fast_vs_serial", times["serial none"], times["one-way fast compile"], "and one-way attention")
    report.add("one_way_pruned_vs_serial", times["serial none"], times["one-way rejecting compile"], "and early rejection")


if __name__ == "__main__":
    main()
