"""Label selectors: which of a cluster's nodes a kind of process may run on."""

from __future__ import annotations

import re

from cosmos_ray.errors import ConfigError

NODES = "labels of nodes that may run {}, as key=value, several with commas; empty = any node. `ray start --labels` gives a node labels"


def selector(name: str, text: str) -> dict[str, str]:
    """``"zone=a,disk=ssd"`` as ``{"zone": "a", "disk": "ssd"}``; ConfigError, which names the setting ``name``, for another form."""
    labels: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        key, _, value = map(str.strip, part.partition("="))
        if not re.fullmatch(r"[A-Za-z0-9./_-]+", key) or not re.fullmatch(r"[A-Za-z0-9._-]+", value):
            raise ConfigError(f"{name} = {text!r} is not a list of labels: give key=value, several with commas, as to `ray start --labels`")
        labels[key] = value
    return labels
