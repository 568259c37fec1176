"""What a config asks of the cluster, and whether any of the cluster's nodes can ever give it, found before anything runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import torch

from cosmos_ray.config import LearnerConfig, RunConfig
from cosmos_ray.config.selector import selector
from cosmos_ray.errors import ConfigError
from cosmos_ray.places import Ask, Node, Places


def workers_ask(config: RunConfig, count: int, who: str = "rollout workers", gpus: float = 0.0) -> Ask:
    """``count`` simulator processes. The run goes on with those that find a place."""
    return Ask(who, count, "rollout", gpus, selector=selector("rollout.nodes", config.rollout.nodes))


def pool_ask(config: RunConfig) -> Ask:
    """The inference actors, of which a run needs one."""
    inference = config.inference
    return Ask("inference actors", inference.actors, "inference", inference.gpus, selector=selector("inference.nodes", inference.nodes),
               least=1)


def more_actors_ask(config: RunConfig) -> Ask:
    """The inference actors beyond ``inference.actors``, none of them yet."""
    return dataclasses.replace(pool_ask(config), who="more inference actors", count=0, least=0)


def learner_ask(learner: LearnerConfig) -> Ask:
    """The learner ranks, all together. Without ``learner.gpus`` they share the GPUs that inference leaves."""
    return Ask("learner ranks", learner.world_size, "learner", learner.gpus, shares_gpus=not learner.gpus, together=True,
               selector=selector("learner.nodes", learner.nodes))


def check_cluster(config: RunConfig, nodes: Sequence[Node], acts: bool, learns: bool, simulates: bool, private: bool) -> None:
    """ConfigError when inference (for a command that ``acts``), the learner (for one that ``learns``) or the simulators (for one that
    ``simulates``) ask for labels or GPUs that none of ``nodes`` has, free or taken.

    A ``private`` Ray counts devices that torch may not be able to use.
    """
    if private and any(node.gpus for node in nodes) and (acts or learns) and not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        said = "is not set" if visible is None else f"is {visible!r}"
        raise ConfigError(f"Ray counts {sum(node.gpus for node in nodes):g} GPUs, of which torch can use none (CUDA_VISIBLE_DEVICES "
                          f"{said}): mend the driver or the variable, or set CUDA_VISIBLE_DEVICES to an empty text to run on the CPU")
    learner = config.learner
    pool = [pool_ask(config)] if acts else []
    ranks = [learner_ask(learner)] if learns else []
    for ask in [*pool, *ranks, *([workers_ask(config, config.rollout.workers)] if simulates else [])]:
        _check_labels(ask, nodes)
    for ask in pool:
        _check_gpus(ask, "inference.actors", nodes)
    for ask in ranks:
        _check_gpus(ask, "learner.world_size", nodes)
        if learner.accelerate == "graphs" and not any(node.gpus for node in nodes if node.matches(ask.selector)):
            raise ConfigError("learner.accelerate = 'graphs' needs a GPU for every learner rank, and Ray has no GPU: set "
                              "learner.accelerate to 'none'")
        _check_beside(config, [*pool, ask], nodes)


def check_own_gpu(config: RunConfig) -> None:
    """ConfigError when inference asks for a GPU and this process, which acts without Ray, can use none."""
    if config.inference.gpus and not torch.cuda.is_available():
        raise ConfigError(f"inference.gpus = {config.inference.gpus:g} asks for a GPU, and torch can use none here: set inference.gpus to "
                          "0 to act on the CPU" + (" and inference.accelerate to 'none'" if config.inference.accelerate != "none" else ""))


def _check_labels(ask: Ask, nodes: Sequence[Node]) -> None:
    if any(node.matches(ask.selector) for node in nodes):
        return
    name, wanted = f"{ask.section}.nodes", ",".join(f"{key}={value}" for key, value in ask.selector.items())
    known = sorted({f"{key}={value}" for node in nodes for key, value in node.labels.items() if key in ask.selector})
    there = f"they have {', '.join(known)}" if known else f"none has a label {' or '.join(ask.selector)}"
    raise ConfigError(f"{name} = {wanted!r} fits none of the cluster's {len(nodes)} nodes, {there}: give a node these labels "
                      f"(`ray start --labels {wanted}`), or change {name}")


def _check_gpus(ask: Ask, number: str, nodes: Sequence[Node]) -> None:
    gpus = [node.gpus for node in nodes if node.matches(ask.selector)]
    total, largest = sum(gpus), max(gpus, default=0.0)
    if not ask.gpus or ask.gpus * ask.count <= total + 1e-6 and ask.gpus <= largest + 1e-6:
        return
    there = f"Ray has {total:g}" + (f", at most {largest:g} on one machine" if total > largest else "")
    todo = f"lower {ask.section}.gpus or {number}" if total else f"set {ask.section}.gpus to 0 to run on the CPU"
    raise ConfigError(f"{ask.section}.gpus = {ask.gpus:g} for {ask.count} {ask.who} asks for {ask.gpus * ask.count:g} GPUs, {there}: "
                      f"{todo}")


def _check_beside(config: RunConfig, asks: Sequence[Ask], nodes: Sequence[Node]) -> None:
    """Whether the learner, the last of ``asks``, has GPUs beside the pool when nobody else has any."""
    places, inference = Places(), config.inference
    places.see(dataclasses.replace(node, cpus=10.0**6, free_cpus=10.0**6, free_gpus=node.gpus) for node in nodes)
    places.reserve(asks)
    if len(places.placed(asks[-1])) < asks[-1].count:
        raise ConfigError(f"{sum(node.gpus for node in nodes):g} GPUs are too few for {inference.actors} inference actors with "
                          f"inference.gpus = {inference.gpus:g} and {asks[-1].count} learner ranks: lower inference.gpus (0.25, say) or "
                          "set learner.gpus")
