"""Deaths of actors, told in one line."""

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError

from cosmos_ray.remote import why_lost

KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: RolloutActor
\tactor_id: 3c1f
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a \
connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer due to high memory usage."""
NODE = """The actor died unexpectedly before finishing this task.
The actor died because its node has died. Node Id: 0bdb20
\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"""
RAISED = """The actor died because of an error raised in its creation task, ray::RolloutActor.__init__()
  File "environment.py", line 1, in __init__
cosmos_ray.errors.SimulationError: no usable OpenGL backend"""


@pytest.mark.parametrize(("error", "why"), [
    (RayActorError(error_msg=KILLED), "Worker unexpectedly exits with a connection error code 2. End of file."),
    (RayActorError(error_msg=NODE), "its node has died. Node Id: 0bdb20"),
    (RayActorError(error_msg=RAISED, actor_init_failed=True), "cosmos_ray.errors.SimulationError: no usable OpenGL backend"),
    (ActorUnavailableError("RpcError: Socket closed", b"\0" * 16), "RpcError: Socket closed."),
    (OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node was 15 GB"),
     "Task was killed due to the node running low on memory."),
])  # fmt: skip
def test_a_death_is_told_in_one_line(error, why):
    assert why_lost(error) == why
