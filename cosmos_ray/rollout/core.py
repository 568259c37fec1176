"""A rollout worker without Ray: several episodes at once, alternating between two halves so that one steps while one waits."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cosmos_ray.inference.messages import ActReply, ActRequest
from cosmos_ray.offsets import chunk_offset
from cosmos_ray.replay.format.episode import Episode
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.rollout.outbox import PAUSE_S, Outbox
from cosmos_ray.rollout.ticket import EpisodeTicket, Finished, SimulatorDied, decision_noise_seed, stored_result
from cosmos_ray.sim.child import SimulatorChild, SimulatorLost
from cosmos_ray.sim.trajectory import Trajectory

if TYPE_CHECKING:  # a worker's own process needs no simulator
    from cosmos_ray.sim.simulators import Simulators


class Client(Protocol):
    """Whoever answers requests: the pool, or a model in this process."""

    def submit(self, request: ActRequest) -> Any: ...

    def result(self, pending: Any) -> ActReply: ...


@dataclass
class _Running:
    """An episode that has begun and is not stored yet."""

    ticket: EpisodeTicket
    trajectory: Trajectory
    began: float  #: time.perf_counter() of the reset
    versions: list[int] = field(default_factory=list)  #: policy version of each control step
    values: list[float] = field(default_factory=list)  #: predicted value of each control step, nan inside a chunk
    decisions: list[dict] = field(default_factory=list)


@dataclass
class _Slot:
    """A place among the simulators, and the episode that runs there."""

    place: int
    running: _Running | None = None


@dataclass
class _Half:
    """Slots whose requests travel together."""

    slots: list[_Slot]
    asked: list[_Slot] = field(default_factory=list)  #: slots that wait for the pending answer, in the order of its rows
    pending: Any = None
    answered: deque[tuple[_Slot, ActReply, int]] = field(default_factory=deque)  #: slot, answer and row in it, to be executed


class RolloutCore:
    """Runs tickets to their end and commits each episode to the store before reporting it.

    While the store cannot be written, finished episodes wait in memory and :class:`Outbox` tries them again for ``patience_s``
    seconds. Running episodes go on; a new one begins once the waiting ones are stored. StoreUnavailable after that.

    An episode that breaks the simulators' process is reported as broken. The others go on in the next process from where they were.

    Args:
        simulators: as many episodes run at once as they have places.
        execute: actions of a chunk that run before the next request; 0 runs the whole chunk.
        steps: network evaluations per chunk.
    """

    def __init__(self, simulators: Simulators | SimulatorChild, store: ReplayStore, client: Client, *, steps: int, execute: int = 0,
                 patience_s: float = 120.0):
        slots = [_Slot(place) for place in range(simulators.count)]
        middle = (len(slots) + 1) // 2
        self._halves = [_Half(half) for half in (slots[:middle], slots[middle:]) if half]
        self._queue: deque[EpisodeTicket] = deque()
        self._finished: list[Finished | SimulatorDied] = []
        self._generation = simulators.generation
        self.simulators, self.store, self.client, self.steps, self.execute = simulators, store, client, steps, execute
        self.outbox = Outbox(store, patience_s)

    def advance(self, tickets: list[EpisodeTicket], seconds: float) -> list[Finished | SimulatorDied]:
        """Take on more tickets, work for about ``seconds``, and return what finished and died since the last call.

        Returns early when nothing is left to do, and in time while the simulators start. Reports a ticket at once, and does not run it,
        when the store holds its episode.
        """
        self._queue.extend(tickets)
        until = time.perf_counter() + seconds
        while (left := until - time.perf_counter()) > 0:
            self._store_finished()
            ready = self.simulators.ready(left)
            self._finished += [SimulatorDied(why, "all its episodes go on in the next one") for why in self.simulators.deaths]
            self.simulators.deaths.clear()
            if not ready or not self._restored():
                continue
            busy = [self._turn(half) for half in self._halves]
            self._store_finished()
            if not any(busy):
                if not self.outbox and not self._queue:
                    break
                time.sleep(PAUSE_S)
        finished, self._finished = self._finished, []
        return finished

    def _restored(self) -> bool:
        """Have the running episodes go on in simulators that lost them. False when that broke the simulators again."""
        generation = self.simulators.generation
        if generation != self._generation:
            for slot in [slot for half in self._halves for slot in half.slots]:
                if (running := slot.running) is None:
                    continue
                if not self.simulators.facts[running.ticket.key.task].restorable:  # the episode begins again, by its seed
                    slot.running = None
                    self._queue.appendleft(running.ticket)
                else:
                    restore = partial(self.simulators.restore, slot.place, running.trajectory.last(), running.ticket.horizon)
                    if not self._attempt(slot, running.ticket, restore)[0]:
                        return False
            self._generation = generation
        return True

    def _attempt(self, slot: _Slot, ticket: EpisodeTicket, order: Callable[[], Any]) -> tuple[bool, Any]:
        """(True, result of ``order``), or (False, None) after it broke the simulators: then the ticket is reported."""
        try:
            return True, order()
        except SimulatorLost as error:
            slot.running = None
            self._finished.append(SimulatorDied(str(error), f"{ticket.key.name} is broken off, its other episodes go on in the next one"))
            self._finished.append(Finished(ticket.key.name, False, 0, "", False, 0.0, -1, broken=str(error)))
            return False, None

    def _turn(self, half: _Half) -> bool:
        """Act on the answer that this half waits for, then ask for the next one. Returns whether the half still has work."""
        if half.pending is not None:
            reply = self.client.result(half.pending)
            half.pending = None
            half.answered.extend((slot, reply, row) for row, slot in enumerate(half.asked))
        while half.answered:
            if self.simulators.generation != self._generation:
                return True  # the simulators start again: later
            slot, reply, row = half.answered.popleft()
            if slot.running is not None:
                self._act(slot, slot.running, reply, row)
        for slot in half.slots:
            while slot.running is None and self._queue and not self.outbox and self.simulators.generation == self._generation:
                if not self._begin(slot, self._queue[0]):
                    break
                self._queue.popleft()
        if self.simulators.generation != self._generation:
            return True
        # One request carries one acting policy: episodes that share it with the first one ask now, the others wait for their turn.
        active = [(slot, slot.running) for slot in half.slots if slot.running is not None]
        asked = [(slot, running) for slot, running in active if running.ticket.acting == active[0][1].ticket.acting]
        half.asked = [slot for slot, _ in asked]
        if asked:
            half.pending = self.client.submit(self._request([running for _, running in asked]))
        return bool(asked)

    def _begin(self, slot: _Slot, ticket: EpisodeTicket) -> bool:
        """Begin an episode, or report it if the store holds it. False if the store cannot be asked at the moment."""
        reached, known = self.outbox.attempt(lambda: stored_result(self.store, ticket.key.name))
        if known is not None:
            self._finished.append(known)
        elif reached:
            began = time.perf_counter()
            begin = partial(self.simulators.begin, slot.place, ticket.key.seed, ticket.horizon, ticket.key.task)
            started, trajectory = self._attempt(slot, ticket, begin)
            if started:
                slot.running = _Running(ticket, trajectory, began)
        return reached

    def _request(self, episodes: list[_Running]) -> ActRequest:
        trajectories = [episode.trajectory for episode in episodes]
        return ActRequest(
            images=np.stack([t.frames[t.length] for t in trajectories]),
            proprio=np.stack([t.proprio[-1] for t in trajectories]),
            instructions=tuple(t.instruction for t in trajectories),
            seeds=np.array([decision_noise_seed(e.ticket.noise_seed, e.trajectory.length) for e in episodes]),
            steps=self.steps, acting=episodes[0].ticket.acting)

    def _act(self, slot: _Slot, episode: _Running, reply: ActReply, row: int) -> None:
        """Execute one answered chunk; commit the episode if the chunk ends it."""
        ticket, trajectory = episode.ticket, episode.trajectory
        chunk = intended = np.clip(reply.actions[row][: self.execute or None], -1, 1)
        if noise := _exploration(ticket, trajectory.length, chunk.shape, self.simulators.facts[ticket.key.task].moving):
            chunk = np.clip(chunk + sum(noise), -1, 1).astype(np.float32)
        before = trajectory.length
        render_at = frame_offsets(before, len(chunk), len(reply.actions[row]), ticket.frame_stride)
        executed, piece = self._attempt(slot, ticket, partial(self.simulators.execute, slot.place, chunk, render_at, intended))
        if not executed:
            return
        trajectory.extend(piece)
        done = trajectory.length - before
        episode.versions += [reply.version] * done
        episode.values += [float(reply.values[row])] + [np.nan] * (done - 1) if done else []
        episode.decisions.append({"step": before, "value": round(float(reply.values[row]), 4), "chosen": int(reply.chosen[row]),
                                  "scores": [round(float(s), 4) for s in reply.scores[row]],
                                  **({"autopilot": reply.autopilot} if reply.autopilot else {})})
        if trajectory.done:
            slot.running = None
            self._commit(episode)

    def _commit(self, episode: _Running) -> None:
        ticket, trajectory, facts = episode.ticket, episode.trajectory, self.simulators.facts[episode.ticket.key.task]
        seconds = time.perf_counter() - episode.began
        version = episode.versions[0] if episode.versions else -1
        finished = Finished(ticket.key.name, trajectory.success, trajectory.length, trajectory.invalid, False, seconds, version)
        if trajectory.length:
            planner = ticket.acting.planner
            info = {"arm": ticket.arm, "noise_seed": ticket.noise_seed, "action_noise": ticket.action_noise,
                    "chunk_noise": ticket.chunk_noise, "steps": self.steps, "candidates": planner.candidates if planner else 1,
                    "decisions": episode.decisions, "seconds": round(seconds, 3), "horizon": ticket.horizon or facts.horizon,
                    "control_freq": facts.control_freq, "fingerprint": facts.fingerprint}
            self.outbox.put(Episode.from_trajectory(trajectory, ticket.key, policy_version=version, step_versions=episode.versions,
                                                    predicted_values=episode.values, info=info), finished)
            self._store_finished()
        else:
            self._finished.append(dataclasses.replace(finished, broken=f"broke at its first step: {trajectory.invalid}"))

    def _store_finished(self) -> None:
        self._finished += [dataclasses.replace(finished, new=new) for finished, new in self.outbox.flush()]

    def close(self) -> None:
        """Release the simulators."""
        self.simulators.close()


def _exploration(ticket: EpisodeTicket, step: int, shape: tuple[int, ...], moving: tuple[int, ...]) -> list[np.ndarray]:
    """Noise for the chunk (K, d) that begins at control step ``step``: arrays (K, d) or (d,), a function of the ticket and of which
    numbers of an action move a hand."""
    noise = []
    if ticket.action_noise:
        noise.append(ticket.action_noise * np.random.default_rng([ticket.noise_seed, step]).standard_normal(shape))
    if ticket.chunk_noise and np.random.default_rng([ticket.noise_seed, step, 1]).random() < 0.5:
        noise.append(chunk_offset([ticket.noise_seed, step, 2], shape[1], ticket.chunk_noise, moving))
    return noise


def frame_offsets(before: int, executed: int, chunk: int, stride: int) -> tuple[int, ...]:
    """Offsets 1..executed, from step ``before``, whose frames training windows need.

    A window starts at a decision (every ``executed`` steps) or at a multiple of ``stride``, and ends ``chunk`` steps later. Those
    ends are further steps where ``executed`` or ``stride`` does not divide the chunk.
    """
    periods = [executed] + ([stride] if stride else [])

    def needed(step: int) -> bool:
        return any(step % p == 0 or (step >= chunk and (step - chunk) % p == 0) for p in periods)

    return tuple(offset for offset in range(1, executed + 1) if needed(before + offset))
