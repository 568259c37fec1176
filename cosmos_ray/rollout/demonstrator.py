"""A demonstration worker without Ray: the scripted expert's episodes into the replay store."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from typing import TYPE_CHECKING

from cosmos_ray.replay.format.episode import Episode, EpisodeKey
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.rollout.outbox import PAUSE_S, Outbox
from cosmos_ray.rollout.ticket import Finished, SimulatorDied, stored_result
from cosmos_ray.sim.child import SimulatorChild, SimulatorLost

if TYPE_CHECKING:  # a worker's own process needs no simulator
    from cosmos_ray.sim.simulators import Simulators


class DemonstratorCore:
    """Records expert episodes, at the first place of its simulators.

    A disturbed expert fails now and then. A failed episode is no demonstration, but it is experience: the store keeps it under the
    same seed as a rollout of version -1. The public code likewise learns values from demonstration replays that fail (method section 3).
    """

    def __init__(self, simulators: Simulators | SimulatorChild, store: ReplayStore, patience_s: float = 120.0):
        self.simulators, self.store = simulators, store
        self.outbox = Outbox(store, patience_s)
        self._queue: deque[EpisodeKey] = deque()

    def advance(self, keys: list[EpisodeKey], seconds: float) -> list[Finished | SimulatorDied]:
        """Run and commit the demonstrations of ``keys`` (source "demo") that the store lacks; returns what finished and died since.

        Returns after ``seconds`` while the simulators start, and while the store is unavailable: call again, for up to ``patience_s``
        seconds, then StoreUnavailable is raised. No demonstration begins while another one waits to be stored.
        """
        self._queue.extend(keys)
        until = time.perf_counter() + seconds
        finished: list[Finished | SimulatorDied] = []
        while self._queue or self.outbox:
            if self._queue and not self.simulators.ready(max(0.0, until - time.perf_counter())):
                if time.perf_counter() >= until:
                    break
                continue
            finished += [SimulatorDied(why, "no episode was under way") for why in self.simulators.deaths]
            self.simulators.deaths.clear()
            if not self.outbox:
                reached, known = self.outbox.attempt(lambda: self._known(self._queue[0]))
                if reached:
                    finished += [known] if known is not None else self._run(self._queue[0])
                    self._queue.popleft()
            finished += [dataclasses.replace(tag, new=new) for tag, new in self.outbox.flush()]
            if self.outbox.failing:
                if time.perf_counter() >= until:
                    break
                time.sleep(PAUSE_S)
        return finished

    def record(self, key: EpisodeKey) -> Finished:
        """:meth:`advance` with one demonstration, until it is stored."""
        answers = self.advance([key], PAUSE_S)
        while not (finished := [answer for answer in answers if isinstance(answer, Finished)]):
            answers = self.advance([], PAUSE_S)
        return finished[0]

    def _known(self, key: EpisodeKey) -> Finished | None:
        return next((known for k in (key, failure_key(key)) if (known := stored_result(self.store, k.name)) is not None), None)

    def _run(self, key: EpisodeKey) -> list[Finished | SimulatorDied]:
        """Run a demonstration and put its episode into the outbox. Returns the result of an episode that has nothing to store."""
        began = time.perf_counter()
        try:
            trajectory = self.simulators.demonstrate(0, key.seed, key.task)
        except SimulatorLost as error:
            return [SimulatorDied(str(error), f"{key.name} is broken off"),
                    Finished(key.name, False, 0, "", False, 0.0, -1, broken=str(error))]
        facts = self.simulators.facts[key.task]
        seconds = time.perf_counter() - began
        actual = key if trajectory.success else failure_key(key)
        finished = Finished(actual.name, trajectory.success, trajectory.length, trajectory.invalid, False, seconds, -1)
        if trajectory.length:
            info = {"arm": "expert", "seconds": round(seconds, 3), "horizon": facts.horizon, "control_freq": facts.control_freq,
                    "fingerprint": facts.fingerprint}
            self.outbox.put(Episode.from_trajectory(trajectory, actual, policy_version=-1, info=info), finished)
            return []
        return [dataclasses.replace(finished, broken=f"broke at its first step: {trajectory.invalid}")]


def failure_key(key: EpisodeKey) -> EpisodeKey:
    """The key under which a failed demonstration is stored."""
    return dataclasses.replace(key, source="rollout", run=f"{key.run}:expert")
