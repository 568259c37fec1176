"""Calls to worker actors through Ray; the only part of a fleet that knows Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from cosmos_ray.remote import own_error
from cosmos_ray.rollout.fleet import WorkerLost


class RayCalls:
    """:class:`cosmos_ray.rollout.fleet.Calls` to actors."""

    def advance(self, handle: ActorHandle, tickets: list[Any], seconds: float) -> ray.ObjectRef:
        return handle.advance.remote(tickets, seconds)

    def ended(self, calls: list[ray.ObjectRef], timeout: float) -> list[ray.ObjectRef]:
        if not calls:
            time.sleep(timeout)
            return []
        ready, _ = ray.wait(calls, num_returns=1, timeout=timeout)
        return ray.wait(calls, num_returns=len(calls), timeout=0)[0] if ready else []

    def answers(self, call: ray.ObjectRef) -> list[Any]:
        try:
            return ray.get(call)
        except RayTaskError as error:
            raise own_error(error) from error
        except RayError as error:  # whatever else a call ends with, its actor is gone, cannot be placed, or has lost its answer
            raise WorkerLost(*_cause(error)) from error

    def stop(self, handle: ActorHandle) -> None:
        ray.kill(handle)


class Anywhere:
    """A :class:`cosmos_ray.rollout.fleet.Crew` whose workers Ray places; ``spawn`` starts worker ``index``."""

    def __init__(self, spawn: Callable[[int], ActorHandle]):
        self._spawn = spawn

    def start(self, index: int) -> ActorHandle:
        return self._spawn(index)

    def should_move(self, index: int) -> bool:
        return False

    def where(self, index: int) -> str:
        return "this cluster"


def _cause(error: RayError) -> tuple[str, bool]:
    """Why an actor is gone, out of Ray's many lines, and whether its node went with it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if getattr(error, "actor_init_failed", False):
        return lines[-1], False
    line = next((line for line in lines if " because " in line), lines[0])
    return line.partition(" because ")[2].partition(" Some common causes")[0] or line, "its node has died" in line
