"""The robosuite environment that recorded an episode, as files say it and as an episode's ``info`` keeps it: robomimic's ``env_args``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py

from cosmos_ray.replay.exchange.instruction import environment_of, table_of

KEPT = ("robots", "controller_configs")  #: arguments of robosuite's ``make`` that decide the robot
MOST = 20_000  #: characters of them
BESIDE = "env_args.json"  #: in the ``meta`` folder of a LeRobot dataset of ours


def recorded_environment(data: h5py.Group) -> dict[str, Any]:
    """``{"env_args": {"env_name", "env_kwargs"}}``, of robomimic's ``env_args`` or robosuite's own ``env_info``; empty where there is
    neither."""
    return _kept(environment_of(data), _arguments(data))


def rate_of(data: h5py.Group) -> dict[str, float]:
    """``{"control_freq"}`` in control steps per second, empty where the file does not say it."""
    rate = _arguments(data).get("control_freq")
    return {"control_freq": float(rate)} if isinstance(rate, int | float) and 0 < rate < 1e4 else {}


def robots_of(data: h5py.Group) -> tuple[str, ...]:
    """Names of the simulated robots, empty where the file does not say them."""
    robots = _arguments(data).get("robots")
    robots = [robots] if isinstance(robots, str) else robots
    return tuple(robots) if isinstance(robots, list) and all(isinstance(robot, str) for robot in robots) else ()


def environment_beside(meta: Path) -> dict[str, Any]:
    """The same of the file :data:`BESIDE`; empty where there is none."""
    try:
        said = json.loads((meta / BESIDE).read_bytes())
        return _kept(said["env_name"], dict(said["env_kwargs"]))
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return {}


def said_environment(info: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an export writes: the ``env_args`` that came with the episode, or those of the simulator's fingerprint; None without either."""
    args, fingerprint = info.get("env_args"), info.get("fingerprint")
    if isinstance(args, dict):
        return args
    if not isinstance(fingerprint, dict) or not isinstance(fingerprint.get("task"), str):
        return None
    controller = re.match(r"[A-Z_]+", str(fingerprint.get("actions", "")))
    robots = [name for name in str(fingerprint.get("robots", "Panda")).split(",") if name]
    kwargs = {"robots": robots, **({"controller_configs": {"type": controller[0]}} if controller else {})}
    return {"env_name": fingerprint["task"], "type": 1, "env_kwargs": kwargs}


def _arguments(data: h5py.Group) -> dict[str, Any]:
    """The arguments of robosuite's ``make``, from wherever the file has them."""
    said: dict[str, Any] = {}
    for table in (table_of(data, "env_info"), table_of(data, "env_args")):
        inside = table.get("env_kwargs")
        said |= {**table, **(inside if isinstance(inside, dict) else {})}
    return said


def _kept(name: Any, said: dict[str, Any]) -> dict[str, Any]:
    kept = {key: said[key] for key in KEPT if key in said}
    if not isinstance(name, str) or not name or len(json.dumps(kept)) > MOST:
        return {}
    return {"env_args": {"env_name": name, "env_kwargs": kept}}
