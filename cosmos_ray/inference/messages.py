"""What a worker asks the pool, and what the pool answers. Without torch, so that a simulator process starts fast and stays small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cosmos_ray.config import PlannerConfig
from cosmos_ray.errors import ConfigError, CosmosRayError


class WrongVersion(CosmosRayError):
    """This actor does not hold the policy version or the planning network that the request names: ask again, or ask another actor."""


class Busy(CosmosRayError):
    """This actor's queue is full: ask again, or ask another actor."""


class Expired(CosmosRayError):
    """The request waited so long that nobody awaits its answer any more."""


@dataclass(frozen=True)
class ActingPolicy:
    """Which policy acts, and how it chooses a chunk. The three travel together, from an episode's ticket to the actor that answers."""

    version: int | None = None  #: the policy version that must answer; None accepts the newest
    planner: PlannerConfig | None = None  #: best-of-N planning, or None for the policy alone
    planning_checkpoint: str = ""  #: with a version: checkpoint of the planning network that must score candidates; "" is the policy itself


@dataclass(frozen=True)
class ActRequest:
    """B observations; each asks for one action chunk."""

    images: np.ndarray  #: (B, cameras, H, W, 3) uint8
    proprio: np.ndarray  #: (B, p) float32
    instructions: tuple[str, ...]  #: B task descriptions
    seeds: np.ndarray  #: (B,) int64, one per decision: a row's noise depends on its seed alone, not on its batch
    steps: int = 5  #: network evaluations per chunk
    acting: ActingPolicy = ActingPolicy()
    decode_futures: bool = False  #: also return the predicted frames
    within_s: float | None = None  #: seconds that the answer is awaited for; the actor drops the request after that. None is for ever
    arrived: float | None = None  #: ``time.monotonic`` of the process that answers, which a deadline counts from; None is now

    def __post_init__(self):
        rows = (len(self.images), len(self.proprio), len(self.instructions), len(self.seeds))
        if len(set(rows)) != 1:
            raise ConfigError(f"a request's images, proprio, instructions and seeds must agree in number, got {rows}")


@dataclass(frozen=True)
class ActReply:
    """Answers to the B rows of one request, from N candidates each."""

    actions: np.ndarray  #: (B, K, d) float32, physical units
    values: np.ndarray  #: (B,) float32, the policy's value of the chosen chunk, in [-1, 1]
    scores: np.ndarray  #: (B, N) float32 candidate scores in [0, 1]; N is 1 without planning
    chosen: np.ndarray  #: (B,) int64, index of the executed candidate
    version: int  #: policy version that answered
    candidates: np.ndarray  #: (B, N, K, d) float32, every proposed chunk
    futures: np.ndarray | None = None  #: (B, cameras, H, W, 3) uint8 predicted frames at the end of the chunk
    autopilot: dict[str, Any] | None = None  #: what the planner chose for ``planner.deadline_ms``: plain numbers and words
    load: int = 0  #: rows that waited at the actor, or were computed, when it sent the answer
    pool: int = 0  #: how often the pool had changed, as far as the actor knew; a client that knows of fewer changes asks the actor
