"""A policy on disk: ``model.safetensors`` beside ``policy.json``, never half-written. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cosmos_ray.errors import CheckpointError
from cosmos_ray.model.policy import CosmosPolicy, build
from cosmos_ray.model.spec import PolicySpec


def save_policy(policy: CosmosPolicy, path: str | Path, version: int, info: dict | None = None) -> None:
    """Write weights, normalisation and description to the directory ``path``.

    An existing checkpoint is replaced by two renames: a crash between them leaves it under ``.NAME.PID.old``.

    ``version`` is the policy version the weights are published under; ``info`` is free-form JSON (steps, losses).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in policy.state_dict().items() if not k.startswith("tokenizer.vae.")}
    save_file(tensors, temporary / "model.safetensors")
    record = {"spec": policy.spec.to_json(), "version": version, "info": info or {}}
    (temporary / "policy.json").write_text(json.dumps(record, indent=1))
    for name in ("model.safetensors", "policy.json"):
        with open(temporary / name, "rb") as file:
            os.fsync(file.fileno())
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    shutil.rmtree(old, ignore_errors=True)


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


def load_policy(path: str | Path) -> tuple[CosmosPolicy, int]:
    """Load (policy, version). A missing, truncated or mismatched checkpoint raises CheckpointError with the first offending key."""
    spec, version, _ = read_description(path)
    file = Path(path) / "model.safetensors"
    try:
        tensors = load_file(file)
    except (FileNotFoundError, SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read the weights in {file}: {error}") from error
    policy = build(spec)
    load_tensors(policy, tensors, str(file))
    return policy.eval(), version


def load_tensors(policy: CosmosPolicy, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy a complete state dict into ``policy``; CheckpointError names the first missing, extra or misshapen key."""
    own = {k: v for k, v in policy.state_dict().items() if not k.startswith("tokenizer.vae.")}
    for key in sorted(set(own) | set(tensors)):
        if key not in tensors:
            raise CheckpointError(f"{where}: key {key} is missing, the model has it with shape {tuple(own[key].shape)}")
        if key not in own:
            raise CheckpointError(f"{where}: key {key} with shape {tuple(tensors[key].shape)} is unknown to the model")
        if own[key].shape != tensors[key].shape:
            raise CheckpointError(f"{where}: key {key} has shape {tuple(tensors[key].shape)}, the model's is {tuple(own[key].shape)}")
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(tensors[key])
