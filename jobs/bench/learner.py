"""What captured graphs and a loader's thread bring to the learner's whole step, on a run's own store, in one process.

    python jobs/bench/learner.py --name door --json learner.json

Every variant is a learner of its own, from the run's base policy: batch, loss, backward pass and DeepSpeed's optimiser. They are timed
in turn, a burst of steps each, round after round, and compared with the plain one of the same round; a ratio is the median over rounds
with the range of the middle half. Writes nothing into the run. Needs a GPU: there is nothing to capture without one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

import torch  # noqa: E402

from cosmos_ray.config import RunConfig, check  # noqa: E402
from cosmos_ray.config.stored import stored_config  # noqa: E402
from cosmos_ray.errors import CosmosRayError  # noqa: E402
from cosmos_ray.learner.core import LearnerCore  # noqa: E402
from cosmos_ray.learner.engine import free_port, rendezvous  # noqa: E402
from cosmos_ray.learner.mixture import BatchSource, Mixture  # noqa: E402
from cosmos_ray.model.checkpoint import load_checkpoint  # noqa: E402
from cosmos_ray.replay.sampling.sampler import WindowSampler  # noqa: E402
from cosmos_ray.replay.store import ReplayStore  # noqa: E402
from jobs.bench.model import ratio  # noqa: E402

PLAIN = {"accelerate": "none", "loader_threads": 0, "zero_stage": 1}
VARIANTS = {"plain": {}, "graphs": {"accelerate": "graphs"}, "ZeRO 0": {"zero_stage": 0},
            "graphs and loader": {"accelerate": "graphs", "loader_threads": 1},
            "loader and ZeRO 0": {"loader_threads": 1, "zero_stage": 0},
            "graphs, loader, ZeRO 0": {"accelerate": "graphs", "loader_threads": 1, "zero_stage": 0}}


def learner(config: RunConfig, changes: dict) -> LearnerCore:
    """A learner that goes on with the run's base policy as `pretrain` does."""
    folder = Path(config.root) / config.name
    settings = dataclasses.replace(config.learner, **(PLAIN | changes))
    check(dataclasses.replace(config, learner=settings))
    store = ReplayStore(config.replay.store or folder / "replay", create=False)
    sampler = WindowSampler(store, chunk=config.model.chunk, gamma=config.replay.gamma, seed=0)
    source = BatchSource(sampler, Mixture.base(settings, config.replay), settings.rows)
    policy, _ = load_checkpoint(folder / "checkpoints" / "base", torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    return LearnerCore(settings, policy, source, peak_lr=1e-4, total_steps=10**9, seed=0, device="cuda")


def compare(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a step and ratio to the plain learner of every variant, printed; the median ratios."""
    config = stored_config(RunConfig(name=options.name, root=str(options.root)))
    if config is None or not torch.cuda.is_available():
        raise CosmosRayError(f"there is no run {options.name} in {options.root}: give --name and --root of one with a base policy"
                             if config is None else "there is no GPU to capture graphs on")
    os.environ.update(rendezvous(0, 1, "127.0.0.1", free_port()))
    torch.set_num_threads(1)
    learners = {name: learner(config, changes) for name, changes in VARIANTS.items()}
    for one in learners.values():
        _burst(one, options.steps)
    times: dict[str, list[float]] = {name: [] for name in learners}
    for number in range(options.rounds):
        for name, one in learners.items():
            times[name].append(_burst(one, options.steps))
        sys.stderr.write(f"\rround {number + 1}/{options.rounds}")
    sys.stderr.write("\n")
    results = {}
    for name, of_variant in times.items():
        median, low, high = ratio(times["plain"], of_variant)
        print(f"{name:24} {1e3 * statistics.median(of_variant):7.1f} ms a step   {median:5.2f}x ({low:.2f} to {high:.2f})", flush=True)
        results[f"learner_{name.replace(',', '').replace(' ', '_')}"] = median
    return results


def _burst(learner: LearnerCore, steps: int) -> float:
    """Seconds a step of so many; they end with the loss read back from the GPU. Afterwards nothing goes on beside the next learner."""
    began = time.perf_counter()
    learner.train(steps)
    seconds = (time.perf_counter() - began) / steps
    if learner.loader:
        learner.loader.restart()
    return seconds


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--name", required=True, help="a run that has a base policy")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of runs [runs]")
    parser.add_argument("--steps", type=int, default=20, help="steps of one timing [20]")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each variant [9]")
    parser.add_argument("--json", metavar="FILE", help="write the median ratios")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.rounds < 2:
        parser.error(f"--steps {options.steps} must be at least 1 and --rounds {options.rounds} at least 2")
    try:
        results = compare(options)
    except CosmosRayError as error:
        sys.stderr.write(f"learner: {error}\n")
        return 1
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
