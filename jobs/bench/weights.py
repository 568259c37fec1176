"""What a push of weights costs: against one copy of the same bytes, and in requests that the pool does not answer meanwhile.

    python jobs/bench/weights.py --json weights.json     # some minutes on two cores; --megabytes 2000 needs 12 GB of memory, 1 GB of disk

``push_over_memcpy_2gb``: seconds from the learner's publish until two inference actors on its machine act with the new weights, over the
seconds of one copy, in one thread, of the same parameters. Both are timed in turn, in the same process group, round after round. The
actors and the store are warm: they have taken pushes before. ``inference_during_push``: rows per second that a pool of the `tiny` preset
answers with one push a second, over those without; windows of both take turns. A figure is the median over rounds, with the smallest and
the largest; where the fastest push over the fastest copy is far from it, others used the machine, and it cannot be
trusted. The learner is a process with the network alone, without an optimiser; it puts the weights as the learner does.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

import numpy as np  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
from ray.actor import ActorHandle  # noqa: E402

from cosmos_ray.config import InferenceConfig, ModelConfig  # noqa: E402
from cosmos_ray.connection import start_private  # noqa: E402
from cosmos_ray.inference.client import PoolClient  # noqa: E402
from cosmos_ray.inference.messages import ActRequest  # noqa: E402
from cosmos_ray.inference.pool import InferencePool  # noqa: E402
from cosmos_ray.model.checkpoint import load_checkpoint, save_policy  # noqa: E402
from cosmos_ray.model.policy import build  # noqa: E402
from cosmos_ray.model.spec import make_spec  # noqa: E402
from cosmos_ray.weights import Weights, pack  # noqa: E402
from jobs.bench.replay_timing import Report, progress  # noqa: E402

CAMERAS = ("robot0_eye_in_hand", "agentview")
WARM_UP = 3  #: pushes before the first round: the store's memory is touched, both actors have mapped it
WIDTH_OF_2_GB = 2048  #: of a network with 8 blocks
WAIT_S = 600.0
ONE_THREAD = {"env_vars": {"OMP_NUM_THREADS": "1"}}


class Learner:
    """The learner's side: a network whose weights it puts."""

    def __init__(self, checkpoint: str):
        torch.set_num_threads(1)
        self.net = load_checkpoint(checkpoint, torch.float32)[0].net
        self.room: list[torch.Tensor] = []

    def weights(self, version: int) -> Weights:
        record = pack(self.net.named_parameters(), version, put=lambda buffers: ray.put(buffers))
        return dataclasses.replace(record, node=ray.get_runtime_context().get_node_id())

    def memcpy(self) -> float:
        """Seconds of one copy of all parameters into memory that was written before."""
        self.room = self.room or [p.detach().clone() for p in self.net.parameters()]
        began = time.perf_counter()
        with torch.no_grad():
            for room, parameter in zip(self.room, self.net.parameters(), strict=True):
                room.copy_(parameter)
        return time.perf_counter() - began


class Client:
    """A worker that always has some requests at the pool."""

    def __init__(self, actors: list[ActorHandle], rows: int, ahead: int):
        self.client, self.ahead = PoolClient(actors, WAIT_S), ahead
        rng = np.random.default_rng(0)
        self.request = ActRequest(rng.integers(0, 256, (rows, 2, 64, 64, 3), dtype=np.uint8), rng.normal(size=(rows, 9)).astype(np.float32),
                                  ("lift the cube",) * rows, np.arange(rows))

    def ask(self, seconds: float) -> float:
        """Rows answered per second."""
        began, rows = time.perf_counter(), 0
        waiting = [self.client.submit(self.request) for _ in range(self.ahead)]
        while (passed := time.perf_counter() - began) < seconds:
            self.client.result(waiting.pop(0))
            rows += len(self.request.seeds)
            waiting.append(self.client.submit(self.request))
        for pending in waiting:
            self.client.result(pending)
        return rows / passed


def push(learner: ActorHandle, pool: InferencePool, version: int) -> float:
    """Seconds from publish until all actors hold the new version."""
    began = time.perf_counter()
    pool.push(ray.get(learner.weights.remote(version), timeout=WAIT_S))
    while pool.holders < len(pool.actors):
        if time.perf_counter() - began > WAIT_S:
            raise SystemExit(f"a push has not arrived for {WAIT_S:g} s: there is nothing to compare")
        pool.poll()
        time.sleep(0.001)
    return time.perf_counter() - began


def checkpoint_of(folder: Path, **sizes: int) -> Path:
    """An untrained policy, stored in bfloat16: half the disk. Everybody computes in float32."""
    policy = build(make_spec(ModelConfig(**sizes), CAMERAS, action_dim=4, proprio_dim=9), seed=1)
    policy.tokenizer.fit(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)))
    policy.net.bfloat16()
    save_policy(policy, folder, version=1)
    return folder


def bench_push(options: argparse.Namespace, report: Report, folder: Path) -> None:
    """The whole way of a push, against one copy."""
    width = 64 * max(1, round((options.megabytes / 2000) ** 0.5 * WIDTH_OF_2_GB / 64))
    checkpoint = checkpoint_of(folder / "large", width=width, layers=8, heads=width // 64)
    learner = ray.remote(Learner).options(num_cpus=0, runtime_env=ONE_THREAD).remote(str(checkpoint))
    pool = InferencePool(checkpoint, InferenceConfig(actors=2, precision="fp32"), [{"num_cpus": 0}] * 2).start()
    try:
        ray.get(learner.memcpy.remote(), timeout=WAIT_S)
        shutil.rmtree(checkpoint)
        pushes, copies = [], []
        for number in range(WARM_UP + options.rounds):
            progress(f"push {number + 1}/{WARM_UP + options.rounds}")
            copied = ray.get(learner.memcpy.remote(), timeout=WAIT_S)
            pushed = push(learner, pool, number + 2)
            if number >= WARM_UP:
                pushes.append(pushed)
                copies.append(copied)
        key = "push_over_memcpy_" + ("2gb" if options.megabytes == 2000 else f"{options.megabytes}mb")
        report.add(key, pushes, copies, f"{statistics.median(pushes):.2f} s over {statistics.median(copies):.2f} s; fastest "
                   f"{min(pushes):.2f} s over {min(copies):.2f} s")
    finally:
        pool.close()
        ray.kill(learner)


def bench_inference(options: argparse.Namespace, report: Report, folder: Path) -> None:
    """The pool's rate with a push a second and without."""
    checkpoint = checkpoint_of(folder / "tiny")
    learner = ray.remote(Learner).options(num_cpus=0, runtime_env=ONE_THREAD).remote(str(checkpoint))
    pool = InferencePool(checkpoint, InferenceConfig(), [{"num_cpus": 0}]).start()
    client = ray.remote(Client).options(num_cpus=0, runtime_env=ONE_THREAD).remote(pool.actors, 3, 4)
    try:
        version, rates = 1, {False: [], True: []}
        ray.get(client.ask.remote(2.0), timeout=WAIT_S)
        for number in range(options.rounds):
            progress(f"windows {number + 1}/{options.rounds}")
            for pushed in (False, True) if number % 2 == 0 else (True, False):
                asking, due = client.ask.remote(options.seconds), time.perf_counter()
                while not ray.wait([asking], timeout=0.1)[0]:
                    if pushed and time.perf_counter() >= due:
                        version, due = version + 1, due + 1.0
                        pool.push(ray.get(learner.weights.remote(version), timeout=WAIT_S))
                    pool.poll()
                rates[pushed].append(ray.get(asking))
        report.add("inference_during_push", rates[True], rates[False],
                   f"{statistics.median(rates[True]):.0f} of {statistics.median(rates[False]):.0f} rows/s")
    finally:
        pool.close()
        ray.kill(learner)
        ray.kill(client)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000, help="size of the weights that are pushed to two actors, about")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=6.0, help="that one window of requests takes")
    parser.add_argument("--json", metavar="FILE", help="write the median ratios")
    options = parser.parse_args()
    report = Report(options.json)
    start_private(num_cpus=4)
    with tempfile.TemporaryDirectory(prefix="bench-weights-") as name:
        bench_inference(options, report, Path(name))
        bench_push(options, report, Path(name))
    ray.shutdown()


if __name__ == "__main__":
    main()
