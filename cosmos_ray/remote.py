"""What Ray raises when a call fails, and the waiting for its answers, in one place."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from cosmos_ray.errors import CosmosRayError
from cosmos_ray.supervision import Supervisor

#: The actor's process is gone, whoever took it: a crash, a signal, Ray's memory monitor, its node, before or after it began.
ACTOR_LOST = (RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError, ActorUnschedulableError, ActorPlacementGroupRemoved)


def own_error(error: RayTaskError) -> Exception:
    """The error that our code raised inside the actor, or Ray's error with its traceback."""
    return error.cause if isinstance(error.cause, CosmosRayError) else error


def first_line(error: BaseException) -> str:
    """First line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def why_lost(error: BaseException) -> str:
    """Why an actor or its process is gone, in one line: what it raised as it started, or what Ray knows of its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if getattr(error, "actor_init_failed", False):
        return lines[-1]
    for mark, end in (("Worker exit detail: ", " Some common causes"), (" because ", " Some common causes"),
                      (" is unavailable: ", " The task may or may not")):
        for line in lines:
            if mark in line:
                return line.partition(mark)[2].partition(end)[0]
    return lines[0]


def answers(references: list[ray.ObjectRef], who: str, on: str, supervisor: Supervisor, timeout: float | None = None) -> list[Any]:
    """``ray.get`` of all ``references``; says what it waits for, as :meth:`Supervisor.waits` does. GetTimeoutError after ``timeout`` s."""
    until = time.monotonic() + timeout if timeout is not None else None
    try:
        while True:
            slice_s = 1.0 if until is None else max(0.0, min(1.0, until - time.monotonic()))
            ready, late = ray.wait(references, num_returns=len(references), timeout=slice_s)
            if not late:
                return ray.get(references)
            ray.get(ready)  # raises at once what one of them raised, while the others are silent
            if until is not None and time.monotonic() >= until:
                raise GetTimeoutError(f"{len(late)} of {len(references)} answers did not come within {timeout:g} s")
            supervisor.waits(who, on)
    finally:
        supervisor.goes_on(who)
