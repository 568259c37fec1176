"""Join the Ray cluster of a run, or start a private one on this machine."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import psutil
import ray

from cosmos_ray.errors import ConfigError
from cosmos_ray.remote import first_line
from cosmos_ray.sim import gl

logger = logging.getLogger(__name__)

STARTS = 3  #: attempts to start a private Ray
QUIET = {"log_to_driver": False, "logging_level": logging.ERROR}


def connect(address: str = "") -> None:
    """Join the cluster at ``address`` or ``$RAY_ADDRESS``, or start a private one. ConfigError when that is impossible."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leave CUDA_VISIBLE_DEVICES alone in CPU workers
    address = address or os.environ.get("RAY_ADDRESS", "")
    _check_reachable(address)
    try:
        if address:
            ray.init(address=address, **QUIET)
        else:
            gl.choose_backend()  # also tells the workers which one, through the environment
            start_private()
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"no Ray cluster answers at {address!r}" if address else "Ray did not start on this machine"
        raise ConfigError(f"{where}: {first_line(error)}") from error


def start_private(**options: Any) -> None:
    """Start Ray on this machine for this process alone; ``options`` go to ``ray.init``. RuntimeError when it does not start.

    Ray allows itself 30 s. On a machine too busy for that, Ray gives up with a bare Exception and leaves its processes behind. This
    function ends those processes and starts Ray again, :data:`STARTS` times in all.
    """
    me = psutil.Process()
    for attempt in range(1, STARTS + 1):
        before = set(me.children(recursive=True))
        try:
            ray.init(address="local", include_dashboard=False, **QUIET, **options)
            return
        except Exception as error:
            if type(error) is not Exception or "timed out during startup" not in str(error):
                raise
            for process in set(me.children(recursive=True)) - before:
                process.kill()
            if attempt == STARTS:
                raise RuntimeError(f"it timed out {STARTS} times: the machine is too busy, or its /tmp is full") from error
            logger.warning("Ray did not start within its time limit; trying again")


def _check_reachable(address: str) -> None:
    """ConfigError at once when nobody listens on ``address``; Ray itself tries for minutes. Leaves "auto" and ray:// to Ray."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster answers at {address} ({error}): check --address or $RAY_ADDRESS") from error
