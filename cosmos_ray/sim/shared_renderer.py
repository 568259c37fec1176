"""One renderer for all environments of a process that have the same model, and a cap on what the renderers of a process hold together."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from weakref import WeakValueDictionary

from cosmos_ray.config import SimConfig
from cosmos_ray.sim.renderer import Renderer
from cosmos_ray.sim.slimming import trim_heap

MOST_MB = 2048
"""Cap on the renderers of a process, by :attr:`Renderer.megabytes`. A LIBERO scene at full quality takes 300 to 700."""

_shared: WeakValueDictionary[tuple, SharedRenderer] = WeakValueDictionary()
_uses = itertools.count(1)


class SharedRenderer:
    """The renderer of one model, which lives as long as an environment holds this object. Ask :meth:`get` before each use.

    Where the cap needs it, the renderers that were not used for longest go, and are made again when they are asked for: some seconds.
    """

    def __init__(self, xml: str, config: SimConfig):
        self._xml, self._config = xml, config
        self._renderer: Renderer | None = None
        self._megabytes = 0.0  # 0 before the first
        self._used = 0

    def get(self) -> Renderer:
        """The renderer; in whatever pose it was left."""
        self._used = next(_uses)
        if self._renderer is None:
            self._make_room()
            self._renderer = Renderer(self._xml, self._config.image_size, self._config.mesh_cell, self._config.quality)
            self._megabytes = self._renderer.megabytes
            trim_heap()
        return self._renderer

    def _make_room(self) -> None:
        """Let go the renderers used longest ago, until this one fits beside the others. Before it is made, the largest is its measure."""
        others = sorted((other for other in _shared.values() if other._renderer is not None), key=lambda other: other._used)
        needed = self._megabytes or max((other._megabytes for other in others), default=0.0)
        while others and needed + sum(other._megabytes for other in others) > MOST_MB:
            others.pop(0)._renderer = None


def shared_renderer(model_hash: str, xml: Callable[[], str], config: SimConfig) -> SharedRenderer:
    """The process's renderer for this model and these settings; ``xml`` is asked where there is none yet."""
    key = (model_hash, config.image_size, config.mesh_cell, config.quality)
    shared = _shared.get(key)
    if shared is None:
        shared = _shared[key] = SharedRenderer(xml(), config)
    return shared
