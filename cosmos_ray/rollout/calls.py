"""Calls to worker actors through Ray; the only part of a fleet that knows Ray."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from cosmos_ray.remote import own_error
from cosmos_ray.rollout.fleet import WorkerLost


class RayCalls:
    """Calls of the ``advance`` of worker actors."""

    def advance(self, handle: ActorHandle, tickets: list[Any], seconds: float) -> ray.ObjectRef:
        """Begin a call."""
        return handle.advance.remote(tickets, seconds)

    def ended(self, calls: list[ray.ObjectRef], timeout: float) -> list[ray.ObjectRef]:
        """Those of ``calls`` that have ended; waits up to ``timeout`` seconds for the first one."""
        if not calls:
            time.sleep(timeout)
            return []
        ready, _ = ray.wait(calls, num_returns=1, timeout=timeout)
        return ray.wait(calls, num_returns=len(calls), timeout=0)[0] if ready else []

    def answers(self, call: ray.ObjectRef) -> list[Any]:
        """What an ended call returned. Raises what the worker raised, and WorkerLost when the worker is gone."""
        try:
            return ray.get(call)
        except RayTaskError as error:
            raise own_error(error) from error
        except RayError as error:  # whatever else a call ends with, its actor is gone, cannot be placed, or has lost its answer
            raise WorkerLost(*_cause(error)) from error

    def stop(self, handle: ActorHandle) -> None:
        """End the worker's process at once."""
        ray.kill(handle)


def _cause(error: RayError) -> tuple[str, bool]:
    """Why an actor is gone, out of Ray's many lines, and whether its node went with it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if getattr(error, "actor_init_failed", False):
        return lines[-1], False
    line = next((line for line in lines if " because " in line), lines[0])
    return line.partition(" because ")[2].partition(" Some common causes")[0] or line, "its node has died" in line
