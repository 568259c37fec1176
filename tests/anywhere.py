"""A crew for tests that are not about places."""

from collections.abc import Callable

from ray.actor import ActorHandle


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
