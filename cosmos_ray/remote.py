"""What Ray raises when a call fails, in one place."""

from __future__ import annotations

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

from cosmos_ray.errors import CosmosRayError

#: The actor's process is gone, whoever took it: a crash, a signal, Ray's memory monitor, its node.
ACTOR_LOST = (RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError)


def own_error(error: RayTaskError) -> Exception:
    """The error that our code raised inside the actor, or Ray's error with its traceback."""
    return error.cause if isinstance(error.cause, CosmosRayError) else error


def first_line(error: BaseException) -> str:
    """First line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
