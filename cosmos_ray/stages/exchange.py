"""`import` a policy that others trained as a run's base policy, and `export` one of a run's for others."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from cosmos_ray.errors import ConfigError
from cosmos_ray.model.checkpoint import load_net, load_policy, read_description, save_policy
from cosmos_ray.model.exchange import diffusers_config, write_weights
from cosmos_ray.model.exchange.statistics import Statistics, read_statistics, write_statistics
from cosmos_ray.model.policy import build
from cosmos_ray.model.spec import make_spec
from cosmos_ray.model.suites import SUITES
from cosmos_ray.run import Run


def import_policy(run: Run, weights: str, statistics: str) -> dict:
    """Make the weights in ``weights``, normalised by a dataset statistics JSON, the run's base policy.

    Takes every format of ``model.exchange``. The weights must fit the configured model (preset, suite, dimensions) as a whole.
    ``pretrain`` on the run then fine-tunes them. ConfigError when the run has a base policy already.
    """
    config, folder = run.config, run.folder
    base, initial = folder.checkpoint("base"), folder.checkpoint("initial")
    if base.exists() or folder.learner_state("base").exists():  # `pretrain` would go on from that state, not from these weights
        raise ConfigError(f"run {config.name!r} has a base policy already: give another --name, or --fresh to move the run aside")
    cameras, ranges = _cameras(run), read_statistics(statistics)
    _check_ranges(run, ranges, statistics)
    spec = make_spec(config.model, cameras, config.sim.image_size, len(ranges.actions_low), len(ranges.proprio_low))
    policy = build(spec, seed=None)
    load_net(policy, weights, dtype=None)
    policy.set_statistics(ranges.actions_low, ranges.actions_high, ranges.proprio_low, ranges.proprio_high)
    info = {"stage": "import", "step": 0, "weights": str(weights), "statistics": ranges.raw}
    save_policy(policy, initial, folder.next_version(), info)  # first: `pretrain` makes a random one where there is none
    unfinished = base.with_name(f".{base.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(initial, unfinished, copy_function=os.link)
    unfinished.rename(base)
    return {"parameters": sum(p.numel() for p in policy.net.parameters()), "constant": ranges.constant, "path": base}


def _cameras(run: Run) -> tuple[str, ...]:
    """The simulated cameras in latent order. ConfigError when the suite has another number of them."""
    sim, suite = run.config.sim, SUITES.get(run.config.model.suite)
    if suite and (len(suite.wrist_cameras), len(suite.third_cameras)) != (len(sim.wrist_cameras), len(sim.third_cameras)):
        raise ConfigError(f"suite {run.config.model.suite!r} sees {len(suite.wrist_cameras)} wrist and {len(suite.third_cameras)} "
                          f"third-person cameras, the simulation has {len(sim.wrist_cameras)} and {len(sim.third_cameras)}: name as many "
                          "with --sim.wrist-cameras and --sim.third-cameras, in the suite's order")
    return sim.cameras


def _check_ranges(run: Run, ranges: Statistics, path: str) -> None:
    """ConfigError when the suite has other numbers of actions and proprioception than the statistics."""
    suite = SUITES.get(run.config.model.suite)
    theirs = len(ranges.actions_low), len(ranges.proprio_low)
    if suite and theirs != (suite.action_dim, suite.proprio_dim):
        raise ConfigError(f"{path} is of {theirs[0]} numbers per action and {theirs[1]} of proprioception, suite "
                          f"{run.config.model.suite!r} has {suite.action_dim} and {suite.proprio_dim}: give that suite's statistics, or "
                          "another --model.suite")


def export_policy(run: Run, checkpoint: str, format: str, to: str, overwrite: bool) -> list[Path]:
    """Write a run's policy in another project's format, with its dataset statistics JSON beside it; returns both paths."""
    source, target = run.folder.checkpoint(checkpoint), Path(to)
    beside = target.with_name(f"{target.stem}_dataset_statistics.json")
    if beside.exists() and not overwrite:
        raise ConfigError(f"{beside} exists: give another --to, or --overwrite")
    policy, _ = load_policy(source, dtype=None)
    config = dataclasses.asdict(policy.spec.transformer)
    del config["bf16_timestep"]
    write_weights(policy.net.state_dict(), target, format, diffusers_config(**config), overwrite)
    raw = read_description(run.folder.checkpoint("initial"))[2].get("statistics", {})
    ranges = Statistics(*(t.numpy() for t in (policy.action_low, policy.action_high, policy.proprio_low, policy.proprio_high)), raw=raw)
    write_statistics(ranges, beside, overwrite)
    return [target, beside]
