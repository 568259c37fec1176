"""The public dataset statistics: per-dimension ranges of actions and proprioception as JSON (method 1.3)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_ray import released
from cosmos_ray.errors import CheckpointError
from cosmos_ray.model.exchange.files import replacing, stand_in
from cosmos_ray.model.injection import CONSTANT

GROUPS = ("actions", "proprio")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Ranges that actions and proprioception are normalised by."""

    actions_low: np.ndarray  #: (d,) float32
    actions_high: np.ndarray  #: (d,) float32
    proprio_low: np.ndarray  #: (p,) float32
    proprio_high: np.ndarray  #: (p,) float32
    raw: dict[str, Any] = field(default_factory=dict)  #: everything in the file: mean, std, median and what else it holds

    @property
    def constant(self) -> list[str]:
        """Dimensions that never change, such as ``proprio[3]``: the public code divides by zero there."""
        ranges = {"actions": (self.actions_low, self.actions_high), "proprio": (self.proprio_low, self.proprio_high)}
        return [f"{group}[{i}]" for group, (low, high) in ranges.items() for i in np.flatnonzero(high - low < CONSTANT)]


def read_statistics(path: str | Path) -> Statistics:
    """Read a ``*_dataset_statistics.json``, or the one in a folder. CheckpointError names the file and the key that is missing or makes no
    sense; it also refuses the statistics of data that are normalised already."""
    path = released.statistics(path)
    try:
        if why := stand_in(path):
            raise CheckpointError(f"{path} {why}")
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"cannot read the dataset statistics {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}): copy it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, no dataset statistics: check the path")
    ranges: dict[str, np.ndarray] = {}
    for group in GROUPS:
        low, high = (_vector(raw, f"{group}_{end}", path) for end in ("min", "max"))
        for key in (f"{group}_{name}" for name in ("max", "mean", "std", "median")):
            if key in raw and len(_vector(raw, key, path)) != len(low):
                raise CheckpointError(f"{path}: {key} has {len(raw[key])} numbers, {group}_min {len(low)}: they must be of one robot")
        if (low > high).any():
            i = int(np.argmax(low > high))
            raise CheckpointError(f"{path}: {group}_min[{i}] = {low[i]:g} exceeds {group}_max[{i}] = {high[i]:g}: compute them again")
        ranges |= {f"{group}_low": low, f"{group}_high": high}
    if all(np.allclose(ranges[f"{group}_{end}"], bound, atol=1e-3) for group in GROUPS for end, bound in (("low", -1), ("high", 1))):
        raise CheckpointError(f"{path} has -1 and 1 as every minimum and maximum: it describes data after normalisation (the public code's "
                              "*_post_norm.json); give the dataset statistics from before")
    return Statistics(**ranges, raw=raw)


def write_statistics(statistics: Statistics, path: str | Path, overwrite: bool = False) -> None:
    """Write the ranges, and beside them whatever else ``raw`` holds, under the public keys."""
    record = {**statistics.raw, "actions_min": _shortest(statistics.actions_low), "actions_max": _shortest(statistics.actions_high),
              "proprio_min": _shortest(statistics.proprio_low), "proprio_max": _shortest(statistics.proprio_high)}
    with replacing(path, overwrite) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def _vector(raw: Mapping[str, Any], key: str, path: str | Path) -> np.ndarray:
    """The finite numbers under ``key``, (n,) float32."""
    if key not in raw:
        raise CheckpointError(f"{path}: {key} is missing, it has {', '.join(map(repr, list(raw)[:4])) or 'nothing'}: give the release's "
                              "*_dataset_statistics.json, with actions_min, actions_max, proprio_min and proprio_max")
    held = raw[key]
    if not isinstance(held, list) or not held or not all(type(x) in (int, float) for x in held):
        raise CheckpointError(f"{path}: {key} is no list of numbers, one per dimension: compute it again")
    for i, x in enumerate(held):
        if not abs(x) <= np.finfo(np.float32).max:
            raise CheckpointError(f"{path}: {key}[{i}] is not finite: compute the statistics again")
    return np.array(held, np.float32)


def _shortest(vector: np.ndarray) -> list[float]:
    """The shortest decimals that read back as the same float32 numbers."""
    return [float(str(x)) for x in np.asarray(vector, np.float32)]
