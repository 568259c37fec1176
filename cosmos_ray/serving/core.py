"""A policy that answers many clients: checked queries in a bounded queue, a batch at a time. Plain asyncio, no port."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cosmos_ray.deployment import DeployedPolicy, Query
from cosmos_ray.errors import ConfigError, CosmosRayError
from cosmos_ray.inference.batcher import Batcher
from cosmos_ray.memory import enough_memory
from cosmos_ray.serving.wire import BadRequest

ROWS = 16  #: most observations of one request


@dataclass(frozen=True)
class Asked:
    """A query on its way."""

    query: Query
    futures: bool  #: also decode the predicted frames
    arrived: float  #: ``time.monotonic``: the planner's deadline counts from then

    @property
    def seeds(self) -> torch.Tensor:
        """The batcher counts rows by them."""
        return self.query.seeds


@dataclass(frozen=True)
class Answer:
    """What the policy makes of the B observations of one query, from N candidates each."""

    actions: np.ndarray  #: (B, K, d) float32, in the robot's units
    values: np.ndarray  #: (B,) in [0, 1]: the score of the chosen candidate; without planning, the value generated with the actions
    scores: np.ndarray  #: (B, N) in [0, 1]
    chosen: np.ndarray  #: (B,) index of the chosen candidate
    candidates: np.ndarray  #: (B, N, K, d) float32
    futures: dict[str, np.ndarray]  #: {key of the observation: (B, H, W, 3) uint8 after the chunk}; empty when not asked for
    query: Query  #: that was answered


class PolicyServer:
    """Answers observations of many clients from one policy.

    Args:
        max_batch: most rows of a forward pass.
        wait_ms: longest wait for more requests to fill a batch.
        queue: most requests that wait or are computed; one more is refused with status 429.
    """

    def __init__(self, policy: DeployedPolicy, max_batch: int, wait_ms: float, queue: int):
        self.policy, self.queue = policy, queue
        self.answered = self.refused = 0
        self.pending = 0  #: requests that wait or are computed
        self._batcher: Batcher[Asked, Answer] = Batcher(self._answer, max_batch, wait_ms / 1000)

    async def ask(self, observation: Mapping[str, Any], seed: Any = None, futures: bool = False) -> Answer:
        """The policy's answer to one observation, or to B of them. BadRequest for an observation that it does not take (422) and while
        the queue is full (429)."""
        arrived = time.monotonic()
        try:
            asked = Asked(self.policy.query(as_arrays(observation), seed=seed), futures, arrived)
        except ConfigError as error:
            raise self._refuse(str(error), 422) from error
        if len(asked.seeds) > ROWS:
            raise self._refuse(f"{len(asked.seeds)} observations in one request: send at most {ROWS}", 413)
        if self.pending >= self.queue:
            raise self._refuse(f"{self.pending} requests wait already: try again", 429)
        self.pending += 1
        try:
            answer = await self._batcher.submit(asked)
        finally:
            self.pending -= 1
        self.answered += 1
        return answer

    def status(self) -> dict[str, int]:
        return {"answered": self.answered, "refused": self.refused, "pending": self.pending, "batches": self._batcher.batches,
                "rows": self._batcher.rows}

    def _refuse(self, why: str, status: int) -> BadRequest:
        self.refused += 1
        return BadRequest(why, status)

    def _answer(self, asked: list[Asked]) -> list[Answer | CosmosRayError]:
        """One forward pass for all queries with pictures of the same sizes."""
        groups: defaultdict[tuple, list[int]] = defaultdict(list)
        for i, one in enumerate(asked):
            groups[(one.futures, tuple(image.shape[1:] for image in one.query.images))].append(i)
        answers: dict[int, Answer | CosmosRayError] = {}
        for members in groups.values():
            answers |= zip(members, self._try([asked[i] for i in members]), strict=True)
        return [answers[i] for i in range(len(asked))]

    def _try(self, asked: list[Asked]) -> list[Answer | CosmosRayError]:
        """The answers; queries that fail together are asked one by one, so that a bad one fails alone."""
        try:
            with enough_memory("lower inference.max_batch or planner.candidates"):
                return list(self._answer_alike(asked))
        except CosmosRayError as error:
            return [error] if len(asked) == 1 else [answer for one in asked for answer in self._try([one])]

    def _answer_alike(self, asked: list[Asked]) -> list[Answer]:
        queries, policy = [one.query for one in asked], self.policy
        images = [np.concatenate(views) for views in zip(*(query.images for query in queries), strict=True)]
        decision, frames = policy.core.decide(
            images, np.concatenate([query.proprio for query in queries]), [text for query in queries for text in query.instructions],
            torch.cat([query.seeds for query in queries]), policy.steps, policy.planner, asked[0].futures,
            min(one.arrived for one in asked))
        actions, scores, chosen, candidates = (
            part.cpu().numpy() for part in (decision.actions, decision.scores, decision.chosen, decision.candidates))
        values = np.take_along_axis(scores, chosen[:, None], 1)[:, 0]
        shown = None if frames is None else frames.cpu().numpy()  # (rows, cameras, H, W, 3)
        answers, start = [], 0
        for query in queries:
            mine = slice(start, start := start + len(query.seeds))
            futures = {} if shown is None else dict(zip(query.keys, shown[mine].swapaxes(0, 1), strict=True))
            answers.append(Answer(actions[mine], values[mine], scores[mine], chosen[mine], candidates[mine], futures, query))
        return answers


def as_arrays(observation: Any) -> dict[str, Any]:
    """``observation`` with arrays for its nested lists; whole numbers from 0 to 255 in four or three dimensions are a picture's.
    BadRequest."""
    if not isinstance(observation, Mapping):
        raise BadRequest(f"an observation is a dict, not a {type(observation).__name__}", 422)
    out: dict[str, Any] = {}
    for key, value in observation.items():
        if not isinstance(key, str):
            raise BadRequest("a key of the observation is no text", 422)
        if isinstance(value, list) and not all(isinstance(part, str) for part in value):
            try:
                value = np.array(value)
            except ValueError as error:
                raise BadRequest(f"{key} is a list of lists of unlike lengths: send an array", 422) from error
            if value.dtype.kind not in "biuf":
                raise BadRequest(f"{key} has entries that are no numbers", 422)
            if value.ndim >= 3 and value.dtype.kind in "iu" and value.size and value.min() >= 0 and value.max() <= 255:
                value = value.astype(np.uint8)
        out[key] = value
    return out


class Clock:
    """Milliseconds since it was made, for replies."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    @property
    def ms(self) -> float:
        return round(1000 * (time.perf_counter() - self._began), 3)
