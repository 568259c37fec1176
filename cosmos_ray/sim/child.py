"""Simulators in a child process, so that a native crash, a hang or a leak costs one episode and not its worker.

One child serves all episodes of a worker. It carries out one order at a time, so what breaks it is known: the order under way. The other
episodes go on in the next child, from their last step (:meth:`Simulators.restore`).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from cosmos_ray.config import SimConfig
from cosmos_ray.errors import ConfigError, CosmosRayError, SimulationError
from cosmos_ray.sim.trajectory import Trajectory
from cosmos_ray.supervision import SIMULATOR_START_S, SIMULATOR_STARTS

if TYPE_CHECKING:  # the worker's process needs no simulator
    from cosmos_ray.sim.simulators import Facts, Simulators

logger = logging.getLogger(__name__)

WATCH_S = 0.2  #: between two looks at the memory of a child that works
LOOK_S = 1.0  #: between two looks at the memory of a child between two orders
ABORT_S = 2.0  #: that a hung child gets to write where it hangs
PR_SET_PDEATHSIG = 1  #: of Linux, in sys/prctl.h


class SimulatorLost(CosmosRayError):
    """The child died, hung or grew too large under an order. The next child starts, and the order's episode is lost."""


@dataclass(frozen=True)
class Limits:
    """When a child is replaced."""

    order_s: float = 60.0  #: seconds for one order: a reset, an action chunk, a demonstration
    memory_mb: float = 0.0  #: resident memory of the child; 0 = no cap
    episodes: int = 0  #: episodes that one child begins; 0 = any number


class SimulatorChild:
    """Environments of the tasks of ``config`` at ``count`` places in a child process, which dies with this one.

    Has the methods of :class:`cosmos_ray.sim.simulators.Simulators`. An order raises SimulatorLost when it breaks the child. Then, and
    whenever the child is replaced, :attr:`generation` rises, and :meth:`ready` waits for the next child; restore the episodes there.
    """

    def __init__(self, config: SimConfig, count: int, limits: Limits):
        self.config, self.count, self.limits = config, count, limits
        self.generation = 0
        self.deaths: list[str] = []  #: why children died while no order was under way, for the caller to take
        self.facts: dict[str, Facts] = {}  #: by task, of those that a child has built
        self._failed = 0  #: starts in a row that failed
        self._starting: float | None = None  #: since when, by time.monotonic(), while the child has not answered
        self._start()

    @property
    def starting(self) -> bool:
        """Whether the present child has not answered yet."""
        return self._starting is not None

    @property
    def pid(self) -> int:
        """Process id of the present child."""
        return self._process.pid

    def ready(self, timeout: float) -> bool:
        """Whether orders can be given, within ``timeout`` seconds. Replaces a child that died, grew or is used up since the last order.

        Raises:
            ConfigError, SimulationError: what the child raised while it started, or that it cannot start.
        """
        if self._starting is None and (self._process.poll() is not None):
            self.deaths.append(self._why())
            self._replace(self.deaths[-1])
        elif self._starting is None and (reason := self._used_up()):
            self._replace(reason)
        if self._starting is None:
            return True
        now = time.monotonic()
        try:
            if not self._await(min(now + timeout, self._starting + SIMULATOR_START_S)):
                if time.monotonic() < self._starting + SIMULATOR_START_S:
                    return False
                raise _Gone(f"not started after {SIMULATOR_START_S:g} s")
            self._receive()
        except _Gone as gone:
            self._failed += 1
            reason = self._why(str(gone))
            if self._failed >= SIMULATOR_STARTS:
                raise SimulationError(f"the simulators' process did not start {self._failed} times in a row, last: {reason}") from None
            self._replace(reason)
            return False
        self._starting, self._failed = None, 0
        if self.limits.memory_mb and (needed := self.memory_mb) > self.limits.memory_mb:
            raise ConfigError(f"{self.count} simulators need {needed:.0f} MB before their first episode, and rollout.simulator_memory_mb "
                              f"is {self.limits.memory_mb:g}: raise it, or lower rollout.envs_per_worker")
        return True

    @property
    def memory_mb(self) -> float:
        """Resident memory of the child; 0 of one that is gone."""
        try:
            return psutil.Process(self._process.pid).memory_info().rss / 2**20
        except psutil.Error:
            return 0.0

    def begin(self, place: int, seed: int, horizon: int = 0, task: str = "") -> Trajectory:
        self._episodes += 1
        return self._order("begin", place, seed, horizon, task)

    def restore(self, place: int, last: Trajectory, horizon: int = 0) -> None:
        self._order("restore", place, last, horizon)

    def execute(self, place: int, chunk: np.ndarray, render_at: tuple[int, ...] | None = None,
                labels: np.ndarray | None = None) -> Trajectory:
        return self._order("execute", place, chunk, render_at, labels)

    def demonstrate(self, place: int, seed: int, task: str = "") -> Trajectory:
        self._episodes += 1
        return self._order("demonstrate", place, seed, task)

    def close(self) -> None:
        """End the child."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
        self._trace.close()

    def _start(self) -> None:
        ours, theirs = Pipe()
        self._trace = tempfile.TemporaryFile()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        for facts in [*self.facts.values()][:1]:  # found by the child before: spares the probe
            from cosmos_ray.sim.gl import RENDERED

            environment |= {"MUJOCO_GL": facts.fingerprint["gl"], RENDERED: facts.fingerprint["gl"]}
        descriptors = (theirs.fileno(), self._trace.fileno())
        self._process = subprocess.Popen([sys.executable, "-m", "cosmos_ray.sim.child", *map(str, descriptors), str(os.getpid())],
                                         env=environment, pass_fds=descriptors, stdin=subprocess.DEVNULL)
        theirs.close()
        self._connection = ours
        with contextlib.suppress(OSError):  # dead already: `ready` says so
            self._connection.send((self.config, self.count, self.limits.memory_mb))
        self._starting = time.monotonic()
        self._looked, self._episodes = 0.0, 0

    def _replace(self, reason: str) -> None:
        logger.warning("the simulators' process is replaced: %s", reason)
        self.close()
        self.generation += 1
        self._start()

    def _used_up(self) -> str:
        """Why the child should be replaced between two orders; "" if it should not."""
        if self.limits.episodes and self._episodes >= self.limits.episodes:
            return f"{self.limits.episodes} episodes"
        now = time.monotonic()
        if self.limits.memory_mb and now - self._looked >= LOOK_S:
            self._looked = now
            if (memory := self.memory_mb) > self.limits.memory_mb:
                return f"{memory:.0f} MB, above rollout.simulator_memory_mb = {self.limits.memory_mb:g}"
        return ""

    def _order(self, name: str, *arguments: Any) -> Any:
        if self._starting is not None:
            raise RuntimeError("an order came before the simulators were ready")
        try:
            self._connection.send((name, arguments))
            if not self._await(time.monotonic() + self.limits.order_s):
                raise _Gone(f"no answer for {self.limits.order_s:g} s")
            return self._receive()
        except (_Gone, OSError) as gone:
            reason = self._why(str(gone) if isinstance(gone, _Gone) else "")
        self._replace(reason)
        raise SimulatorLost(reason)

    def _await(self, until: float) -> bool:
        """Whether the child answers before time.monotonic() is ``until``."""
        while not self._connection.poll(max(0.0, min(WATCH_S, until - time.monotonic()))):
            if time.monotonic() >= until:
                return False
            if self.limits.memory_mb and self._starting is None and (memory := self.memory_mb) > self.limits.memory_mb:
                raise _Gone(f"{memory:.0f} MB under way, above rollout.simulator_memory_mb = {self.limits.memory_mb:g}")
        return True

    def _receive(self) -> Any:
        try:
            done, value, facts = self._connection.recv()
        except (EOFError, OSError):
            raise _Gone() from None
        self.facts.update(facts)
        if not done:
            raise value
        return value

    def _why(self, reason: str = "") -> str:
        """End the child and say why, and where it was."""
        if reason:
            self._process.send_signal(signal.SIGABRT)  # it writes where it is, and ends
        try:
            code = self._process.wait(ABORT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._trace.seek(0)
        place = re.search(r'File "(?:.*/)?([^"/]+)", line (\d+) in (\w+)', self._trace.read().decode(errors="replace"))
        ended = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return (reason or ended) + (f", in {place[3]} ({place[1]}:{place[2]})" if place else "")


class _Gone(Exception):
    """Why the child has to be given up; empty when it is dead already."""


def serve(descriptor: int, trace: int, parent: int) -> None:
    """The child's side: build the environments, then carry out orders until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to a whole terminal; the parent decides
    faulthandler.enable(trace, all_threads=False)
    die_with(parent)
    connection = Connection(descriptor)
    config, count, memory_mb = connection.recv()
    held: list[Simulators] = []
    told: set[str] = set()  #: tasks whose facts the parent knows

    def build() -> None:
        held.append(_build(config, count, memory_mb))

    order: Callable[..., Any] = build
    arguments: tuple = ()
    while True:
        try:
            answer = True, order(*arguments)
        except CosmosRayError as error:
            answer = False, error
        except Exception as error:  # a bug: the parent raises it
            answer = False, RuntimeError(f"{type(error).__name__} in the simulators' process: {error}\n{traceback.format_exc()}")
        fresh = {task: facts for task, facts in held[0].facts.items() if task not in told} if held else {}
        connection.send((*answer, fresh))
        told |= fresh.keys()
        name, arguments = connection.recv()
        order = getattr(held[0], name)


def _build(config: SimConfig, count: int, memory_mb: float) -> Simulators:
    """The environments of a single task, or the first one of the first of several tasks, with the kernels compiled and the OpenGL context
    made."""
    from cosmos_ray.sim.make import make
    from cosmos_ray.sim.simulators import Simulators

    each = config.each()
    environments = [make(each[0]) for _ in range(count if len(each) == 1 else 1)]
    environments[0].render()
    environments[0].step(np.zeros(environments[0].action_dim))
    return Simulators(environments, each, count, memory_mb)


def die_with(parent: int, by: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent dies, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it died before
        os._exit(1)


if __name__ == "__main__":
    from cosmos_ray.sim import child  # under its own name, as the parent knows it

    try:
        child.serve(*map(int, sys.argv[1:]))
    except (EOFError, OSError):
        os._exit(0)  # the parent is gone or has no more use for this process; OpenGL needs no farewell
