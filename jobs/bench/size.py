"""How well `size` predicts: control steps per second of real fleets on local Ray nodes, against the simulation of the same fleets.

    python jobs/bench/size.py --json size.json      # some minutes; nothing else should run

The probe runs first, then fleets of 1, 2 and 4 workers on one Ray node and on two, which share this machine's cores. ``size_N_W`` is the
predicted over the measured speed with N nodes and W workers: the median over rounds, with the smallest and the largest. The policy is an
untrained `tiny` one: no episode ends before its time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# A job's working directory is the uploaded checkout. Python and Ray's workers search this script's folder, where libero.py hides LIBERO.
sys.path[0] = os.getcwd()
sys.argv[0] = os.path.join(os.getcwd(), os.path.basename(__file__))

import numpy as np  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

from cosmos_ray.config import RunConfig  # noqa: E402
from cosmos_ray.config.settings import new_config  # noqa: E402
from cosmos_ray.inference.pool import InferencePool  # noqa: E402
from cosmos_ray.model.checkpoint import save_policy  # noqa: E402
from cosmos_ray.model.policy import build  # noqa: E402
from cosmos_ray.model.spec import make_spec  # noqa: E402
from cosmos_ray.replay.store import ReplayStore  # noqa: E402
from cosmos_ray.rollout.actor import RolloutActor  # noqa: E402
from cosmos_ray.rollout.calls import RayCalls  # noqa: E402
from cosmos_ray.rollout.fleet import Fleet  # noqa: E402
from cosmos_ray.sim import gl  # noqa: E402
from cosmos_ray.sim.embodiment import simulated  # noqa: E402
from cosmos_ray.sizing.fleet import Shape, simulate  # noqa: E402
from cosmos_ray.sizing.probe import load_probe, measure  # noqa: E402
from cosmos_ray.supervision import Supervisor  # noqa: E402
from jobs.bench.fleet import fly  # noqa: E402
from jobs.bench.replay_timing import Report, progress  # noqa: E402


class Nodes:
    """A fleet's crew on the nodes of the cluster, in turn."""

    def __init__(self, config: RunConfig, store: str, pool: InferencePool):
        self._arguments = config, store, pool.actors
        self._nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]

    def start(self, index: int) -> Any:
        where = NodeAffinitySchedulingStrategy(self._nodes[index % len(self._nodes)], soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": where, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
        return RolloutActor.options(**options).remote(*self._arguments, index)

    def should_move(self, index: int) -> bool:
        return False

    def where(self, index: int) -> str:
        return "this machine"


def fleets(config: RunConfig, folder: Path, nodes: int, options: argparse.Namespace, speeds: dict[tuple[int, int], list[float]]) -> None:
    """Control steps per second of every fleet on ``nodes`` Ray nodes, into ``speeds``."""
    cores = (os.cpu_count() or 1) // nodes
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=cores)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        pool = InferencePool(folder / "tiny", config.inference, [{"num_cpus": 0}]).start()
        for workers in options.workers:
            fleet = Fleet(Nodes(config, str(folder / "replay"), pool), RayCalls(), workers, options.envs, lambda ticket: (ticket.key.name,),
                          180.0, Supervisor())
            first = 100_000 * (10 * nodes + workers)
            fly(fleet, pool, config, first, 1)  # warm
            for number in range(options.rounds):
                speed = fly(fleet, pool, config, first + 10_000 * (number + 1), options.generations)[0]
                speeds.setdefault((nodes, workers), []).append(speed)
                progress(f"{nodes} nodes, {workers} workers, round {number + 1} of {options.rounds}: {speed:.0f} steps/s")
            fleet.close()
        pool.close()
    finally:
        ray.shutdown()
        cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--workers", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--envs", type=int, default=6, help="episodes that each worker runs at once")
    parser.add_argument("--generations", type=int, default=3, help="episodes of each place of the fleet, in one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--probe", type=Path, help="a saved probe of this machine")
    parser.add_argument("--json", metavar="FILE", help="write the median ratios")
    options = parser.parse_args()
    gl.choose_backend()
    config = new_config({"sim.task": "Lift", "rollout.envs_per_worker": options.envs})
    probe = load_probe(options.probe) if options.probe else measure(config)
    speeds: dict[tuple[int, int], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-size-") as name:
        folder, sim, body = Path(name), config.sim, simulated(config.sim)
        policy = build(make_spec(config.model, sim.cameras, action_dim=body.action_dim, proprio_dim=body.proprio_dim), seed=1)
        seen = np.random.default_rng(0).integers(0, 256, (8, sim.image_size, sim.image_size, 3), dtype=np.uint8)
        policy.tokenizer.fit(torch.from_numpy(seen))
        save_policy(policy, folder / "tiny", version=1)
        ReplayStore(str(folder / "replay"))
        for nodes in options.nodes:
            fleets(config, folder, nodes, options, speeds)
    report = Report(options.json)
    for (nodes, workers), measured in speeds.items():
        out = simulate(probe, Shape(nodes, (os.cpu_count() or 1) // nodes, workers, options.envs))
        detail = f"predicted {out.steps_s:.0f} steps/s, {out.bottleneck}"
        report.add(f"size_{nodes}_{workers}", [out.steps_s] * len(measured), measured, detail)


if __name__ == "__main__":
    main()
