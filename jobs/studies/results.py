"""The files of results that several studies write: parts of an entry by training seed."""

from __future__ import annotations

from pathlib import Path

from cosmos_ray.config.alike import differences
from cosmos_ray.config.alike import own_settings as settings_of
from cosmos_ray.config.upgrade import OLD_NAMES
from cosmos_ray.errors import ConfigError
from cosmos_ray.stages.study_results import changing, read_results

__all__ = ["by_seed", "changing", "differences", "read_results", "settings_of"]


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
