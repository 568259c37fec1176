"""Who a run is, under any name, and what decides the outcome of its evaluation episodes.

Episode keys carry the run's identity, not its name, and evaluation keys also carry a digest of the values that act. So a copied, moved
or renamed run finds the episodes that it has, and a setting that gets another name orphans none of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from cosmos_ray.config import PlannerConfig, RunConfig
from cosmos_ray.config.tasks import task_instruction

DIGEST_VERSION = 2  #: of :func:`evaluation_digest`, for new runs

#: Simulator settings that digest version 1 covers, with their defaults of that time: a run from before a setting stored no value for it.
SIM_BEFORE: dict[str, Any] = {
    "task": "Lift", "robots": ["Panda"], "controller": "OSC_POSE", "wrist_cameras": ["robot0_eye_in_hand"], "third_cameras": ["agentview"],
    "image_size": 64, "actions": "auto", "horizon": 0, "control_freq": 20, "placement": 0.0, "mesh_cell": 0.008, "fast_step": True}


@dataclass(frozen=True)
class RunIdentity:
    """Written to ``identity.json`` when a run begins; a copy of the run keeps it.

    The key is the name that the run begins with. Two runs of one name and seed so have the same keys, and training, which draws episodes
    in an order by their keys, gives the same weights. Runs that share a store must begin with different names.
    """

    key: str  #: the ``run`` part of the run's episode keys
    digest_version: int = DIGEST_VERSION
    sim: dict[str, Any] = field(default_factory=dict)  #: digest version 1: the run's simulator settings as they were stored
    execute: int = 0  #: digest version 1: ``rollout.execute`` as it was stored

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of_before(cls, stored: dict[str, Any]) -> RunIdentity:
        """The identity of a run from before identities: the name that its episodes carry. ``stored`` is its ``config.json``."""
        return cls(stored["name"], 1, SIM_BEFORE | stored.get("sim", {}), stored.get("rollout", {}).get("execute", 0))


def evaluation_digest(identity: RunIdentity, config: RunConfig, planner: PlannerConfig | None, weights: str, planning_weights: str) -> str:
    """Ten hex digits of everything that decides an evaluation episode besides its initial state.

    ``weights`` and ``planning_weights`` are hashes of the checkpoints' weights; "" is no separate planning network.
    """
    inference = config.inference
    sampler = [inference.steps, inference.reference_steps, inference.precision, inference.accelerate]
    if identity.digest_version == 1:
        whole_chunk = config.rollout.execute == config.model.chunk != identity.execute
        values: dict[str, Any] = {"weights": weights, "planner": _planner_before(planner), "sampler": sampler,
                                  "execute": 0 if whole_chunk else config.rollout.execute, "sim": identity.sim}
        if planning_weights:
            values["judge"] = planning_weights
    else:
        values = {"version": 2, "weights": weights, "planning weights": planning_weights, "sampler": sampler,
                  "execute": config.rollout.execute, "planner": _planner_values(planner), "sim": _sim_values(config)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


#: Aggregations that the keys of stored episodes know by another name: "lcb" was the population's deviation when it got there.
AGGREGATES = {"lcb": "lcb of samples", "lcb_population": "lcb"}

# The lists below are part of the keys of stored episodes. A name or an order in them never changes, whatever the settings are called. A
# setting that comes later joins its list only where its value is not what earlier versions did without it.


def _planner_values(planner: PlannerConfig | None) -> list[Any] | None:
    """The planner's values that act, for digest version 2."""
    if planner is None:
        return None
    later = [["ladder", planner.ladder]] if planner.ladder != "rounded" else []
    later += [["early_rejection", True]] if planner.early_rejection else []
    later += [[name, getattr(planner, name)] for name, before in (("depth", 1), ("branch", 1), ("beam", 0), ("deadline_ms", 0))
              if getattr(planner, name) != before]
    return [planner.candidates, planner.rank_by, planner.spread, planner.futures, planner.future_steps, planner.value_samples,
            planner.value_steps, AGGREGATES.get(planner.aggregate, planner.aggregate), *later]


def _planner_before(planner: PlannerConfig | None) -> dict[str, Any] | None:
    """The same as digest version 1 hashed them: under the names of that time, and in a list the values of settings that came later."""
    names = ("candidates", "value", "spread", "futures", "future_steps", "values", "value_steps", "aggregate")
    if (values := _planner_values(planner)) is None:
        return None
    later = values[len(names):]
    return dict(zip(names, values[:len(names)], strict=True)) | ({"later": later} if later else {})


def _sim_values(config: RunConfig) -> list[Any]:
    """The simulator's values that act, for digest version 2."""
    sim = config.sim
    later = [] if sim.instruction == task_instruction(sim.task) else [["instruction", sim.instruction]]
    later += [] if sim.quality == "fast" else [["quality", sim.quality]]
    return [sim.task, list(sim.robots), sim.controller, list(sim.wrist_cameras), list(sim.third_cameras), sim.image_size, sim.actions,
            sim.horizon, sim.control_freq, sim.placement, sim.mesh_cell, sim.fast_step, *later]
