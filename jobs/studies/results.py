"""The files of results that several studies write: the settings behind each entry, and one writer at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from cosmos_ray.config import RunConfig
from cosmos_ray.config.settings import PER_COMMAND, SETTINGS, format_value, given, value_of
from cosmos_ray.config.upgrade import OLD_NAMES
from cosmos_ray.errors import ConfigError
from cosmos_ray.replay.files.durable import replace

#: Settings that change no result except by rounding, or by which rollout ends first. They may differ between the runs of one study.
NO_RESULT = (*PER_COMMAND, "learner.threads", "learner.loader_threads", "learner.gpus", "learner.zero_stage",
             "learner.accelerate", "inference.actors", "inference.gpus",
             "inference.threads", "inference.max_actors", "rollout.workers", "rollout.envs_per_worker")


def differences(one: RunConfig, other: RunConfig) -> dict[str, tuple[str, str]]:
    """Settings in which the results of two runs differ, by name, as texts. Precision "auto" is what it means on the run's device."""
    configs = [_resolved(config) for config in (one, other)]
    values = {name: [format_value(value_of(config, name)) for config in configs] for name in SETTINGS if name not in NO_RESULT}
    return {name: (theirs, ours) for name, (theirs, ours) in values.items() if theirs != ours}


def settings_of(main: RunConfig) -> dict[str, str]:
    """What a study sets, by name, except its seed. A setting that only follows another one is left out."""
    own = {*given(main), "inference.precision"}
    return {name: ours for name, (_, ours) in differences(RunConfig(seed=main.seed), main).items() if name in own}


def _resolved(config: RunConfig) -> RunConfig:
    inference = config.inference
    if inference.precision == "auto":
        inference = dataclasses.replace(inference, precision="bf16" if inference.gpus else "fp32")
    return dataclasses.replace(config, inference=inference)


def read_results(file: Path) -> dict[str, dict]:
    """The entries of a file of results; none while there is no file. ConfigError when the file holds something else."""
    try:
        results = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read the results in {file}: {error}; mend it, or give another --to") from error
    if not isinstance(results, dict):
        raise ConfigError(f"{file} is not a file of results: give another --to")
    return results


@contextlib.contextmanager
def changing(file: Path) -> Iterator[dict[str, dict]]:
    """The entries of a file of results, to change. They are written at the end, and no other study writes meanwhile."""
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        results = read_results(file)
        yield results
        replace((json.dumps(results, indent=1) + "\n").encode(), file)
    finally:
        os.close(folder)


def by_seed(results: dict[str, dict], name: str, part: str, settings: dict[str, str], file: Path) -> dict[int, dict]:
    """``part`` of the entry ``name``, by training seed, to be joined with the same part of other seeds.

    ConfigError when the entry lacks the part, which an older version did not write, or when it has other settings: the part would be lost,
    or would pass for a result of these settings. Names that settings had before are read.
    """
    if name not in results:
        return {}
    entry = results[name]
    if part not in entry:
        raise ConfigError(f"{name} in {file} is of an older version, which did not keep its {part}: give another --to, or move the file "
                          "aside")
    studied = {OLD_NAMES.get(key, key): value for key, value in entry["settings"].items()}
    for key in sorted(studied.keys() | settings.keys()):
        theirs, ours = (values.get(key, "its default") for values in (studied, settings))
        if theirs != ours:
            raise ConfigError(f"{name} in {file} was studied with {key} = {theirs}, not {ours}: give another --to")
    return {int(seed): values for seed, values in entry[part].items()}
