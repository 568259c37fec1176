"""The live page over a large store.

    python jobs/bench/watch.py [--episodes 10000] [--json watch.json]      # two minutes

Makes a store of small episodes with decisions, starts `python -m cosmos_ray watch` on it, and measures: seconds until the page, the first
snapshot and the first list of episodes are there (with a manifest and without), memory once every header is read, latency of each view,
and how many files the command opens when one episode is added.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

import numpy as np  # noqa: E402
import psutil  # noqa: E402

from cosmos_ray.replay.format.codec import encode_jpeg  # noqa: E402
from cosmos_ray.replay.format.episode import Episode, EpisodeKey  # noqa: E402
from cosmos_ray.replay.store import ReplayStore  # noqa: E402

LENGTH, CHUNK = 60, 8


def episode(number: int) -> Episode:
    """A rollout of 60 steps with two cameras and eight decisions of eight candidates."""
    rng = np.random.default_rng(number)
    jpeg = encode_jpeg(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1))
    steps = range(0, LENGTH, CHUNK)
    decided = [{"step": step, "value": round(float(rng.uniform(-1, 1)), 4), "chosen": 0, "scores": rng.random(8).round(4).tolist()}
               for step in steps]
    return Episode(
        key=EpisodeKey("bench", "Lift", ("rollout", "eval")[number % 5 == 0], number), instruction="lift the cube",
        cameras=("wrist", "front"),
        success=bool(rng.integers(2)), episode_return=0.0, timed_out=False, invalid="", policy_version=number // 500,
        actions=np.zeros((LENGTH, 4)), labels=np.zeros((LENGTH, 4)), rewards=np.zeros(LENGTH), proprio=np.zeros((LENGTH + 1, 9)),
        states=np.zeros((LENGTH + 1, 40)), step_versions=np.zeros(LENGTH), predicted_values=np.zeros(LENGTH),
        frames={step: [jpeg, jpeg] for step in steps}, info={"arm": f"arm {number % 3}", "decisions": decided})


class Page:
    """The command on a free port, and a client of it."""

    def __init__(self, store: Path) -> None:
        self.began = time.monotonic()
        command = [sys.executable, "-m", "cosmos_ray", "watch", "--store", str(store), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout
        line = self.process.stdout.readline()
        found = re.search(r"http://[^/]+", line)
        assert found, line
        self.address = found[0]

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.address + path, timeout=300) as reply:
            return reply.read()

    def timed(self, *paths: str) -> float:
        began = time.monotonic()
        for path in paths:
            self.get(path)
        return round(time.monotonic() - began, 3)

    def memory_mb(self) -> float:
        return round(psutil.Process(self.process.pid).memory_info().rss / 2**20, 1)

    def state(self) -> dict[str, Any]:
        return json.loads(self.get("/api/state"))

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)


OPENING = ("/", "/page.css", "/page.js", "/draw.js", "/lists.js", "/now.js", "/player.js", "/api/state")


def measure(root: Path, store: ReplayStore, count: int, manifest: bool) -> dict[str, Any]:
    """One start of the command; ``manifest``: whether the store has one."""
    if manifest:
        store.save_manifest()
    else:
        (root / "manifest.arrow").unlink(missing_ok=True)
    page = Page(root)
    try:
        out: dict[str, Any] = {"manifest": manifest, "started_s": round(time.monotonic() - page.began, 2), "page_s": page.timed(*OPENING)}
        while (state := page.state())["episodes"] < count:
            time.sleep(0.1)
        out["listed_s"] = round(time.monotonic() - page.began, 2)
        out["list_s"] = page.timed("/api/episodes")
        while (state := page.state())["unread"] or state["episodes"] < count:
            time.sleep(0.2)
        out["all_read_s"] = round(time.monotonic() - page.began, 2)
        out["page_again_s"] = page.timed(*OPENING)
        for name, path in {"older": "/api/episodes?page=3", "filter": "/api/episodes?arm=arm+1&outcome=success", "value": "/api/value",
                           "arms": "/api/groups"}.items():
            out[f"{name}_s"] = page.timed(path)
        out["memory_mb"] = page.memory_mb()
        began, files = time.monotonic(), psutil.Process(page.process.pid).io_counters().read_count
        store.commit(episode(count + int(manifest)))
        while page.state()["episodes"] == state["episodes"]:
            time.sleep(0.05)
        out["new_episode_s"] = round(time.monotonic() - began, 2)
        out["reads_for_it"] = psutil.Process(page.process.pid).io_counters().read_count - files
        return out
    finally:
        page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--folder", help="folder for the store [a temporary one]")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder) / "store"
        store = ReplayStore(root)
        for number in range(options.episodes):
            store.commit(episode(number))
        rows = [measure(root, store, options.episodes + i, manifest) for i, manifest in enumerate((False, True))]
    for row in rows:
        print(json.dumps(row))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
