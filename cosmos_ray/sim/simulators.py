"""The environments of one process and the episodes that run in them, addressed by place: what a child process serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cosmos_ray.sim.simulation import Simulation, start
from cosmos_ray.sim.trajectory import Trajectory


@dataclass(frozen=True)
class Facts:
    """What all environments of a configuration have in common, besides the configuration."""

    horizon: int  #: control steps before an episode times out
    control_freq: int  #: control steps per simulated second
    moving: tuple[int, ...]  #: numbers of an action (d,) that move a hand
    fingerprint: dict[str, str]  #: :attr:`Simulation.fingerprint`


class Simulators:
    """Environments that step one after another, at places 0, 1, ...; each with the episode that runs in it.

    The caller keeps the whole record of an episode; this class keeps its last step alone. Whoever has the record can so have the episode
    go on in another process, bit for bit (:meth:`restore`).
    """

    generation = 0  #: rises when the simulators have lost all episodes; see :class:`cosmos_ray.sim.child.SimulatorChild`

    def __init__(self, environments: Sequence[Simulation]):
        self._environments = list(environments)
        self._last: list[Trajectory | None] = [None] * len(self._environments)
        first = self._environments[0]
        self.count = len(self._environments)
        self.deaths: list[str] = []
        self.facts = Facts(first.config.horizon, first.control_freq, first.moving, first.fingerprint)

    def ready(self, timeout: float) -> bool:
        """Whether orders can be given, within ``timeout`` seconds."""
        return True

    def begin(self, place: int, seed: int, horizon: int = 0) -> Trajectory:
        """Reset to ``seed``; an episode of ``horizon`` control steps begins, 0 for the environment's own. Returns its step 0."""
        environment = self._environments[place]
        environment.horizon = horizon or environment.config.horizon
        self._last[place] = begun = start(environment, seed)
        return begun.last()

    def restore(self, place: int, last: Trajectory, horizon: int = 0) -> None:
        """Go on with an episode whose last step is ``last``, as if it had run at this place before."""
        environment = self._environments[place]
        environment.horizon = horizon or environment.config.horizon
        environment.restore(last.states[-1])
        self._last[place] = last

    def execute(self, place: int, chunk: np.ndarray, render_at: tuple[int, ...] | None = None,
                labels: np.ndarray | None = None) -> Trajectory:
        """Run an action chunk (K, d), as :meth:`Simulation.execute` does. Returns a record that begins at the last step before it."""
        last = self._last[place]
        if last is None:
            raise RuntimeError(f"no episode runs at place {place}")
        piece = last.last()
        self._environments[place].execute(chunk, piece, render_at, labels)
        self._last[place] = piece.last()
        return piece

    def demonstrate(self, place: int, seed: int) -> Trajectory:
        """A whole episode of the scripted expert; see :func:`cosmos_ray.sim.demonstration.demonstrate`."""
        from cosmos_ray.sim.demonstration import demonstrate

        environment = self._environments[place]
        environment.horizon = environment.config.horizon
        return demonstrate(environment, seed)

    def close(self) -> None:
        """Release the environments."""
        for environment in self._environments:
            environment.close()
