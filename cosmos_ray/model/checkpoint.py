"""A policy on disk: ``model.safetensors``, ``policy.json`` and, with T5, ``text.safetensors``; never half-written, never a pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from cosmos_ray import released
from cosmos_ray.caches import working_copy_at
from cosmos_ray.errors import CheckpointError, ConfigError
from cosmos_ray.model.exchange import diffusers_config, match, read_weights
from cosmos_ray.model.exchange.diffusers_folder import CONFIG, read_diffusers
from cosmos_ray.model.exchange.files import read_safetensors, replacing, save_safetensors
from cosmos_ray.model.exchange.statistics import Statistics
from cosmos_ray.model.exchange.text_embeddings import read_text_embeddings, write_text_embeddings
from cosmos_ray.model.policy import CosmosPolicy, build
from cosmos_ray.model.spec import PolicySpec
from cosmos_ray.model.text import T5Text
from cosmos_ray.model.tokenizer import PatchPCA
from cosmos_ray.model.transformer import TransformerConfig


def save_policy(policy: CosmosPolicy, path: str | Path, version: int, info: dict | None = None,
                net: Iterable[tuple[str, torch.Tensor]] | None = None) -> None:
    """Write weights, normalisation and description to the directory ``path``.

    An existing checkpoint is replaced by two renames: a crash between them leaves it under ``.NAME.PID.old``.

    ``version`` is the policy version of the weights. ``info`` is free-form JSON (steps, losses). ``net`` are (name, tensor) pairs that
    replace the parameters of ``policy.net`` in the file, for instance their average.
    """
    own = {k: v for k, v in _own(policy).items() if not k.startswith("net.")}
    own.update({f"net.{k}": v for k, v in net or policy.net.named_parameters()})
    with replacing(path, overwrite=True) as folder:
        folder.mkdir()
        save_safetensors(own, folder / "model.safetensors")
        if isinstance(policy.text, T5Text) and policy.text.embeddings:
            write_text_embeddings(policy.text.embeddings, folder / "text.safetensors")
        record = {"spec": policy.spec.to_json(), "version": version, "info": info or {}}
        (folder / "policy.json").write_text(json.dumps(record, indent=1))


def copy_checkpoint(source: Path, target: Path, overwrite: bool = True) -> None:
    """A checkpoint under a second name, whole or not at all. CheckpointError when there is one already and ``overwrite`` is off."""
    with replacing(target, overwrite) as unfinished:
        shutil.copytree(source, unfinished, copy_function=_link)


def copy_checkpoints(sources: dict[str, Path], target: Path) -> None:
    """Checkpoints under the names of ``sources`` in the new folder ``target``, all of them or none. CheckpointError when ``target``
    exists."""
    with replacing(target, overwrite=False) as unfinished:
        for name, source in sources.items():
            shutil.copytree(source, unfinished / name, copy_function=_link)


def _link(source: str, target: str) -> None:
    """A hard link to a file, or a copy where the file system has no links. Checkpoints are replaced, never written to."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_description(path: str | Path) -> tuple[PolicySpec, int, dict]:
    """(spec, version, info) of a checkpoint directory. CheckpointError when there is none or it cannot be read."""
    file = Path(path) / "policy.json"
    try:
        record = json.loads(file.read_text())
        return PolicySpec.from_json(record["spec"]), int(record["version"]), record["info"]
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint in {path}: policy.json is missing (run `pretrain` first, or give another path)") from error
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is not a cosmos_ray policy description: {error}") from error


def load_checkpoint(path: str | Path, dtype: torch.dtype | None = torch.float32) -> tuple[CosmosPolicy, int]:
    """Load (policy, version), the network in ``dtype``; None keeps the stored dtype.

    A missing, truncated or mismatched checkpoint raises CheckpointError with the first offending key.
    """
    if working_copy_at(path) is not None:
        from cosmos_ray.replay.files.working_copy import fetched  # with libraries that a policy alone does without

        fetched(path)
    spec, version, _ = read_description(path)
    file, text = Path(path) / "model.safetensors", Path(path) / "text.safetensors"
    tensors = read_safetensors(file)
    policy = build(spec, seed=None, embeddings=read_text_embeddings(text) if text.exists() else None)
    match(tensors, {k: v.shape for k, v in _own(policy).items()}, str(file))
    _assign(policy, {k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")}, dtype)
    policy.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("net.")}, strict=False)
    return policy.eval(), version


def load_net(policy: CosmosPolicy, path: str | Path, dtype: torch.dtype | None = torch.float32) -> None:
    """Load the network's weights alone, from a checkpoint directory or any file or folder that ``read_weights`` reads.

    The network may have no memory yet. It gets ``dtype``; None keeps the stored dtype. CheckpointError names the first key that does not
    fit.
    """
    path = released.weights(path)
    if (path / "policy.json").exists():
        net = load_checkpoint(path, dtype)[0].net.state_dict()
    else:
        net = read_weights(path)
        if path.is_dir():
            _check_diffusers(path, policy.spec.transformer)
    match(net, {k: v.shape for k, v in policy.net.state_dict().items()}, str(path))
    _assign(policy, net, dtype)


def load_released(spec: PolicySpec, weights: str | Path, statistics: Statistics) -> CosmosPolicy:
    """The policy of ``spec`` with released ``weights``, in their dtype, normalised by the dataset ``statistics`` beside them.

    ``weights`` as for :func:`load_net`. ConfigError where the tokenizer is fitted on frames and ``weights`` is no checkpoint directory,
    which alone holds the fit.
    """
    policy = build(spec, seed=None)
    if isinstance(policy.tokenizer, PatchPCA):
        if not (Path(weights) / "policy.json").exists():
            raise ConfigError(f"{weights} holds no tokenizer, and preset {spec.preset!r} fits its own on demonstrations: give a checkpoint "
                              "folder of a run, or the weights to `pretrain` as --init")
        policy.tokenizer.load_state_dict(load_checkpoint(weights)[0].tokenizer.state_dict())
    load_net(policy, weights, dtype=None)
    policy.set_statistics(statistics.actions_low, statistics.actions_high, statistics.proprio_low, statistics.proprio_high)
    return policy.eval()


def _check_diffusers(path: Path, config: TransformerConfig) -> None:
    """Compare what shapes cannot show: rotary positions and heads of a diffusers folder must be the model's."""
    if not any((folder / CONFIG).is_file() for folder in (path, path / "transformer")):
        return
    theirs, ours = read_diffusers(path)[1], diffusers_config(**config.diffusers_dimensions())
    for key in ("num_attention_heads", "rope_scale", "patch_size"):
        if key in theirs and list(np.atleast_1d(theirs[key])) != list(np.atleast_1d(ours[key])):
            raise CheckpointError(f"{path}: {key} is {theirs[key]} in its config.json, the model's is {ours[key]}: choose weights of this "
                                  "model")


def _assign(policy: CosmosPolicy, net: dict[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    """Make ``net`` the network's parameters. Only a change of dtype copies."""
    policy.net.load_state_dict({k: v.to(dtype or v.dtype) for k, v in net.items()}, assign=True)
    policy.net.requires_grad_(True)  # assigned tensors come without


def _own(policy: CosmosPolicy) -> dict[str, torch.Tensor]:
    """The state of a checkpoint: everything but the VAE, which stays in its own folder."""
    return {k: v for k, v in policy.state_dict().items() if not k.startswith("tokenizer.vae.")}
