"""What an inference actor tells Prometheus, through Ray's own metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

WAITS_MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000]
TAGS = ("node",)


class ActorMetrics:
    """The series of one actor; Ray adds the worker. Every name begins with ``ray_cosmos_ray_inference_`` at the node's endpoint."""

    def __init__(self, node: str, max_batch: int):
        def named(kind: type, name: str, what: str, *more: object) -> Any:
            metric = kind(f"cosmos_ray_inference_{name}", what, *more, tag_keys=TAGS)
            metric.set_default_tags({"node": node})
            return metric

        self._max_batch = max_batch
        self._rows = named(Counter, "rows", "observations answered")
        self._queue = named(Gauge, "queue_rows", "observations that wait after a batch")
        self._fill = named(Gauge, "batch_fill", "rows of the last batch over inference.max_batch")
        self._version = named(Gauge, "policy_version", "policy version that answered last")
        self._wait = named(Histogram, "wait_ms", "milliseconds from a request's arrival to its answer", WAITS_MS)

    def batch(self, rows: int, waiting: int, waits_s: Sequence[float], version: int) -> None:
        """Take in one batch: its rows, the rows that wait after it, how long each of its requests took, and who answered."""
        self._rows.inc(rows)
        self._queue.set(waiting)
        self._fill.set(rows / self._max_batch)
        self._version.set(version)
        for seconds in waits_s:
            self._wait.observe(max(1000 * seconds, 1e-3))
