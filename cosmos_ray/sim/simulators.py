"""The environments of one process and the episodes that run in them, addressed by place: what a child process serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil

from cosmos_ray.config import SimConfig
from cosmos_ray.errors import SimulationError
from cosmos_ray.sim.make import make
from cosmos_ray.sim.simulation import Simulation, start
from cosmos_ray.sim.slimming import trim_heap
from cosmos_ray.sim.trajectory import Trajectory

FULL = 0.75  #: share of the memory cap above which an environment is only built in exchange for one that nobody uses


@dataclass(frozen=True)
class Facts:
    """What all environments of a task have in common, besides the configuration."""

    horizon: int  #: control steps before an episode times out
    control_freq: int  #: control steps per simulated second
    moving: tuple[int, ...]  #: numbers of an action (d,) that move a hand
    fingerprint: dict[str, str]  #: :attr:`Simulation.fingerprint`
    restorable: bool = True  #: :attr:`Simulation.restorable`


class Simulators:
    """Environments that step one after another, at places 0, 1, ...; each with the episode that runs in it.

    The caller keeps the whole record of an episode; this class keeps its last step alone. Whoever has the record can so have the episode
    go on in another process, bit for bit (:meth:`restore`).

    A place holds an environment of the task that it last ran. The environment of another task stays, for any place, until memory is short:
    then the one that was left longest ago goes.

    Args:
        environments: those that there are already, the first of the first task.
        each: a config of one task for every task; by default those of ``environments``.
        count: number of places, by default one for each of ``environments``.
        memory_mb: cap on the resident memory of this process, 0 for none.
    """

    generation = 0  #: rises when the simulators have lost all episodes; see :class:`cosmos_ray.sim.child.SimulatorChild`

    def __init__(self, environments: Sequence[Simulation], each: Sequence[SimConfig] = (), count: int = 0, memory_mb: float = 0.0):
        self.count = count or len(environments)
        self._configs = {config.task: config for config in each or [environment.config for environment in environments]}
        self._left = list(environments)  #: environments at no place, the one that was left longest ago first
        self._at: list[Simulation | None] = [None] * self.count
        self._last: list[Trajectory | None] = [None] * self.count
        self._memory_mb = memory_mb
        self.deaths: list[str] = []
        self.facts = {environment.task: _facts(environment) for environment in environments}  #: by task, of those that were built

    def ready(self, timeout: float) -> bool:
        """Whether orders can be given, within ``timeout`` seconds."""
        return True

    def begin(self, place: int, seed: int, horizon: int = 0, task: str = "") -> Trajectory:
        """Reset to ``seed``; an episode of ``horizon`` control steps begins, 0 for the environment's own. Returns its step 0.

        ``task`` is one of the tasks, "" the first."""
        environment = self._take(place, task)
        environment.horizon = horizon or environment.config.horizon
        self._last[place] = begun = start(environment, seed)
        return begun.last()

    def restore(self, place: int, last: Trajectory, horizon: int = 0) -> None:
        """Go on with an episode whose last step is ``last``, as if it had run at this place before."""
        environment = self._take(place, last.task)
        environment.horizon = horizon or environment.config.horizon
        environment.restore(last.states[-1])
        self._last[place] = last

    def execute(self, place: int, chunk: np.ndarray, render_at: tuple[int, ...] | None = None,
                labels: np.ndarray | None = None) -> Trajectory:
        """Run an action chunk (K, d), as :meth:`Simulation.execute` does. Returns a record that begins at the last step before it."""
        last, environment = self._last[place], self._at[place]
        if last is None or environment is None:
            raise RuntimeError(f"no episode runs at place {place}")
        piece = last.last()
        environment.execute(chunk, piece, render_at, labels)
        self._last[place] = piece.last()
        return piece

    def demonstrate(self, place: int, seed: int, task: str = "") -> Trajectory:
        """A whole episode of the scripted expert of ``task``; see :func:`cosmos_ray.sim.demonstration.demonstrate`."""
        from cosmos_ray.sim.demonstration import demonstrate

        environment = self._take(place, task)
        environment.horizon = environment.config.horizon
        return demonstrate(environment, seed)

    def close(self) -> None:
        """Release the environments."""
        for environment in [*self._left, *filter(None, self._at)]:
            environment.close()

    def _take(self, place: int, task: str) -> Simulation:
        """The environment of ``task`` at ``place``: the one there, one that is left, or a new one."""
        task, held = task or next(iter(self._configs)), self._at[place]
        if held is not None and held.task == task:
            return held
        if held is not None:
            self._at[place] = self._last[place] = None
            self._left.append(held)
        found = next((environment for environment in self._left if environment.task == task), None)
        if found is None:
            found = self._build(task)
        else:
            self._left.remove(found)
        self._at[place] = found
        return found

    def _build(self, task: str) -> Simulation:
        if task not in self._configs:
            raise SimulationError(f"these simulators have no task {task!r}, they have {', '.join(self._configs)}")
        if self._left and self._memory_mb and psutil.Process().memory_info().rss / 2**20 > FULL * self._memory_mb:
            self._left.pop(0).close()
            trim_heap()
        environment = make(self._configs[task])
        self.facts.setdefault(task, _facts(environment))
        return environment


def _facts(environment: Simulation) -> Facts:
    return Facts(environment.config.horizon, environment.control_freq, environment.moving, environment.fingerprint,
                 environment.restorable)
