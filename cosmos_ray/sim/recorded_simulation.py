"""The simulation that recorded an episode, as settings of ours, from what the episode's ``info`` says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cosmos_ray.config import SimConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.replay.format.episode import control_rate
from cosmos_ray.sim import tasks
from cosmos_ray.sim.resimulate import config_from_fingerprint

ENV_ARGS = "env_args"  #: of ``info``: what robomimic's files say of their robosuite environment, its name and its arguments


def recorded_simulation(info: Mapping[str, Any]) -> dict[str, Any]:
    """``{"sim.task": ...}``: the settings that ``info`` decides; cameras and sizes of pictures are not among them.

    Our own episodes have the simulator's fingerprint, robomimic's the arguments of robosuite's ``make``. Empty where there is neither,
    or where robosuite has no task of this name.
    """
    fingerprint, args = info.get("fingerprint"), info.get(ENV_ARGS)
    if isinstance(fingerprint, Mapping) and fingerprint:
        try:
            values = _of_fingerprint({str(key): str(value) for key, value in fingerprint.items()}, info.get("horizon"))
        except ConfigError:
            return {}
    elif isinstance(args, Mapping):
        values = _of_arguments(args)
        if rate := control_rate(dict(info)):
            values["sim.control_freq"] = round(rate)
    else:
        return {}
    return values if values.get("sim.task") in tasks.task_names() else {}


def _of_fingerprint(fingerprint: Mapping[str, str], horizon: Any) -> dict[str, Any]:
    sim = config_from_fingerprint(fingerprint)
    names = ("task", "robots", "controller", "actions", "control_freq", "placement", "quality", "mesh_cell", "fast_step")
    values = {f"sim.{name}": getattr(sim, name) for name in names}
    if isinstance(horizon, int) and horizon > 0:
        values["sim.horizon"] = horizon
    return values


def _of_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``{"env_name": "Lift", "env_kwargs": {"robots": ["Panda"], "controller_configs": {"type": "OSC_POSE"}, ...}}``."""
    kwargs = args.get("env_kwargs")
    kwargs = kwargs if isinstance(kwargs, Mapping) else {}
    robots = kwargs.get("robots") or "Panda"
    values: dict[str, Any] = {"sim.task": str(args.get("env_name")),
                              "sim.robots": tuple(map(str, robots)) if isinstance(robots, list | tuple) else (str(robots),)}
    controller = _controller(kwargs.get("controller_configs"))
    if controller:
        values["sim.controller"] = controller
    values["sim.actions"] = "position" if controller == "OSC_POSITION" else "pose"  # robosuite's own where none is said
    return values


def _controller(configs: Any) -> str:
    """Type of the arm's controller: robosuite up to 1.4 has one per robot, 1.5 one per part of the body. "" where it is not said."""
    if isinstance(configs, list | tuple) and configs:
        configs = configs[0]
    if not isinstance(configs, Mapping):
        return ""
    parts = configs.get("body_parts")
    if isinstance(parts, Mapping):
        arms = [part for name, part in parts.items() if isinstance(part, Mapping) and name in ("right", "left", "arms")]
        return _controller(arms[0].get("right", arms[0])) if arms else ""
    kind = str(configs.get("type", ""))
    return kind if kind in tasks.CONTROLLERS else ""


def with_cameras(values: dict[str, Any], cameras: tuple[str, ...], wrist: tuple[str, ...]) -> dict[str, Any]:
    """``values`` with the cameras of the data, ``wrist`` among them, where the simulated task has all of them."""
    usual = SimConfig()
    known = tasks.camera_names(values["sim.task"], values.get("sim.robots", usual.robots))
    if not set(cameras) <= set(known):
        return values
    return {**values, "sim.wrist_cameras": wrist, "sim.third_cameras": tuple(camera for camera in cameras if camera not in wrist)}
