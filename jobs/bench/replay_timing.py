"""Two sides timed in turn, and the report of their ratios."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Call = Callable[[], object]
MISSING = "not run: pip install -r jobs/bench/requirements.txt"

#: What the ratios should be: "<" at most, ">" at least.
WANTED = {"vs_hdf5_episode_jpeg": ">5", "vs_h5py_frame_jpeg": ">1.5", "vs_lance": ">1.5", "vs_lerobot_v3": ">10",
          "over_jpeg_decode": "<1.3", "commit_over_write_fsync": "<1.3", "eight_writers_of_fsync": ">0.8",
          "open_100000_episodes_s": "<2", "push_over_memcpy_2gb": "<3", "inference_during_push": ">0.95",
          "fleet_over_ideal": ">0.85", "fleet_vs_public_pattern": ">50", "steps_vs_stock_chunk": ">4", "ray_overhead": "<0.05",
          "libero_vs_vla_eval": ">10", "outcome_agreement": ">0.98", "exact_vs_serial": ">2", "pruned_vs_serial": ">3.5"}  # fmt: skip


def progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


class Report:
    """Prints each result as it comes and keeps the medians."""

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.results: dict[str, float] = {}

    def add(self, key: str, above: list[float], below: list[float], detail: str = "") -> None:
        """A ratio of seconds, one of each per round."""
        values = [a / b for a, b in zip(above, below, strict=True)]
        self.results[key] = statistics.median(values)
        wanted = WANTED.get(key, "").replace("<", "at most ").replace(">", "at least ")
        print(f"{key:<28} {self.results[key]:9.3f}  [{min(values):.3f}, {max(values):.3f}]  {wanted:<13}  {detail}", flush=True)
        if self.path:
            Path(self.path).write_text(json.dumps(self.results, indent=1))

    def missing(self, key: str) -> None:
        print(f"{key:<28} {MISSING}", flush=True)


def in_turn(first: list[Call], second: list[Call], options, before: Call = lambda: None) -> tuple[list[float], list[float]]:
    """Seconds that all calls of each side take in every round: the sum over calls of the fastest of ``options.passes``.

    ``before`` runs, untimed, before each pass.
    """
    sides = first, second
    rounds: tuple[list[float], list[float]] = ([], [])
    for _ in range(options.rounds):
        fastest = [np.full(len(calls), np.inf) for calls in sides]
        for number in range(options.passes):
            before()
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                for i, call in enumerate(sides[side]):
                    began = time.perf_counter()
                    call()
                    fastest[side][i] = min(fastest[side][i], time.perf_counter() - began)
        for times, calls in zip(rounds, fastest, strict=True):
            times.append(float(calls.sum()))
    return rounds


def pace(call: Call, seconds: float) -> float:
    """Seconds a call takes on average, over as many as fill ``seconds``."""
    began, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds or not calls:
        call()
        calls += 1
    return passed / calls
