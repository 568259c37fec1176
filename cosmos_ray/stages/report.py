"""The report: one HTML page and the same numbers as JSON, read from the store and the run's metrics."""

from __future__ import annotations

from typing import Any

import torch

from cosmos_ray.inference.core import load_core
from cosmos_ray.learner.mixture import VALUE_TYPES
from cosmos_ray.planning.assessment import assess, recorded_chains
from cosmos_ray.replay.format.schema import DamagedEpisode, NewerSchema
from cosmos_ray.report.build import read_evaluation, write_report
from cosmos_ray.run import Run
from cosmos_ray.stages.acting import IMPORTED_PLANNING, newest, planning_network
from cosmos_ray.stages.plan import plan_episode

HORIZON = 3  #: chunks the world model is asked to imagine in a row
WINDOWS = 256  #: held-out stretches that world model and value are measured on


def report(run: Run) -> dict:
    """Write ``report.html`` and ``report.json``. Where a policy plans (the refined one, or one with an imported planning network), with a
    filmstrip of planned episode ``config.plan_seed`` and an assessment of the network that plans it."""
    if not run.config.sim.task or not any(run.folder.has_policy(name) for name in ("refined", IMPORTED_PLANNING)):
        return write_report(run.folder, run.config)
    return write_report(run.folder, run.config, plan_episode(run), assessment(run))


def assessment(run: Run) -> dict[str, Any] | None:
    """:func:`assess` of the network that plans, on the evaluation episodes without planning.

    None when all episodes are too short, or when the policy sees other frames than the stored ones (cropped, or through JPEG).
    """
    config, store = run.config, run.folder.store()
    torch.set_num_threads(config.inference.threads)
    names = [name for arm in read_evaluation(run.folder)["arms"].values() if not arm["planner"] for name in arm["episode_names"]]
    views = []
    for name in names:
        try:
            view = store.view(name)
            view.check()
            views.append(view)
        except (FileNotFoundError, DamagedEpisode, NewerSchema):
            continue  # the report says how many are missing
    chains = recorded_chains(views, config.sim.cameras, config.model.chunk, HORIZON, WINDOWS, config.seed)
    if chains is None:
        return None
    acting = newest(run)
    network = planning_network(run, acting) or run.folder.checkpoint(acting)
    policy = load_core(network, config.inference, "cuda" if config.inference.gpus else "cpu").policy
    if policy.spec.jpeg or policy.spec.augmented:
        return None
    return assess(policy, chains, config.planner, VALUE_TYPES[config.learner.value_mode])
