"""What a file says of the robosuite environment that recorded it, as an episode's ``info`` keeps it."""

from __future__ import annotations

import json
from typing import Any

import h5py

from cosmos_ray.replay.exchange.instruction import environment_of, table_of

KEPT = ("robots", "controller_configs")  #: arguments of robosuite's ``make`` that decide the robot
MOST = 20_000  #: characters of them


def recorded_environment(data: h5py.Group) -> dict[str, Any]:
    """``{"env_args": {"env_name", "env_kwargs"}}``, of robomimic's ``env_args`` or robosuite's own ``env_info``; empty where there is
    neither."""
    name, inside = environment_of(data), table_of(data, "env_args").get("env_kwargs")
    said = {**table_of(data, "env_info"), **(inside if isinstance(inside, dict) else {})}
    kept = {key: said[key] for key in KEPT if key in said}
    if not name or len(json.dumps(kept)) > MOST:
        return {}
    return {"env_args": {"env_name": name, "env_kwargs": kept}}
