"""A rollout worker without Ray: several episodes at once, alternating between two halves so that one steps while one waits."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

import numpy as np

from cosmos_ray.inference.messages import ActReply, ActRequest
from cosmos_ray.offsets import chunk_offset
from cosmos_ray.replay.format.episode import Episode
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.rollout.outbox import PAUSE_S, Outbox
from cosmos_ray.rollout.ticket import EpisodeTicket, Finished, stored_result
from cosmos_ray.seeds import mix_seed
from cosmos_ray.sim.environment import Environment, start
from cosmos_ray.sim.trajectory import Trajectory


class Client(Protocol):
    """Whoever answers requests: the pool, or a model in this process."""

    def submit(self, request: ActRequest) -> Any: ...

    def result(self, pending: Any) -> ActReply: ...


@dataclass
class _Slot:
    """One environment and the episode it is running."""

    env: Environment
    horizon: int  #: the environment's own, in control steps
    ticket: EpisodeTicket | None = None
    trajectory: Trajectory | None = None
    began: float = 0.0
    versions: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    decisions: list[dict] = field(default_factory=list)

    def begin(self, ticket: EpisodeTicket) -> None:
        self.ticket, self.began = ticket, time.perf_counter()
        self.versions, self.values, self.decisions = [], [], []
        self.env.horizon = ticket.horizon or self.horizon
        self.trajectory = start(self.env, ticket.key.seed)


@dataclass
class _Half:
    """Slots whose request travels together."""

    slots: list[_Slot]
    asked: list[_Slot] = field(default_factory=list)
    pending: Any = None


class RolloutCore:
    """Runs tickets to their end and commits each episode to the store before reporting it.

    While the store cannot be written, finished episodes wait in memory and are tried again for ``patience_s`` seconds; those
    that are running go on, no new one begins before they are stored. StoreUnavailable after that.

    Args:
        make_env: builds one environment; called ``envs`` times.
        execute: actions of a chunk to run before asking again; 0 runs the whole chunk.
        steps: network evaluations per chunk.
    """

    def __init__(self, make_env: Callable[[], Environment], envs: int, store: ReplayStore, client: Client, *, steps: int, execute: int = 0,
                 patience_s: float = 120.0):
        slots = [_Slot(env, env.horizon) for env in (make_env() for _ in range(envs))]
        self._halves = [_Half(slots[: (envs + 1) // 2])] + ([_Half(slots[(envs + 1) // 2 :])] if envs > 1 else [])
        self._queue: deque[EpisodeTicket] = deque()
        self._finished: list[Finished] = []
        self.store, self.client, self.steps, self.execute = store, client, steps, execute
        self.outbox = Outbox(store, patience_s)

    def advance(self, tickets: list[EpisodeTicket], seconds: float) -> list[Finished]:
        """Take on more tickets and work for about ``seconds``, less when nothing is left to do; returns what finished since.

        A ticket whose episode the store already holds is reported at once and not run again.
        """
        self._queue.extend(tickets)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            busy = [self._turn(half) for half in self._halves]
            self._store_finished()
            if not any(busy):
                if not self.outbox and not self._queue:
                    break
                time.sleep(PAUSE_S)
        finished, self._finished = self._finished, []
        return finished

    def _turn(self, half: _Half) -> bool:
        """Act on the answer this half waits for, then ask for the next; whether it still has work."""
        if half.pending is not None:
            reply = self.client.result(half.pending)
            half.pending = None
            for row, slot in enumerate(half.asked):
                self._act(slot, reply, row)
        for slot in half.slots:
            while slot.ticket is None and self._queue and not self.outbox and self._begin(slot, self._queue[0]):
                self._queue.popleft()
        # One request carries one setting: the episodes that share it with the first, the others wait for their turn.
        active = [slot for slot in half.slots if slot.ticket is not None]
        setting = attrgetter("ticket.planner", "ticket.version", "ticket.judge")
        half.asked = [s for s in active if setting(s) == setting(active[0])]
        if half.asked:
            half.pending = self.client.submit(self._request(half.asked))
        return bool(half.asked)

    def _begin(self, slot: _Slot, ticket: EpisodeTicket) -> bool:
        """Begin an episode or find it stored; False if the store cannot tell at the moment."""
        reached, known = self.outbox.attempt(lambda: stored_result(self.store, ticket.key.name))
        if known is not None:
            self._finished.append(known)
        elif reached:
            slot.begin(ticket)
        return reached

    def _request(self, slots: list[_Slot]) -> ActRequest:
        return ActRequest(
            images=np.stack([s.trajectory.frames[s.trajectory.length] for s in slots]),
            proprio=np.stack([s.trajectory.proprio[-1] for s in slots]),
            instructions=tuple(s.trajectory.instruction for s in slots),
            seeds=np.array([mix_seed(s.ticket.noise_seed, s.trajectory.length) for s in slots]),
            steps=self.steps, planner=slots[0].ticket.planner, version=slots[0].ticket.version, judge=slots[0].ticket.judge)

    def _act(self, slot: _Slot, reply: ActReply, row: int) -> None:
        """Execute one answered chunk and, where that ends the episode, commit it."""
        ticket, trajectory = slot.ticket, slot.trajectory
        chunk = intended = np.clip(reply.actions[row][: self.execute or None], -1, 1)
        if noise := _exploration(ticket, trajectory.length, chunk.shape):
            chunk = np.clip(chunk + sum(noise), -1, 1).astype(np.float32)
        before = trajectory.length
        render_at = frame_offsets(before, len(chunk), len(reply.actions[row]), ticket.frame_stride)
        slot.env.execute(chunk, trajectory, render_at, labels=intended)
        done = trajectory.length - before
        slot.versions += [reply.version] * done
        slot.values += [float(reply.values[row])] + [np.nan] * (done - 1) if done else []
        slot.decisions.append({"step": before, "value": round(float(reply.values[row]), 4), "chosen": int(reply.chosen[row]),
                               "scores": [round(float(s), 4) for s in reply.scores[row]]})
        if trajectory.done:
            self._commit(slot)

    def _commit(self, slot: _Slot) -> None:
        ticket, trajectory = slot.ticket, slot.trajectory
        slot.ticket = slot.trajectory = None
        seconds = time.perf_counter() - slot.began
        version = slot.versions[0] if slot.versions else -1
        finished = Finished(ticket.key.name, trajectory.success, trajectory.length, trajectory.invalid, False, seconds, version)
        if trajectory.length:
            info = {"arm": ticket.arm, "noise_seed": ticket.noise_seed, "action_noise": ticket.action_noise,
                    "chunk_noise": ticket.chunk_noise, "steps": self.steps,
                    "candidates": ticket.planner.candidates if ticket.planner else 1, "decisions": slot.decisions,
                    "seconds": round(seconds, 3), "horizon": slot.env.horizon, "fingerprint": slot.env.fingerprint}
            episode = Episode.from_trajectory(trajectory, ticket.key, policy_version=version, step_versions=slot.versions,
                                              predicted_values=slot.values, info=info)
            self.outbox.put(episode, finished)
            self._store_finished()
        else:
            self._finished.append(finished)

    def _store_finished(self) -> None:
        self._finished += [dataclasses.replace(finished, new=new) for finished, new in self.outbox.flush()]

    def close(self) -> None:
        """Release the simulators."""
        for half in self._halves:
            for slot in half.slots:
                slot.env.close()


def _exploration(ticket: EpisodeTicket, step: int, shape: tuple[int, int]) -> list[np.ndarray]:
    """What is added to the chunk (K, d) that begins at control step ``step``, a function of the ticket alone."""
    noise = []
    if ticket.action_noise:
        noise.append(ticket.action_noise * np.random.default_rng([ticket.noise_seed, step]).standard_normal(shape))
    if ticket.chunk_noise and np.random.default_rng([ticket.noise_seed, step, 1]).random() < 0.5:
        noise.append(chunk_offset([ticket.noise_seed, step, 2], shape[1], ticket.chunk_noise))
    return noise


def frame_offsets(before: int, executed: int, chunk: int, stride: int) -> tuple[int, ...]:
    """Offsets 1..executed, from step ``before``, whose frames training windows need.

    A window starts at a decision (every ``executed`` steps) or at a multiple of ``stride``, and ends ``chunk`` steps later; where
    ``executed`` or ``stride`` does not divide the chunk, those ends are steps of their own.
    """
    periods = [executed] + ([stride] if stride else [])

    def needed(step: int) -> bool:
        return any(step % p == 0 or (step >= chunk and (step - chunk) % p == 0) for p in periods)

    return tuple(offset for offset in range(1, executed + 1) if needed(before + offset))
