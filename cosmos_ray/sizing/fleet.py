"""A discrete-event simulation (SimPy) of rollout workers, inference actors and a learner that share the cores of some nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import simpy

from cosmos_ray.sizing.probe import Probe

DECISIONS = 4000  #: of all workers together, that a simulation lasts for, after a warm-up of a quarter
BASE_MB = 300.0  #: private memory of a process with torch and Ray
RAY_MB = 500.0  #: of Ray's own processes on a node


@dataclass(frozen=True)
class Shape:
    """A cluster and the processes on it."""

    nodes: int
    cores: int  #: of each node
    workers: int  #: rollout workers, all nodes together
    envs: int = 6  #: episodes that a worker runs at once
    actors: int = 1  #: inference actors
    gpu_speed: float = 0.0  #: how many times faster than one core a GPU answers; 0: the actors use cores
    learner: bool = False  #: a learner trains on the first node
    max_batch: int = 16


@dataclass(frozen=True)
class Outcome:
    """What a shape gives."""

    episodes_h: float
    steps_s: float  #: control steps
    learner_h: float  #: learner steps
    cores_busy: float  #: share of all cores
    actors_busy: float  #: share of the actors' time
    rows: float  #: mean rows of a batch
    node_mb: float  #: host memory of the fullest node
    plasma_mb: float  #: of requests and answers in flight, and two sets of weights

    @property
    def bottleneck(self) -> str:
        """What is busy most of the time."""
        if self.actors_busy >= 0.9:
            return "inference"
        return "cores" if self.cores_busy >= 0.85 else "waits"


def simulate(probe: Probe, shape: Shape) -> Outcome:
    """Simulate the fleet of ``shape`` until it settles, and count."""
    env = simpy.Environment()
    world = _World(env, probe, shape)
    each = probe.step_s * probe.chunk + probe.answer_s(1) / (shape.gpu_speed or 1)
    span = max(4 * each * shape.envs, DECISIONS * each / max(1, min(shape.workers, shape.nodes * shape.cores)))
    env.run(until=span / 4)
    world.reset()
    env.run(until=span * 5 / 4)
    return world.outcome(span)


class _World:
    def __init__(self, env: simpy.Environment, probe: Probe, shape: Shape):
        self.env, self.probe, self.shape = env, probe, shape
        self.nodes = [simpy.Resource(env, shape.cores) for _ in range(shape.nodes)]
        self.inbox: simpy.Store = simpy.Store(env)
        self.reset()
        for number in range(shape.actors):
            env.process(self.actor(self.nodes[number % shape.nodes]))
        for number in range(shape.workers):
            process = simpy.Resource(env, 1)
            halves = [half for half in ((shape.envs + 1) // 2, shape.envs // 2) if half]
            for place, half in enumerate(halves):
                offset = (number + place / 2) / shape.workers
                env.process(self.half(self.nodes[number % shape.nodes], process, half, offset))
        if shape.learner:
            env.process(self.learn(self.nodes[0]))

    def reset(self) -> None:
        self.busy = self.answering = 0.0
        self.decisions = self.batches = self.rows = self.learned = 0

    def work(self, node: simpy.Resource, seconds: float) -> Iterator[Any]:
        """Hold a core of ``node`` for ``seconds``."""
        with node.request() as core:
            yield core
            yield self.env.timeout(seconds)
            self.busy += seconds

    def half(self, node: simpy.Resource, process: simpy.Resource, size: int, offset: float) -> Iterator[Any]:
        """One half of a worker's episodes: it steps while the pool answers the other half."""
        probe = self.probe
        decisions = max(1, -(-probe.horizon // probe.chunk))
        between = (probe.reset_s + probe.commit_s) / decisions  # spread evenly: episodes end at different times
        yield self.env.timeout(offset * probe.step_s * probe.chunk * size)
        while True:
            answer = self.env.event()
            yield self.inbox.put((size, answer))
            yield answer
            with process.request() as turn:
                yield turn
                yield from self.work(node, size * (probe.step_s * probe.chunk + between))
            self.decisions += size

    def actor(self, node: simpy.Resource) -> Iterator[Any]:
        """Answers what waits, up to the largest batch."""
        while True:
            asked = [(yield self.inbox.get())]
            while self.inbox.items and sum(size for size, _ in asked) + self.inbox.items[0][0] <= self.shape.max_batch:
                asked.append((yield self.inbox.get()))
            rows, began = sum(size for size, _ in asked), self.env.now
            seconds = self.probe.answer_s(rows)
            if self.shape.gpu_speed:
                yield self.env.timeout(seconds / self.shape.gpu_speed)
            else:
                yield from self.work(node, seconds)
            self.answering += self.env.now - began
            self.batches, self.rows = self.batches + 1, self.rows + rows
            for _, answer in asked:
                answer.succeed()

    def learn(self, node: simpy.Resource) -> Iterator[Any]:
        while True:
            yield from self.work(node, self.probe.learn_s)
            self.learned += 1

    def outcome(self, span: float) -> Outcome:
        probe, shape = self.probe, self.shape
        steps = self.decisions * probe.chunk
        workers, actors = -(-shape.workers // shape.nodes), -(-shape.actors // shape.nodes)
        memory = RAY_MB + BASE_MB + workers * (BASE_MB + probe.worker_mb) + actors * (BASE_MB + probe.network_mb)
        memory += 4 * probe.network_mb + BASE_MB if shape.learner else 0.0  # weights, gradients, two moments
        plasma = 2 * probe.network_mb + shape.workers * shape.envs * 0.1
        return Outcome(3600 * steps / probe.horizon / span, steps / span, 3600 * self.learned / span,
                       self.busy / span / (shape.nodes * shape.cores), self.answering / span / shape.actors,
                       self.rows / max(1, self.batches), memory, plasma)
