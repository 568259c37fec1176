"""`import` makes a released policy a run's base policy or planning network; `export` writes a run's policy in another project's format."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cosmos_ray.config.suites import SUITES, check_sizes
from cosmos_ray.errors import CheckpointError, ConfigError
from cosmos_ray.model.checkpoint import copy_checkpoint, load_checkpoint, load_released, read_description, save_policy
from cosmos_ray.model.exchange import diffusers_config, write_weights
from cosmos_ray.model.exchange.statistics import Statistics, read_statistics, write_statistics
from cosmos_ray.model.exchange.text_embeddings import write_text_embeddings
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.spec import make_spec
from cosmos_ray.model.text import T5Text
from cosmos_ray.model.tokenizer import PatchPCA
from cosmos_ray.run import Run
from cosmos_ray.stages.acting import IMPORTED_PLANNING, asked_policy

#: What `import --as` makes of the weights: the checkpoint that stays as it was imported, the one that acts and trains on, and its name.
IMPORTED = {"base": ("initial", "base", "base policy"), "planning": (IMPORTED_PLANNING, "planning", "planning network")}


def import_policy(run: Run, weights: str, statistics: str, role: str = "base") -> dict:
    """Make the weights in ``weights`` the run's base policy or, for ``role`` "planning", its planning network.

    The network is normalised by the dataset statistics JSON that comes with it. Reads every format of ``model.exchange``. All weights must
    fit the configured model (preset, suite, dimensions). `pretrain` then fine-tunes the base policy, and `refine` with ``planning_steps``
    the planning network. The two imports may come in either order.

    ConfigError when a file cannot be read or does not fit, when the run already has such a network, and when base policy and
    planning network do not fit each other.
    """
    config, folder = run.config, run.folder
    kept, acting, what = IMPORTED[role]
    kept_path, path = folder.checkpoint(kept), folder.checkpoint(acting)
    # `pretrain` and `refine` would go on from the learner's state, not from these weights.
    if path.exists() or any(name.startswith(acting) for name in folder.learner_states()):
        raise ConfigError(f"run {config.name!r} has a {what} already: give another --name, or --fresh to move the run aside")
    cameras = _cameras(run)
    try:
        ranges = read_statistics(statistics)
        check_sizes(config.model.suite, len(ranges.actions_low), len(ranges.proprio_low), statistics)
        spec = make_spec(config.model, cameras, len(ranges.actions_low), len(ranges.proprio_low))
        policy = load_released(spec, weights, ranges)
    except CheckpointError as error:  # of the files that were given, so the command line leaves with code 2
        raise ConfigError(str(error)) from error
    for sim in config.sim.each() if os.path.isdir(spec.text_path) else ():
        policy.text(sim.instruction)  # embedded here once, the checkpoint carries it to every actor
    for other_kept, _, other in IMPORTED.values():
        if other_kept != kept and folder.has_policy(other_kept):
            _check_partner(policy, folder.checkpoint(other_kept), f"the run's {other}", str(weights))
    info = {"stage": "import", "step": 0, "weights": str(weights), "statistics": ranges.raw}
    save_policy(policy, kept_path, folder.next_version(), info)  # first: `pretrain` makes a random one where there is none
    copy_checkpoint(kept_path, path, overwrite=False)
    return {"parameters": sum(p.numel() for p in policy.net.parameters()), "constant": ranges.constant, "path": path, "what": what}


def _check_partner(policy: CosmosPolicy, other: Path, whose: str, where: str) -> None:
    """ConfigError when a network cannot judge what another one proposes: one acts, the latents that it generates go to the other."""
    theirs = read_description(other)[0]
    if name := policy.spec.unlike(theirs):
        raise ConfigError(f"{where} and {whose} differ in {name}: {getattr(policy.spec, name)} and {getattr(theirs, name)}; import "
                          "networks of one robot and suite")
    if not isinstance(policy.tokenizer, PatchPCA):
        return
    fits = zip(*(tokenizer.state_dict().values() for tokenizer in (policy.tokenizer, load_checkpoint(other)[0].tokenizer)), strict=True)
    if not all(torch.equal(here, there) for here, there in fits):
        raise ConfigError(f"{where} and {whose} have tokenizers fitted on different frames: one's latents mean nothing to the other; train "
                          "both from one initial policy")


def _cameras(run: Run) -> tuple[str, ...]:
    """The simulated cameras in latent order. ConfigError when the suite has more or fewer cameras."""
    sim, suite = run.config.sim, SUITES.get(run.config.model.suite)
    if suite and (len(suite.wrist_cameras), len(suite.third_cameras)) != (len(sim.wrist_cameras), len(sim.third_cameras)):
        raise ConfigError(f"suite {run.config.model.suite!r} sees {len(suite.wrist_cameras)} wrist and {len(suite.third_cameras)} "
                          f"third-person cameras, the simulation has {len(sim.wrist_cameras)} and {len(sim.third_cameras)}: name as many "
                          "with --sim.wrist-cameras and --sim.third-cameras, in the suite's order")
    return sim.cameras


def export_policy(run: Run, checkpoint: str | None, number: int | None, format: str, to: str, overwrite: bool) -> list[Path]:
    """Write a run's policy in another project's format, its dataset statistics and text embeddings beside it; returns the paths.

    ``checkpoint`` None takes the refined policy, or the base policy while there is none; ``number`` asks for the networks of a round.
    """
    target = Path(to)
    checkpoint, source = asked_policy(run, checkpoint, number)
    statistics, texts = (target.with_name(f"{target.stem}_{what}") for what in ("dataset_statistics.json", "t5_embeddings.safetensors"))
    for beside in (statistics, texts):
        if beside.exists() and not overwrite:
            raise ConfigError(f"{beside} exists: give another --to, or --overwrite")
    policy, _ = load_checkpoint(source, dtype=None)
    config = diffusers_config(**policy.spec.transformer.diffusers_dimensions())
    write_weights(policy.net.state_dict(), target, format, config, overwrite)
    imported = IMPORTED_PLANNING if checkpoint == "planning" and run.folder.has_policy(IMPORTED_PLANNING) else "initial"
    raw = read_description(run.folder.checkpoint(imported))[2].get("statistics", {})
    ranges = Statistics(*(t.numpy() for t in (policy.action_low, policy.action_high, policy.proprio_low, policy.proprio_high)), raw=raw)
    write_statistics(ranges, statistics, overwrite)
    if not isinstance(policy.text, T5Text):
        return [target, statistics]
    write_text_embeddings(policy.text.embeddings, texts, overwrite)
    return [target, statistics, texts]
