"""The pool's interface to a policy in this process, for single episodes, tools and tests."""

from __future__ import annotations

from cosmos_ray.errors import CosmosRayError
from cosmos_ray.inference.core import InferenceCore
from cosmos_ray.inference.messages import ActReply, ActRequest


class LocalClient:
    """Answers at once, with the same core the pool's actors run."""

    def __init__(self, core: InferenceCore):
        self.core = core

    def submit(self, request: ActRequest) -> ActRequest:
        return request

    def result(self, pending: ActRequest) -> ActReply:
        reply = self.core.answer([pending])[0]
        if isinstance(reply, CosmosRayError):
            raise reply
        return reply
