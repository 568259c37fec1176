"""`import` makes a released policy a run's base policy; `export` writes a run's policy in another project's format."""

from __future__ import annotations

import os
from pathlib import Path

from cosmos_ray.config.suites import SUITES
from cosmos_ray.errors import ConfigError
from cosmos_ray.model.checkpoint import copy_checkpoint, load_net, load_policy, read_description, save_policy
from cosmos_ray.model.exchange import diffusers_config, write_weights
from cosmos_ray.model.exchange.statistics import Statistics, read_statistics, write_statistics
from cosmos_ray.model.exchange.text_embeddings import write_text_embeddings
from cosmos_ray.model.policy import build
from cosmos_ray.model.spec import make_spec
from cosmos_ray.model.text import T5Text
from cosmos_ray.run import Run
from cosmos_ray.sim import tasks


def import_policy(run: Run, weights: str, statistics: str) -> dict:
    """Make the weights in ``weights`` the run's base policy, with the normalisation of a dataset statistics JSON.

    Reads every format of ``model.exchange``. All weights must fit the configured model (preset, suite, dimensions). ``pretrain`` then
    fine-tunes them. ConfigError when the run already has a base policy.
    """
    config, folder = run.config, run.folder
    base, initial = folder.checkpoint("base"), folder.checkpoint("initial")
    if base.exists() or folder.learner_state("base").exists():  # `pretrain` would go on from that state, not from these weights
        raise ConfigError(f"run {config.name!r} has a base policy already: give another --name, or --fresh to move the run aside")
    cameras, ranges = _cameras(run), read_statistics(statistics)
    _check_ranges(run, ranges, statistics)
    spec = make_spec(config.model, cameras, len(ranges.actions_low), len(ranges.proprio_low))
    policy = build(spec, seed=None)
    load_net(policy, weights, dtype=None)
    policy.set_statistics(ranges.actions_low, ranges.actions_high, ranges.proprio_low, ranges.proprio_high)
    if os.path.isdir(spec.text_path):
        policy.text(tasks.spec(config.sim.task).instruction)  # embedded here once, the checkpoint carries it to every actor
    info = {"stage": "import", "step": 0, "weights": str(weights), "statistics": ranges.raw}
    save_policy(policy, initial, folder.next_version(), info)  # first: `pretrain` makes a random one where there is none
    copy_checkpoint(initial, base, overwrite=False)
    return {"parameters": sum(p.numel() for p in policy.net.parameters()), "constant": ranges.constant, "path": base}


def _cameras(run: Run) -> tuple[str, ...]:
    """The simulated cameras in latent order. ConfigError when the suite has more or fewer cameras."""
    sim, suite = run.config.sim, SUITES.get(run.config.model.suite)
    if suite and (len(suite.wrist_cameras), len(suite.third_cameras)) != (len(sim.wrist_cameras), len(sim.third_cameras)):
        raise ConfigError(f"suite {run.config.model.suite!r} sees {len(suite.wrist_cameras)} wrist and {len(suite.third_cameras)} "
                          f"third-person cameras, the simulation has {len(sim.wrist_cameras)} and {len(sim.third_cameras)}: name as many "
                          "with --sim.wrist-cameras and --sim.third-cameras, in the suite's order")
    return sim.cameras


def _check_ranges(run: Run, ranges: Statistics, path: str) -> None:
    """ConfigError when the suite and the statistics differ in the size of actions or proprioception."""
    suite = SUITES.get(run.config.model.suite)
    theirs = len(ranges.actions_low), len(ranges.proprio_low)
    if suite and theirs != (suite.action_dim, suite.proprio_dim):
        raise ConfigError(f"{path} describes {theirs[0]} numbers per action and {theirs[1]} of proprioception, suite "
                          f"{run.config.model.suite!r} has {suite.action_dim} and {suite.proprio_dim}: give that suite's statistics, or "
                          "another --model.suite")


def export_policy(run: Run, checkpoint: str | None, format: str, to: str, overwrite: bool) -> list[Path]:
    """Write a run's policy in another project's format, its dataset statistics and text embeddings beside it; returns the paths.

    ``checkpoint`` None takes the refined policy, or the base policy while there is none.
    """
    target = Path(to)
    source = run.folder.checkpoint(checkpoint or ("refined" if run.folder.checkpoint("refined").exists() else "base"))
    statistics, texts = (target.with_name(f"{target.stem}_{what}") for what in ("dataset_statistics.json", "t5_embeddings.safetensors"))
    for beside in (statistics, texts):
        if beside.exists() and not overwrite:
            raise ConfigError(f"{beside} exists: give another --to, or --overwrite")
    policy, _ = load_policy(source, dtype=None)
    config = diffusers_config(**policy.spec.transformer.diffusers_dimensions())
    write_weights(policy.net.state_dict(), target, format, config, overwrite)
    raw = read_description(run.folder.checkpoint("initial"))[2].get("statistics", {})
    ranges = Statistics(*(t.numpy() for t in (policy.action_low, policy.action_high, policy.proprio_low, policy.proprio_high)), raw=raw)
    write_statistics(ranges, statistics, overwrite)
    if not isinstance(policy.text, T5Text):
        return [target, statistics]
    write_text_embeddings(policy.text.embeddings, texts, overwrite)
    return [target, statistics, texts]
