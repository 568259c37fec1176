"""Do answers come by the deadline? A real inference actor plans under ``planner.deadline_ms`` while other processes compete for the cores.

    python jobs/bench/autopilot.py --checkpoint runs/demo/checkpoints/refined --store runs/demo/store --json autopilot.json
    python jobs/bench/autopilot.py --cores 1     # an untrained `tiny` network; actor, client and competitor share one core

One client asks again and again. An answer is in time where the client has it within the deadline of sending its request, so that Ray's way
there and back counts too. The competing process computes without a pause; it starts after the speed of the network was measured, so the
autopilot has to find out by itself. The table has the share of answers in time, the candidates that were compared, the gear that was taken
most, and how late the latest answer was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

import numpy as np  # noqa: E402
import ray  # noqa: E402

from cosmos_ray.config import InferenceConfig, ModelConfig, PlannerConfig  # noqa: E402
from cosmos_ray.inference.actor import InferenceActor  # noqa: E402
from cosmos_ray.inference.client import PoolClient  # noqa: E402
from cosmos_ray.inference.messages import ActingPolicy, ActRequest  # noqa: E402
from cosmos_ray.model.checkpoint import read_description, save_policy  # noqa: E402
from cosmos_ray.model.spec import make_spec  # noqa: E402
from jobs.bench.planning import add_source, parse, random_states, recorded_states, untrained  # noqa: E402
from jobs.bench.replay_timing import progress  # noqa: E402

WANTED = 0.95  #: share of answers in time
WARM = 3  #: requests that are not counted: the first one after a start pays for what is made once


def ask(client: PoolClient, states: tuple[np.ndarray, np.ndarray, list[str]], planner: PlannerConfig, steps: int,
        count: int) -> list[tuple[float, dict[str, Any]]]:
    """(seconds that the client waited, what the autopilot says) of ``count`` requests, one after another."""
    images, proprio, instructions = states
    found = []
    for number in range(-WARM, count):
        i = number % len(images)
        request = ActRequest(images[i:i + 1], proprio[i:i + 1], (instructions[i],), np.array([max(number, 0)]), steps,
                             ActingPolicy(planner=planner))
        began = time.perf_counter()
        reply = client.result(client.submit(request))
        found += [(time.perf_counter() - began, reply.autopilot)] if number >= 0 else []
    return found


def summary(found: list[tuple[float, dict[str, Any]]], deadline_ms: float) -> dict[str, Any]:
    late = [1000 * seconds - deadline_ms for seconds, _ in found]
    told = [autopilot for _, autopilot in found]
    return {"in_time": sum(ms <= 0 for ms in late) / len(late), "in_time_at_the_actor": sum(a["in_time"] for a in told) / len(told),
            "way_ms": statistics.median(1000 * seconds - a["waited_ms"] - a["took_ms"] for seconds, a in found),
             "candidates": statistics.mean(a["candidates"] for a in told),
            "gear": Counter(a["gear"] for a in told).most_common(1)[0][0], "median_ms": statistics.median(late) + deadline_ms,
            "latest_ms": max(late), "answers": len(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser)
    parser.add_argument("--deadlines", default="50,100,300,1000", help="in ms")
    parser.add_argument("--answers", type=int, default=100, help="counted answers at each deadline")
    parser.add_argument("--candidates", type=int, default=64, help="the most that may be proposed")
    parser.add_argument("--steps", type=int, default=5, help="the most network evaluations of a chunk")
    parser.add_argument("--competing", type=int, default=1, help="processes that compete")
    parser.add_argument("--cores", type=int, default=0, help="cores that all processes share, 0 = all")
    parser.add_argument("--decisions", type=int, default=8, help="states to plan from, in turn")
    parser.add_argument("--json")
    options = parse(parser)
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:options.cores])
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or str(Path(folder) / "untrained")
        if not options.checkpoint:
            save_policy(untrained(make_spec(ModelConfig(), ("wrist", "front"), action_dim=4, proprio_dim=9)), checkpoint, 0)
        spec = read_description(checkpoint)[0]
        states = recorded_states(options, spec) if options.store else random_states(spec, options.decisions)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="WARNING",
                 runtime_env={"env_vars": {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}})
        rivals: list[subprocess.Popen] = []
        try:
            actor = InferenceActor.options(num_cpus=1).remote(checkpoint, InferenceConfig())
            client, began = PoolClient([actor], timeout_s=120), time.perf_counter()
            ray.get(actor.load.remote(checkpoint, "", PlannerConfig(deadline_ms=1.0)))
            progress(f"loaded, and its speed measured, in {time.perf_counter() - began:.0f} s")
            rivals += [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.competing)]
            for deadline_ms in map(float, options.deadlines.split(",")):
                planner = PlannerConfig(candidates=options.candidates, deadline_ms=deadline_ms)
                row = results[f"{deadline_ms:g}"] = summary(ask(client, states, planner, options.steps, options.answers), deadline_ms)
                print(f"{deadline_ms:6.0f} ms: {100 * row['in_time']:5.1f} % in time (at least {100 * WANTED:.0f}; "
                      f"{100 * row['in_time_at_the_actor']:.0f} % at the actor, the way takes {row['way_ms']:.1f} ms), "
                      f"{row['candidates']:5.1f} candidates, mostly {row['gear']!r}, median {row['median_ms']:.0f} ms, "
                      f"the latest {row['latest_ms']:+.0f} ms", flush=True)
        finally:
            for rival in rivals:
                rival.kill()
                rival.wait()
            ray.shutdown()
    if options.json:
        Path(options.json).write_text(json.dumps({"competing": options.competing, "cores": options.cores, "deadlines": results}, indent=1))


if __name__ == "__main__":
    main()
