"""Whether two runs give the same results: the settings in which they differ."""

from __future__ import annotations

import dataclasses

from cosmos_ray.config.run import RunConfig
from cosmos_ray.config.settings import PER_COMMAND, SETTINGS, format_value, given, value_of

#: Settings that change no result except by rounding, or by which rollout ends first. They may differ between the runs of one study.
NO_RESULT = (*PER_COMMAND, "learner.threads", "learner.loader_threads", "learner.gpus", "learner.zero_stage",
             "learner.accelerate", "inference.actors", "inference.gpus",
             "inference.threads", "inference.max_actors", "rollout.workers", "rollout.envs_per_worker")


def differences(one: RunConfig, other: RunConfig) -> dict[str, tuple[str, str]]:
    """Settings in which the results of two runs differ, by name, as texts. Precision "auto" is what it means on the run's device."""
    configs = [_resolved(config) for config in (one, other)]
    values = {name: [format_value(value_of(config, name)) for config in configs] for name in SETTINGS if name not in NO_RESULT}
    return {name: (theirs, ours) for name, (theirs, ours) in values.items() if theirs != ours}


def own_settings(config: RunConfig) -> dict[str, str]:
    """What a run sets, by name, except its seed. A setting that only follows another one is left out."""
    own = {*given(config), "inference.precision"}
    return {name: ours for name, (_, ours) in differences(RunConfig(seed=config.seed), config).items() if name in own}


def _resolved(config: RunConfig) -> RunConfig:
    inference = config.inference
    if inference.precision == "auto":
        inference = dataclasses.replace(inference, precision="bf16" if inference.gpus else "fp32")
    return dataclasses.replace(config, inference=inference)
