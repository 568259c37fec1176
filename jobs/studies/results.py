"""Files of results that several studies write: with which settings each entry was made, and one writer at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from cosmos_ray.config import RunConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.replay.files.durable import replace
from cosmos_ray.settings import FIELDS, PER_COMMAND, format_value, value_of
from cosmos_ray.uri import without_credentials

#: Settings that change no result but by rounding, and which rollout ends first: they may differ between the runs of one study.
NO_RESULT = (*PER_COMMAND, "learner.threads", "learner.loader_threads", "learner.gpus", "learner.zero_stage",
             "learner.accelerate", "inference.actors", "inference.gpus",
             "inference.threads", "rollout.workers", "rollout.envs_per_worker")


def differences(one: RunConfig, other: RunConfig) -> dict[str, tuple[str, str]]:
    """Settings in which the results of two runs differ, by name, as texts without credentials. Precision "auto" is what it means there."""
    configs = [_resolved(config) for config in (one, other)]
    values = {name: [without_credentials(format_value(value_of(config, name))) for config in configs]
              for name in FIELDS if name not in NO_RESULT}
    return {name: (theirs, ours) for name, (theirs, ours) in values.items() if theirs != ours}


def settings_of(main: RunConfig) -> dict[str, str]:
    """What a study sets, by name, its task and seed aside."""
    return {name: ours for name, (_, ours) in differences(RunConfig(seed=main.seed), main).items()}


def _resolved(config: RunConfig) -> RunConfig:
    inference = config.inference
    if inference.precision == "auto":
        inference = dataclasses.replace(inference, precision="bf16" if inference.gpus else "fp32")
    return dataclasses.replace(config, inference=inference)


def read_results(file: Path) -> dict[str, dict]:
    """The entries of a file of results, none while there is no file. ConfigError when it is not one."""
    try:
        results = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read the results in {file}: {error}; mend it, or give another --to") from error
    if not isinstance(results, dict):
        raise ConfigError(f"{file} is not a file of results: give another --to")
    return results


@contextlib.contextmanager
def changing(file: Path) -> Iterator[dict[str, dict]]:
    """The entries of a file of results, to be changed and then written, while no other study changes them."""
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        results = read_results(file)
        yield results
        replace((json.dumps(results, indent=1) + "\n").encode(), file)
    finally:
        os.close(folder)


def by_seed(results: dict[str, dict], name: str, part: str, settings: dict[str, str], file: Path) -> dict[int, dict]:
    """``part`` of the entry ``name``, by training seed, to be joined with that of others. ConfigError when it has no such part, which an
    older version has written, or is of other settings: it would be lost, or be taken for what these settings give."""
    if name not in results:
        return {}
    entry = results[name]
    if part not in entry:
        raise ConfigError(f"{name} in {file} is of an older version, which did not keep its {part}: give another --to, or move it aside")
    for key in sorted(entry["settings"].keys() | settings.keys()):
        theirs, ours = (values.get(key, "its default") for values in (entry["settings"], settings))
        if theirs != ours:
            raise ConfigError(f"{name} in {file} was studied with {key} = {theirs}, not {ours}: give another --to")
    return {int(seed): values for seed, values in entry[part].items()}
