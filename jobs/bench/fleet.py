"""What a fleet on Ray makes of this machine: against the cores' own speed, and against how public code collects.

    python jobs/bench/fleet.py --json fleet.json      # some minutes; nothing else should run
    python jobs/bench/fleet.py --task libero_spatial/3 --pixels 256 --chunk 16 --rounds 3 --generations 1

- ``fleet_over_ideal``: control steps per second of a rollout fleet, over those of cores that do nothing but simulate, draw the frames that
  the policy sees, and infer: cores / (1/a + 1/b), where a and b are steps per second and core of either work alone, with all cores at
  work, in batches as large as the fleet's own.
- ``fleet_vs_public_pattern``: against one environment with hard resets, frames at every step and inference at batch 1, in one process. An
  episode there is one reset and as many steps as the task has; a few seconds of the steps are timed.
- ``steps_vs_stock_chunk``: the simulation alone, over robosuite's own stepping with frames at the ends of chunks.
- ``ray_overhead``: share of the processor time that Ray's own processes and the driver take during the fleet's window.

All sides take turns, round after round; a figure is the median over rounds, with the smallest and the largest. The policy is an untrained
`tiny` one: no episode ends before its time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

# A job's working directory is the uploaded checkout. Python and Ray's workers search this script's folder, where libero.py hides LIBERO.
sys.path[0] = os.getcwd()
sys.argv[0] = os.path.join(os.getcwd(), os.path.basename(__file__))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402

from cosmos_ray.config import InferenceConfig, RolloutConfig, RunConfig, SimConfig  # noqa: E402
from cosmos_ray.config.libero import libero_task  # noqa: E402
from cosmos_ray.config.settings import new_config  # noqa: E402
from cosmos_ray.connection import start_private  # noqa: E402
from cosmos_ray.inference.messages import ActRequest  # noqa: E402
from cosmos_ray.inference.pool import InferencePool  # noqa: E402
from cosmos_ray.model.checkpoint import save_policy  # noqa: E402
from cosmos_ray.model.policy import build  # noqa: E402
from cosmos_ray.model.spec import make_spec  # noqa: E402
from cosmos_ray.replay.format.episode import EpisodeKey  # noqa: E402
from cosmos_ray.replay.store import ReplayStore  # noqa: E402
from cosmos_ray.rollout.actor import RolloutActor  # noqa: E402
from cosmos_ray.rollout.calls import RayCalls  # noqa: E402
from cosmos_ray.rollout.fleet import Fleet, run_tickets  # noqa: E402
from cosmos_ray.rollout.ticket import EpisodeTicket, Finished  # noqa: E402
from cosmos_ray.sim.embodiment import simulated  # noqa: E402
from cosmos_ray.supervision import Supervisor  # noqa: E402
from jobs.bench.replay_timing import Report, progress  # noqa: E402

SIDE_S = 5.0  #: of one measurement of a side that is not a fleet
SHARES = {"sim.child": "simulators", "RolloutActor": "workers", "InferenceActor": "inference"}
_kept: dict = {}  #: what a process of the pool made in an earlier round


def simulate(sim: SimConfig, chunk: int, seconds: float) -> float:
    """Control steps per second of this process: random chunks, a frame at the end of each, episodes of the task's length."""
    from cosmos_ray.sim.environment import Environment
    from cosmos_ray.sim.simulation import start

    if sim not in _kept:
        _kept[sim] = env = Environment(sim)
        env.execute(np.zeros((chunk, env.action_dim), np.float32), start(env, 0))
    env, rng, steps, seed = _kept[sim], np.random.default_rng(0), 0, 0
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        trajectory = start(env, seed := seed + 1)
        while not env.done and time.perf_counter() - began < seconds:
            env.execute(rng.uniform(-1, 1, (chunk, env.action_dim)).astype(np.float32), trajectory)
        steps += trajectory.length
    return steps / passed


def infer(checkpoint: str, inference: InferenceConfig, rows: int, chunk: int, seconds: float) -> float:
    """Control steps per second for which this process decides, ``rows`` observations in a batch."""
    core = loaded(checkpoint, inference)
    request = observations(core.policy.spec, rows, inference.steps)
    core.answer([request])
    began, batches = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        core.answer([request])
        batches += 1
    return batches * rows * chunk / passed


def loaded(checkpoint: str, inference: InferenceConfig) -> Any:
    import torch

    from cosmos_ray.inference.core import load_core

    torch.set_num_threads(1)
    if "core" not in _kept:
        _kept["core"] = load_core(checkpoint, inference, "cpu")
    return _kept["core"]


def observations(spec: Any, rows: int, steps: int) -> ActRequest:
    rng, side = np.random.default_rng(0), spec.image_size
    images = rng.integers(0, 256, (rows, len(spec.cameras), side, side, 3), dtype=np.uint8)
    return ActRequest(images, rng.normal(size=(rows, spec.proprio_dim)).astype(np.float32), ("do the task",) * rows, np.arange(rows), steps)


def public_pattern(sim: SimConfig, checkpoint: str, inference: InferenceConfig, chunk: int, seconds: float) -> float:
    """Control steps per second of one environment as public evaluation code runs it."""
    core = loaded(checkpoint, inference)
    request = observations(core.policy.spec, 1, inference.steps)
    if "public" not in _kept:
        _kept["public"] = env = public_environment(sim)
        env.reset()
        env.step(np.zeros(env.action_dim))
    env, rng, steps = _kept["public"], np.random.default_rng(0), 0
    began = time.perf_counter()
    env.reset()
    reset = time.perf_counter() - began
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds and steps < sim.horizon:
        if steps % chunk == 0:
            core.answer([request])
        env.step(rng.uniform(-1, 1, env.action_dim))
        steps += 1
    return sim.horizon / (reset + sim.horizon * passed / steps)


def public_environment(sim: SimConfig) -> Any:
    """robosuite's or LIBERO's own environment: its own stepping, renderer and hard resets, frames at every step."""
    from cosmos_ray.sim import gl

    _, robosuite = gl.load()
    pictures = {"has_renderer": False, "has_offscreen_renderer": True, "use_camera_obs": True, "camera_names": list(sim.cameras),
                "camera_heights": sim.image_size, "camera_widths": sim.image_size, "control_freq": sim.control_freq, "ignore_done": True,
                "hard_reset": True}
    if (found := libero_task(sim.task)) is None:
        return robosuite.make(sim.task, robots=list(sim.robots), horizon=sim.horizon, **pictures)
    from cosmos_ray.sim.libero import package
    from cosmos_ray.sim.robosuite_task import controllers

    bddl = package.task_file(*found)
    return package.problem_class(bddl)(str(bddl), robots=list(sim.robots), controller_configs=controllers(sim), horizon=10**6,
                                       initialization_noise=None, renderer="mujoco", **pictures)


class Here:
    """A fleet's crew on this machine alone."""

    def __init__(self, config: RunConfig, store: str, pool: InferencePool):
        self._arguments = config, store, pool.actors

    def start(self, index: int) -> Any:
        options: dict[str, Any] = {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
        return RolloutActor.options(**options).remote(*self._arguments, index)

    def should_move(self, index: int) -> bool:
        return False

    def where(self, index: int) -> str:
        return "this machine"


def used() -> Counter[str]:
    """Processor seconds so far of this process and of all that it started, by kind."""
    out: Counter[str] = Counter()
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            command, times = " ".join(process.cmdline()), process.cpu_times()
            out[next((kind for part, kind in SHARES.items() if part in command), "driver and Ray")] += times.user + times.system
    return out


def fly(fleet: Fleet, pool: InferencePool, config: RunConfig, first: int, generations: int) -> tuple[float, float, float]:
    """One round of the fleet: control steps per second, rows per batch, share of processor time that the driver and Ray took."""
    count = generations * fleet.capacity
    tickets = [EpisodeTicket(EpisodeKey("bench", config.sim.task, "rollout", first + i), noise_seed=first + i) for i in range(count)]
    before, served, began, steps = used(), pool.status()[0], time.perf_counter(), 0

    def take(finished: list[Finished]) -> None:
        nonlocal steps
        steps += sum(episode.length for episode in finished)
        pool.poll()

    run_tickets(fleet, tickets, take)
    passed, spent, now = time.perf_counter() - began, used() - before, pool.status()[0]
    total = sum(spent.values())
    progress("   ".join(f"{kind} {100 * seconds / total:.0f} %" for kind, seconds in spent.most_common())
             + f"   {total / passed:.2f} cores busy")
    return steps / passed, (now["rows"] - served["rows"]) / (now["batches"] - served["batches"]), spent["driver and Ray"] / total


def bench(options: argparse.Namespace, report: Report, folder: Path) -> None:
    cores = os.cpu_count() or 1
    config = new_config({"sim.task": options.task, "sim.image_size": options.pixels, "rollout.workers": options.workers or cores,
                         "rollout.envs_per_worker": options.envs, **({"model.chunk": options.chunk} if options.chunk else {})})
    sim, inference, rollout = config.sim, config.inference, config.rollout
    chunk, checkpoint, body = config.model.chunk, folder / "tiny", simulated(sim)
    policy = build(make_spec(config.model, sim.cameras, action_dim=body.action_dim, proprio_dim=body.proprio_dim), seed=1)
    seen = np.random.default_rng(0).integers(0, 256, (8, sim.image_size, sim.image_size, 3), dtype=np.uint8)
    policy.tokenizer.fit(torch.from_numpy(seen))
    save_policy(policy, checkpoint, version=1)
    start_private(num_cpus=cores)
    ReplayStore(str(folder / "replay"))
    pool = InferencePool(checkpoint, inference, [{"num_cpus": 0}] * inference.actors).start()
    fleet = Fleet(Here(config, str(folder / "replay"), pool), RayCalls(), rollout.workers, rollout.envs_per_worker,
                  lambda ticket: (ticket.key.name,), 180.0, Supervisor())
    sides: dict[str, list[float]] = {name: [] for name in ("a", "b", "ideal", "fleet", "public", "stock", "rest")}
    with ProcessPoolExecutor(cores, get_context("spawn")) as processes:
        def everywhere(function: Callable[..., float], *arguments: Any) -> float:
            """Mean over processes that all work at once, one a core."""
            return statistics.mean(call.result() for call in [processes.submit(function, *arguments) for _ in range(cores)])

        fly(fleet, pool, config, 0, 1)  # warm
        for number in range(options.rounds):
            progress(f"round {number + 1}/{options.rounds}")
            speed, rows, rest = fly(fleet, pool, config, 10_000 * (number + 1), options.generations)
            a = everywhere(simulate, sim, chunk, SIDE_S)
            b = everywhere(infer, str(checkpoint), inference, round(rows), chunk, SIDE_S)
            stock = everywhere(simulate, replace(sim, fast_step=False), chunk, SIDE_S)
            public = processes.submit(public_pattern, sim, str(checkpoint), inference, chunk, SIDE_S).result()
            for name, value in zip(sides, (a, b, cores / (1 / a + 1 / b), speed, public, stock, 1 - rest), strict=True):
                sides[name].append(value)
            progress(f"steps/s: simulation {a:.0f} a core, inference {b:.0f} a core in batches of {rows:.1f}, fleet {speed:.0f}, "
                     f"public pattern {public:.1f}")
        for child in active_children():  # OpenGL takes its leave noisily
            child.kill()
    median = {name: statistics.median(values) for name, values in sides.items()}
    report.add("fleet_over_ideal", sides["fleet"], sides["ideal"], f"{median['fleet']:.0f} over {median['ideal']:.0f} steps/s")
    report.add("fleet_vs_public_pattern", sides["fleet"], sides["public"], f"{median['fleet']:.0f} over {median['public']:.1f} steps/s")
    report.add("steps_vs_stock_chunk", sides["a"], sides["stock"], f"{median['a']:.0f} over {median['stock']:.0f} steps/s and core")
    report.add("ray_overhead", [1 - share for share in sides["rest"]], [1.0] * len(sides["rest"]), "share of processor time")
    fleet.close()
    pool.close()
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--task", default="Lift")
    parser.add_argument("--pixels", type=int, default=64, help="side of the pictures")
    parser.add_argument("--chunk", type=int, default=0, help="actions per chunk; 0: as the preset has it")
    parser.add_argument("--generations", type=int, default=3, help="episodes of each place of the fleet, in one round")
    parser.add_argument("--workers", type=int, default=0, help="rollout workers; 0: as many as cores")
    parser.add_argument("--envs", type=int, default=RolloutConfig().envs_per_worker, help="episodes that a worker runs at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the median ratios")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-fleet-") as name:
        bench(options, Report(options.json), Path(name))


if __name__ == "__main__":
    main()
