"""Calls to worker actors through Ray; the only part of a fleet that knows Ray."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from cosmos_ray.remote import own_error, why_lost
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
            raise WorkerLost(why_lost(error), with_node="its node has died" in str(error)) from error

    def stop(self, handle: ActorHandle) -> None:
        """End the worker's process at once."""
        ray.kill(handle)
