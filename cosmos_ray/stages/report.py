"""The report: one HTML page and the same numbers as JSON, read from the store and the run's metrics."""

from __future__ import annotations

from cosmos_ray.report.build import write_report
from cosmos_ray.run import Run
from cosmos_ray.stages.plan import plan_episode


def report(run: Run) -> dict:
    """Write ``report.html`` and ``report.json``, with a filmstrip of planned episode ``config.plan_seed``."""
    trace = None
    if (run.folder.checkpoint("refined") / "policy.json").exists():
        trace = plan_episode(run.config, run.folder, run.config.plan_seed)
    return write_report(run.folder, run.config, trace)
