"""A demonstration worker without Ray: the scripted expert's episodes into the replay store."""

from __future__ import annotations

import dataclasses
import time

from cosmos_ray.replay.episode import Episode, EpisodeKey
from cosmos_ray.replay.outbox import Outbox
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.rollout.ticket import Finished, stored_result
from cosmos_ray.sim.demonstration import demonstrate
from cosmos_ray.sim.environment import Environment


class DemonstratorCore:
    """Records expert episodes.

    A disturbed expert fails now and then. Such an episode is no demonstration, but it is experience: it is stored under the
    same seed as a rollout of version -1 (the public code likewise learns values from demonstration replays that fail,
    method section 3).
    """

    def __init__(self, env: Environment, store: ReplayStore, patience_s: float = 120.0):
        self.env, self.store = env, store
        self.outbox = Outbox(store, patience_s)

    def record(self, key: EpisodeKey) -> Finished:
        """Run and commit the demonstration of ``key`` (source "demo"), unless the store has it."""
        failed = failure_key(key)
        for known in (key, failed):
            if (result := stored_result(self.store, known.name)) is not None:
                return result
        began = time.perf_counter()
        trajectory = demonstrate(self.env, key.seed)
        seconds = time.perf_counter() - began
        actual = key if trajectory.success else failed
        new = False
        if trajectory.length:
            info = {"arm": "expert", "seconds": round(seconds, 3), "horizon": self.env.horizon, "fingerprint": self.env.fingerprint}
            new = self.outbox.deliver(Episode.from_trajectory(trajectory, actual, policy_version=-1, info=info))
        return Finished(actual.name, trajectory.success, trajectory.length, trajectory.invalid, new, seconds, -1)


def failure_key(key: EpisodeKey) -> EpisodeKey:
    """Where a failed demonstration goes."""
    return dataclasses.replace(key, source="rollout", run=f"{key.run}:expert")
