"""The inference pool under load, against the same policy called bare.

    python jobs/bench/pool.py --json pool.json      # about three minutes; nothing else should run

- ``pool_over_bare``: rows a second of one inference actor with 16 closed-loop clients, each of which asks again once it is answered, over
  those of the same policy called in this process in batches of 16.
- ``p99_in_bare_batches``: the 99th percentile of the clients' waits, in bare batches of 16.
- ``pool_during_push``: rows a second while weights are pushed twice a second, over those without pushes.
- ``two_actors_over_one``: rows a second of two actors over those of one, with 32 clients.

All sides take turns, round after round. The policy is an untrained `tiny` one on one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

import numpy as np  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402

from cosmos_ray.config import InferenceConfig, RunConfig  # noqa: E402
from cosmos_ray.connection import start_private  # noqa: E402
from cosmos_ray.inference.client import PoolClient  # noqa: E402
from cosmos_ray.inference.core import load_core  # noqa: E402
from cosmos_ray.inference.messages import ActRequest  # noqa: E402
from cosmos_ray.inference.pool import InferencePool  # noqa: E402
from cosmos_ray.model.checkpoint import save_policy  # noqa: E402
from cosmos_ray.model.policy import build  # noqa: E402
from cosmos_ray.model.spec import make_spec  # noqa: E402
from cosmos_ray.weights import pack  # noqa: E402
from jobs.bench.replay_timing import Report, progress  # noqa: E402

CLIENTS = 16
PUSH_EVERY_S = 0.5


def request(rows: int, seed: int, steps: int) -> ActRequest:
    rng = np.random.default_rng(seed)
    return ActRequest(rng.integers(0, 256, (rows, 2, 64, 64, 3), dtype=np.uint8), rng.normal(size=(rows, 9)).astype(np.float32),
                      ("lift the cube",) * rows, np.arange(rows) + seed, steps=steps)


def bare(core: Any, seconds: float, steps: int) -> tuple[float, float]:
    """Rows a second and seconds per batch of 16 requests."""
    requests = [request(1, i, steps) for i in range(CLIENTS)]
    began, batches = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        core.answer(requests)
        batches += 1
    return batches * CLIENTS / passed, passed / batches


def closed_loop(pool: InferencePool, clients: int, seconds: float, steps: int, pushes: Any = None) -> tuple[float, list[float], float]:
    """Rows a second, the clients' waits in seconds, and the mean batch. ``pushes`` is called every half second."""
    client = PoolClient(pool.actors, 60.0)
    before = pool.status()
    asked = {client.submit(request(1, i, steps)).reference: (i, time.perf_counter()) for i in range(clients)}
    requests = [request(1, i, steps) for i in range(clients)]
    waits: list[float] = []
    began = last = time.perf_counter()
    while (now := time.perf_counter()) - began < seconds:
        if pushes is not None and now - last >= PUSH_EVERY_S:
            pushes()
            last = now
        pool.poll()
        for reference in ray.wait(list(asked), num_returns=1, timeout=1.0)[0]:
            ray.get(reference)
            number, since = asked.pop(reference)
            waits.append(time.perf_counter() - since)
            asked[client.submit(requests[number]).reference] = number, time.perf_counter()
    passed = time.perf_counter() - began
    ray.get(list(asked))
    after = pool.status()
    batches = sum(status["batches"] for status in after) - sum(status["batches"] for status in before)
    rows = sum(status["rows"] for status in after) - sum(status["rows"] for status in before)
    return len(waits) / passed, waits, rows / max(batches, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each side in a round")
    parser.add_argument("--json", metavar="FILE", help="write the median ratios")
    options = parser.parse_args()
    report, inference = Report(options.json), InferenceConfig()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-pool-") as name:
        checkpoint, config = Path(name) / "tiny", RunConfig()
        policy = build(make_spec(config.model, config.sim.cameras, action_dim=4, proprio_dim=9), seed=1)
        policy.tokenizer.fit(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)))
        save_policy(policy, checkpoint, version=1)
        start_private(num_cpus=os.cpu_count() or 1)
        core, steps = load_core(checkpoint, inference, "cpu"), inference.steps
        pools = [InferencePool(checkpoint, inference, [{"num_cpus": 0}] * actors).start() for actors in (1, 2)]
        version = 1

        def push() -> None:
            nonlocal version
            version += 1
            pools[0].push(pack(policy.net.named_parameters(), version, put=ray.put))

        sides: dict[str, list[float]] = {key: [] for key in ("bare", "one", "p99", "batch", "pushed", "alone", "two", "single")}
        for pool in pools:
            closed_loop(pool, CLIENTS, 2.0, steps)  # warm
        bare(core, 1.0, steps)
        for number in range(options.rounds):
            speed, batch_s = bare(core, options.seconds, steps)
            one, waits, filled = closed_loop(pools[0], CLIENTS, options.seconds, steps)
            pushed = closed_loop(pools[0], CLIENTS, options.seconds, steps, push)[0]
            two = closed_loop(pools[1], 2 * CLIENTS, options.seconds, steps)[0]
            single = closed_loop(pools[0], 2 * CLIENTS, options.seconds, steps)[0]
            p50, p99 = (statistics.quantiles(waits, n=100)[i] for i in (49, 98))
            for key, value in zip(sides, (speed, one, p99, batch_s, pushed, one, two, single), strict=True):
                sides[key].append(value)
            progress(f"round {number + 1}/{options.rounds}: bare {speed:.0f} rows/s, {1000 * batch_s:.0f} ms a batch of 16; pool {one:.0f} "
                     f"in batches of {filled:.1f}, p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms; with pushes {pushed:.0f}; 32 clients: "
                     f"one actor {single:.0f}, two {two:.0f}")
        report.add("pool_over_bare", sides["one"], sides["bare"])
        report.add("p99_in_bare_batches", sides["p99"], sides["batch"])
        report.add("pool_during_push", sides["pushed"], sides["alone"])
        report.add("two_actors_over_one", sides["two"], sides["single"])
        for pool in pools:
            pool.close()
        ray.shutdown()


if __name__ == "__main__":
    main()
