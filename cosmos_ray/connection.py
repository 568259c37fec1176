"""Join the Ray cluster of a run, or start a private one on this machine."""

from __future__ import annotations

import errno
import logging
import os
import socket
from typing import Any

import psutil
import ray
from ray._private.utils import read_ray_address
from ray.exceptions import AuthenticationError

from cosmos_ray.authentication import check_accepted, use_private_token
from cosmos_ray.errors import ConfigError
from cosmos_ray.remote import first_line
from cosmos_ray.sim import gl

logger = logging.getLogger(__name__)

STARTS = 3  #: attempts to start a private Ray
#: Ray would start a process per CPU for tasks; a run has actors alone, which get processes of their own.
SYSTEM = {"prestart_worker_first_driver": False}
QUIET = {"log_to_driver": False, "logging_level": logging.ERROR}


def connect(address: str = "", simulates: bool = True) -> bool:
    """Join the cluster at ``address`` or ``$RAY_ADDRESS``, or start a private one; returns whether it is private. ConfigError when that
    is impossible.

    ``simulates`` says whether processes on this machine will draw pictures, for which a private Ray needs an OpenGL backend.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leave CUDA_VISIBLE_DEVICES alone in CPU workers
    ray._private.worker._worker_logs_enabled = False  # Ray would print on standard output which node died; the supervisor says so
    address = address or os.environ.get("RAY_ADDRESS", "")
    private = address in ("", "local")
    if private and simulates:
        gl.choose_backend()  # also tells the workers which one, through the environment
    try:
        if private:
            start_private()
        else:
            ray.init(address=_checked(address), **QUIET)
    except (OSError, ValueError, RuntimeError, AuthenticationError) as error:
        where = "Ray did not start on this machine" if private else f"no Ray cluster answers at {address!r}"
        raise ConfigError(f"{where}: {first_line(error)}{_advice(error) if private else ''}") from error
    return private


def _advice(error: Exception) -> str:
    """What to do about a private Ray that did not start."""
    if "AF_UNIX" in str(error):
        return "; set RAY_TMPDIR to a folder with a short path, such as /tmp"
    if isinstance(error, PermissionError):
        return "; set RAY_TMPDIR to a folder of your own with a short path"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
        return "; make room there, or set RAY_TMPDIR to another folder with a short path"
    return ""


def start_private(**options: Any) -> None:
    """Start Ray on this machine for this process alone; ``options`` go to ``ray.init``. RuntimeError when it does not start.

    No other process can join, not even one that takes any Ray that it finds.

    Ray allows itself 30 s. On a machine too busy for that, Ray gives up with a bare Exception and leaves its processes behind. This
    function ends those processes and starts Ray again, :data:`STARTS` times in all.
    """
    use_private_token()
    me = psutil.Process()
    for attempt in range(1, STARTS + 1):
        before = set(me.children(recursive=True))
        try:
            ray.init(address="local", include_dashboard=False, _system_config=SYSTEM, **QUIET, **options)
            return
        except Exception as error:
            if type(error) is not Exception or "timed out during startup" not in str(error):
                raise
            for process in set(me.children(recursive=True)) - before:
                process.kill()
            if attempt == STARTS:
                raise RuntimeError(f"it timed out {STARTS} times: the machine is too busy, or its /tmp is full") from error
            logger.warning("Ray did not start within its time limit; trying again")


def _checked(address: str) -> str:
    """``address`` with "auto" replaced by what it means. ConfigError at once when nobody listens there or the cluster refuses us; Ray
    itself tries for long and does not say why. Leaves ray:// to Ray."""
    found = address == "auto"
    if found:
        # Ray's own search would also take the private Ray of another process.
        address = read_ray_address() or ""
        if not address:
            raise ConfigError("--address auto finds no Ray on this machine that `ray start` began: begin one with `ray start --head`, give "
                              "its host:port, or leave --address and $RAY_ADDRESS out for a private Ray")
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host:
        return address
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster answers at {address} ({error}): check --address or $RAY_ADDRESS") from error
    check_accepted(address, found)
    return address
