"""Reading the settings of runs that earlier versions made: old names, and old values that stood for another value.

``config.json`` has a ``format``. Format 2 holds resolved values under the present names. The files before it have no ``format`` and hold
what a user had given: there 0, -1, "" or "auto" meant the preset's, the task's or another setting's value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosmos_ray.config.presets import preset_settings
from cosmos_ray.config.run import RunConfig
from cosmos_ray.config.settings import flat, from_values, new_config, values_of_tree
from cosmos_ray.errors import ConfigError

FORMAT = 2  #: of the config.json that this version writes

#: Where the config.json of an earlier version is kept once this version has written its own.
BEFORE = "config.before.json"

#: Settings that had another name: {then: now}.
OLD_NAMES = {"planner.value": "planner.rank_by", "planner.values": "planner.value_samples",
             "learner.advantage": "learner.advantage_temperature", "learner.base_value": "learner.base_value_mode", "verify": "repeat"}

#: What stood for "the preset's", "the task's own" or "as another setting" in format 1, by the present name. Each was the default.
STOOD_FOR = {
    "sim.actions": "auto", "sim.horizon": 0,
    "model.output": "auto", "model.width": 0, "model.layers": 0, "model.heads": 0, "model.patch": 0, "model.sigma_frame_scale": "auto",
    "model.residual": "auto", "model.top_share": -1.0, "model.imagined_share": -1.0, "model.sigma_min": 0.0, "model.action_weight": 0.0,
    "model.value_weight": 0.0, "model.world_weight": 0.0, "model.augment": "auto",
    "learner.refine_warmup": 0, "learner.refine_cycle": 0, "learner.refine_mix": [], "learner.planning_world_weight": 0.0,
    "learner.base_value_mode": "",
    "rollout.execute": 0, "rollout.horizon": 0,
}

#: Values that name another arithmetic since ``model.fidelity`` came, and the name of the one that they meant.
OTHERWISE_CALLED = {("learner.schedule", "paper"): "paper_before", ("planner.aggregate", "lcb"): "lcb_population"}

#: Settings that were "on" or "off".
SWITCHES = ("model.sigma_frame_scale", "model.residual", "model.augment")


def is_before(tree: dict[str, Any]) -> bool:
    """Whether a config.json is of format 1, which an earlier version wrote."""
    return "format" not in tree


def read_config(path: Path, tree: dict[str, Any]) -> RunConfig:
    """The config of a run from its ``config.json``, of this format or the one before, every value resolved by the rule of then.

    ConfigError names ``path`` when the file holds an unknown setting, a value of a wrong type, or is of a newer format.
    """
    if is_before(tree):
        return _read_before(path, tree)
    if tree["format"] != FORMAT:
        raise ConfigError(f"{path} is of format {tree['format']!r}, this version reads up to {FORMAT}: use the version that made the run")
    values = values_of_tree(path, {key: value for key, value in tree.items() if key != "format"}, {})
    return new_config({"sim.quality": "fast", **_as_before(values)})  # a setting that the file lacks came later


def _read_before(path: Path, tree: dict[str, Any]) -> RunConfig:
    values = {OLD_NAMES.get(name, name): value for name, value in flat(tree).items()}
    values = {name: value for name, value in values.items() if name not in STOOD_FOR or value != STOOD_FOR[name]}
    values |= {name: value == "on" for name, value in values.items() if name in SWITCHES and value in ("on", "off")}
    values = values_of_tree(path, values, {})
    # The preset decided the model's values and this one. All else was stored, or had its default.
    mix = preset_settings(str(values.get("model.preset", "tiny")), "")["learner.refine_mix"]
    return from_values(_as_before({"learner.refine_mix": mix, **values}))


def _as_before(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` of a run from before ``model.fidelity``, with what acted then: our own fidelity, a network that sees frames as they are
    rendered, and the arithmetic that has another name now."""
    if "model.fidelity" in values:
        return values
    renamed = {name: now for (name, then), now in OTHERWISE_CALLED.items() if values.get(name) == then}
    return {"model.fidelity": "ours", "model.image_size": values.get("sim.image_size", 64), **values, **renamed}
