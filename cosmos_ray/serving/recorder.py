"""Served episodes, as the store keeps them: the pictures at each decision, the actions that were executed, the outcome."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cosmos_ray.deployment import DeployedPolicy, Query
from cosmos_ray.errors import ConfigError
from cosmos_ray.replay.format.codec import encode_cameras
from cosmos_ray.replay.format.episode import Episode, EpisodeKey
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.serving.core import Answer, as_arrays
from cosmos_ray.serving.wire import BadRequest

logger = logging.getLogger(__name__)

OPEN = 256  #: most episodes that have begun and not ended
STEPS = 20_000  #: most control steps of an episode
NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclass
class _Open:
    """An episode that has begun."""

    instruction: str = ""
    frames: dict[int, list[bytes]] = field(default_factory=dict)
    proprio: dict[int, np.ndarray] = field(default_factory=dict)
    actions: list[np.ndarray] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    chunk: np.ndarray | None = None  #: (K, d) that was answered last
    busy: bool = False


class Recorder:
    """Keeps the episodes of requests that name one, and commits an episode when its outcome is posted.

    Between two decisions the clients send no proprioception: these rows are interpolated, and training, which reads the rows of pictures,
    never reads them. An episode that nobody ends is dropped with the server.

    Args:
        run: key of the run, of which the episodes are rollouts.
        task: name of the task in the store.
        execute: actions of a chunk that count as executed where a client does not say.
        info: what every episode's ``info`` holds.
    """

    def __init__(self, store: ReplayStore, policy: DeployedPolicy, run: str, task: str, execute: int, info: dict[str, Any]):
        self.store, self.policy, self.run, self.task, self.execute, self.info = store, policy, run, task, execute, info
        self.recorded = 0
        self.open: dict[str, _Open] = {}

    @contextmanager
    def turn(self, name: Any, executed: Any) -> Iterator[Callable[[Answer], None]]:
        """The next decision of an episode. Yields what records the answer, with the observation that was asked about: a request that fails
        before leaves the episode as it was.

        Args:
            executed: what was executed of the chunk before, as their number or as (n, d) actions; None for as many as usual.

        BadRequest.
        """
        _check_name(name)
        if name not in self.open and len(self.open) >= OPEN:
            raise BadRequest(f"{OPEN} episodes have begun and not ended: post their outcome to /episodes/NAME", 429)
        episode = self.open.get(name) or _Open()
        done = self._done(name, episode, executed)

        def record(answer: Answer) -> None:
            query = answer.query
            episode.actions += done
            episode.instruction = episode.instruction or query.instructions[0]
            self._see(episode, query)
            episode.chunk = answer.actions[0]
            episode.decisions.append({"step": len(episode.actions), "value": round(float(answer.values[0]), 4),
                                      "chosen": int(answer.chosen[0]), "scores": [round(float(score), 4) for score in answer.scores[0]]})

        self.open[name] = episode
        episode.busy = True
        try:
            yield record
        finally:
            episode.busy = False
            if not episode.decisions:
                del self.open[name]

    async def end(self, name: str, body: Any) -> dict[str, Any]:
        """Commit an episode whose outcome is known; returns its name in the store.

        ``body``: {"success": truth, "executed": as of the last chunk, "observation": what was seen at the end, "score": in [0, 1]}, all but
        the first may be missing. Without the last observation no training window ends there: the last chunk is kept and not trained on.
        BadRequest; StoreError, and the episode stays open.
        """
        _check_name(name)
        if not isinstance(body, dict) or not isinstance(body.get("success"), bool):
            raise BadRequest("the outcome is {\"success\": true or false, ...}", 422)
        if unknown := sorted(map(str, body.keys() - {"success", "executed", "observation", "score"})):
            raise BadRequest(f"the outcome has {unknown[0]!r}: it takes success, executed, observation and score", 422)
        score = body.get("score")
        if score is not None and not (isinstance(score, int | float) and 0 <= score <= 1):
            raise BadRequest("score is a number within 0 and 1, or missing", 422)
        if name not in self.open:
            raise BadRequest(f"no episode {name!r} has begun", 404)
        episode, last = self.open[name], None
        if body.get("observation") is not None:
            try:
                last = self.policy.query(as_arrays(body["observation"]), seed=0)
            except ConfigError as error:
                raise BadRequest(str(error), 422) from error
        done = self._done(name, episode, body.get("executed"))
        if not episode.actions and not done:
            raise BadRequest(f"episode {name!r} has no executed action: there is nothing to record", 422)
        episode.busy = True
        try:
            finished = self._episode(name, episode, done, last, body["success"], score)
            new = await asyncio.to_thread(self.store.commit, finished)
        finally:
            episode.busy = False
        del self.open[name]
        self.recorded += new
        return {"stored": finished.key.name, "steps": len(finished.actions), "new": bool(new)}

    def _done(self, name: str, episode: _Open, executed: Any) -> list[np.ndarray]:
        """The actions (d,) that were executed since the last decision. BadRequest."""
        if episode.busy:
            raise BadRequest(f"episode {name!r} has a request on its way: send one at a time", 409)
        if episode.chunk is None:
            if executed is not None:
                raise BadRequest(f"episode {name!r} begins with this request: leave 'executed' out", 422)
            return []
        length, size = episode.chunk.shape
        if executed is None:
            executed = min(self.execute, length)
        if isinstance(executed, int) and not isinstance(executed, bool):
            if not 0 <= executed <= length:
                raise BadRequest(f"executed = {executed}: the last chunk had {length} actions", 422)
            done = episode.chunk[:executed]
        else:
            done = as_arrays({"executed": executed})["executed"]
            if not isinstance(done, np.ndarray) or done.ndim != 2 or done.shape[1] != size or done.dtype.kind not in "fiu":
                raise BadRequest(f"executed is a number of actions, or the actions themselves, n x {size}", 422)
            if not np.isfinite(done).all():
                raise BadRequest("executed has a number that is not finite", 422)
        if len(episode.actions) + len(done) > STEPS:
            raise BadRequest(f"the episode is longer than {STEPS} control steps: post its outcome", 413)
        return list(done.astype(np.float32))

    def _see(self, episode: _Open, query: Query) -> None:
        step = len(episode.actions)
        episode.frames[step] = [jpeg for image in query.images for jpeg in encode_cameras(image)]
        episode.proprio[step] = query.proprio[0]

    def _episode(self, name: str, episode: _Open, done: list[np.ndarray], last: Query | None, success: bool,
                 score: float | None) -> Episode:
        episode = replace(episode, frames=dict(episode.frames), proprio=dict(episode.proprio), actions=[*episode.actions, *done])
        if last is not None:
            self._see(episode, last)
        steps, version = len(episode.actions), self.policy.core.version
        seen = sorted(episode.proprio)
        rows = np.stack([episode.proprio[step] for step in seen])
        proprio = np.stack([np.interp(range(steps + 1), seen, column) for column in rows.T], axis=1).astype(np.float32)
        rewards, values = np.zeros(steps, np.float32), np.full(steps, np.nan, np.float32)
        rewards[-1] = float(success)
        for decision in episode.decisions:
            if decision["step"] < steps:
                values[decision["step"]] = decision["value"]
        info: dict[str, Any] = {**self.info, "arm": "served", "decisions": episode.decisions}
        actions = np.stack(episode.actions)
        return Episode(
            key=EpisodeKey(self.run, self.task, "rollout", 0, initial_state=f"served {name}"), instruction=episode.instruction,
            cameras=self.policy.spec.cameras, success=success, episode_return=float(success), timed_out=not success, invalid="",
            policy_version=version, actions=actions, labels=actions, rewards=rewards, proprio=proprio,
            states=np.full((steps + 1, 1), np.nan), step_versions=np.full(steps, version), predicted_values=values,
            frames=episode.frames, info=info, score=score)  # fmt: skip

    def close(self) -> None:
        """Say which episodes are dropped."""
        if self.open:
            logger.warning("%d served episodes were not ended and are dropped: %s", len(self.open), ", ".join(sorted(self.open)[:5]))


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadRequest("an episode's name has 1 to 100 letters, digits, dots, dashes and underscores", 422)
