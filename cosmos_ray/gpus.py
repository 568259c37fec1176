"""Whether the GPUs that the settings ask for are there, asked before anything runs."""

from __future__ import annotations

import os

import ray
import torch

from cosmos_ray.config import LearnerConfig, RunConfig
from cosmos_ray.errors import ConfigError


def check_ray_gpus(config: RunConfig, acts: bool, learns: bool, private: bool) -> None:
    """ConfigError when inference (for a command that ``acts``) or the learner (for one that ``learns``) asks for GPUs that Ray lacks.

    A ``private`` Ray counts devices that torch may not be able to use.
    """
    total = ray.cluster_resources().get("GPU", 0.0)
    largest = max([0.0] + [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]])
    if private and total and (acts or learns) and not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        said = "is not set" if visible is None else f"is {visible!r}"
        raise ConfigError(f"Ray counts {total:g} GPUs, of which torch can use none (CUDA_VISIBLE_DEVICES {said}): mend the driver or the "
                          "variable, or set CUDA_VISIBLE_DEVICES to an empty text to run on the CPU")
    if acts:
        inference = config.inference
        _check("inference", inference.gpus, inference.actors, "inference actors", "inference.actors", total, largest)
    if learns:
        learner = config.learner
        _check("learner", learner.gpus, learner.world_size, "learner ranks", "learner.world_size", total, largest)
        if learner.accelerate == "graphs" and not total:
            raise ConfigError("learner.accelerate = 'graphs' needs a GPU for every learner rank, and Ray has no GPU: set "
                              "learner.accelerate to 'none'")
        learner_share(config, learner, acts)


def check_own_gpu(config: RunConfig) -> None:
    """ConfigError when inference asks for a GPU and this process, which acts without Ray, can use none."""
    if config.inference.gpus and not torch.cuda.is_available():
        raise ConfigError(f"inference.gpus = {config.inference.gpus:g} asks for a GPU, and torch can use none here: set inference.gpus to "
                          "0 to act on the CPU" + (" and inference.accelerate to 'none'" if config.inference.accelerate != "none" else ""))


def learner_share(config: RunConfig, learner: LearnerConfig, beside_pool: bool) -> float:
    """GPUs of each rank: the setting, or an equal share of what the inference pool leaves, at most one. ConfigError for too few GPUs."""
    total, inference = ray.cluster_resources().get("GPU", 0.0), config.inference
    taken = inference.actors * inference.gpus if beside_pool else 0.0
    share = learner.gpus or min(1.0, int(100 * (total - taken) / learner.world_size + 1e-6) / 100)
    if total and (share <= 0 or taken + share * learner.world_size > total + 1e-6):
        raise ConfigError(f"{total:g} GPUs are too few for {inference.actors} inference actors with inference.gpus = {inference.gpus:g} "
                          f"and {learner.world_size} learner ranks: lower inference.gpus (0.25, say) or set learner.gpus")
    return share if total else 0.0


def _check(section: str, each: float, count: int, who: str, number: str, total: float, largest: float) -> None:
    if not each or each * count <= total + 1e-6 and each <= largest + 1e-6:
        return
    there = f"Ray has {total:g}" + (f", at most {largest:g} on one machine" if total > largest else "")
    todo = f"lower {section}.gpus or {number}" if total else f"set {section}.gpus to 0 to run on the CPU"
    raise ConfigError(f"{section}.gpus = {each:g} for {count} {who} asks for {each * count:g} GPUs, {there}: {todo}")
