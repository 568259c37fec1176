"""The policy server under load, and under nonsense.

    python jobs/bench/serve.py --name RUN [--root runs] --json serve.json      # two minutes

Starts `python -m cosmos_ray serve` for a run, asks it from many clients at once, and then sends malformed requests. Prints answers per
second, latencies, the server's memory before and after, and how many replies were no clear status. ``serve_over_bare``: rows a second of
the served policy over those of the same policy called in batches in this process.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

import numpy as np  # noqa: E402
import psutil  # noqa: E402

from cosmos_ray.serving.wire import to_json  # noqa: E402
from jobs.bench.replay_timing import Report, progress  # noqa: E402

CLEAR = (200, 400, 401, 404, 409, 413, 422, 429)


class Client:
    """One connection that stays."""

    def __init__(self, address: str):
        self.connection = http.client.HTTPConnection(address, timeout=120)

    def ask(self, path: str, body: bytes | str | None = None) -> tuple[int, bytes]:
        """Status and body of the reply to a POST of ``body``, or to a GET."""
        self.connection.request("GET" if body is None else "POST", path, body)
        reply = self.connection.getresponse()
        return reply.status, reply.read()

    def info(self) -> dict:
        return json.loads(self.ask("/info")[1])


def observation(info: dict, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    images = {keys[0]: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for keys in info["cameras"].values()}
    return {**images, "proprio": rng.normal(size=info["proprio_dim"]).astype(np.float32), "task_description": "lift the cube",
            "futures": False, "seed": seed}


def malformed(count: int, seed: int) -> Iterator[bytes]:
    """Bodies that are no requests, or nearly ones: cut, changed, nested, with arrays that lie about themselves."""
    rng = np.random.default_rng(seed)
    image = np.zeros((8, 8, 3), np.uint8)
    whole = {"primary_image": image, "wrist_image": image, "proprio": np.zeros(9, np.float32), "task_description": "lift"}
    good = to_json(whole, True).encode()
    dtypes = ("<f4", "O", "|S9", "<M8[s]", "i4,f4", "", "<c16", "float999", 3, None, [], "|V8")
    while count > 0:
        count -= 1
        kind = int(rng.integers(6))
        if kind == 0:
            yield rng.bytes(int(rng.integers(0, 2000)))
        elif kind == 1:
            yield good[: int(rng.integers(len(good)))]
        elif kind == 2:
            changed = bytearray(good)
            for place in rng.integers(len(good), size=int(rng.integers(1, 20))):
                changed[place] = int(rng.integers(256))
            yield bytes(changed)
        elif kind == 3:
            lying = {"__numpy__": "AAAAAAAA", "dtype": dtypes[int(rng.integers(len(dtypes)))],
                     "shape": [int(side) for side in rng.integers(-2, 2**33, size=int(rng.integers(10)))]}
            yield to_json({"primary_image": lying, "proprio": lying, "task_description": lying}, False).encode()
        elif kind == 4:
            yield b"[" * int(rng.integers(20_000)) + b'{"a":' * int(rng.integers(2000))
        else:
            values = (None, True, -1, 1e308, "x" * 3000, [], {}, [[]], [[1], [1, 2]], [None], {"b": {"c": []}})
            keys = ("primary_image", "wrist_image", "proprio", "task_description", "seed", "futures", "episode", "executed", "encoded", "")
            picked = {str(key): values[int(rng.integers(len(values)))] for key in rng.choice(keys, size=int(rng.integers(1, 8)))}
            yield to_json(picked, False).encode()


def load(address: str, info: dict, clients: int, seconds: float) -> tuple[list[float], Counter]:
    """Latencies in seconds of answered requests, and the number of replies by status, of clients that each wait for their answer."""
    latencies: list[float] = []
    statuses: Counter = Counter()
    until = time.perf_counter() + seconds

    def client(number: int) -> None:
        body = to_json(observation(info, number), True)
        asking = Client(address)
        while (began := time.perf_counter()) < until:
            status, _ = asking.ask("/act", body)
            statuses[status] += 1
            if status == 200:
                latencies.append(time.perf_counter() - began)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, statuses


def bare(checkpoint: str, rows: int, seconds: float) -> float:
    """Rows a second of the policy in this process, in batches of ``rows``."""
    import torch

    from cosmos_ray import load_policy

    torch.set_num_threads(1)
    policy = load_policy(checkpoint)
    info = {"cameras": policy.cameras, "proprio_dim": policy.spec.proprio_dim}
    one = observation(info, 0)
    batch = {key: np.stack([value] * rows) for key, value in one.items() if isinstance(value, np.ndarray)}
    policy.get_action(batch, "lift the cube")
    began, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        policy.get_action(batch, "lift the cube")
        count += rows
    return count / passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--name", required=True, help="run whose newest policy is served")
    parser.add_argument("--root", default="runs")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--json", metavar="FILE", help="write the median ratios")
    options = parser.parse_args()
    report = Report(options.json)
    server = subprocess.Popen([sys.executable, "-m", "cosmos_ray", "serve", "--root", options.root, "--name", options.name, "--port", "0"],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"on http://([^/]+)/act", line):
            break
        progress(line.rstrip())
    else:
        sys.exit("the server did not start")
    address, memory = found[1], psutil.Process(server.pid).memory_info
    client = Client(address)
    info = client.info()
    load(address, info, options.clients, 2.0)  # warm
    before = memory().rss / 2**20
    latencies, statuses = load(address, info, options.clients, options.seconds)
    after = memory().rss / 2**20
    client = Client(address)  # the server has closed an idle connection
    status = client.info()
    filled = status["rows"] / max(status["batches"], 1)
    speed = len(latencies) / options.seconds
    cuts = statistics.quantiles(latencies, n=100)
    progress(f"{options.clients} clients, {options.seconds:g} s: {speed:.1f} answers/s in batches of {filled:.1f}, "
             f"p50 {1000 * cuts[49]:.0f} ms, p99 {1000 * cuts[98]:.0f} ms, statuses {dict(statuses)}; server {before:.0f} MiB before, "
             f"{after:.0f} MiB after")
    codes = Counter(client.ask("/act", body)[0] for body in malformed(options.malformed, seed=1))
    progress(f"{options.malformed} malformed requests: {dict(codes)}; {sum(n for code, n in codes.items() if code not in CLEAR)} without a "
             f"clear status; server {memory().rss / 2**20:.0f} MiB after")
    server.send_signal(signal.SIGINT)
    server.wait()
    rows = bare(f"{options.root}/{options.name}/checkpoints/{info['checkpoint']}", 16, min(10.0, options.seconds))
    report.add("serve_over_bare", [speed], [rows], f"{speed:.1f} over {rows:.1f} rows/s")


if __name__ == "__main__":
    main()
