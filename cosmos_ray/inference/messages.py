"""What a worker asks of the pool and what it is answered. No torch: a simulator's process starts faster and stays smaller without."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cosmos_ray.config import PlannerConfig
from cosmos_ray.errors import ConfigError, CosmosRayError


class WrongVersion(CosmosRayError):
    """The request insists on a policy version, or a judge, that this actor does not hold (yet): ask again, or ask another."""


@dataclass(frozen=True)
class ActRequest:
    """B observations that want an action chunk each."""

    images: np.ndarray  #: (B, cameras, H, W, 3) uint8
    proprio: np.ndarray  #: (B, p) float32
    instructions: tuple[str, ...]  #: B task descriptions
    seeds: np.ndarray  #: (B,) int64, one per decision: a row's noise depends on it alone, not on the batch it was in
    steps: int = 5  #: network evaluations per chunk
    planner: PlannerConfig | None = None  #: best-of-N, or None for the policy alone
    version: int | None = None  #: insist on this policy version
    judge: str = ""  #: with a version: insist on this checkpoint to judge candidates, "" on the policy itself
    decode_futures: bool = False  #: also return the predicted frames

    def __post_init__(self):
        rows = (len(self.images), len(self.proprio), len(self.instructions), len(self.seeds))
        if len(set(rows)) != 1:
            raise ConfigError(f"a request's images, proprio, instructions and seeds must agree in number, got {rows}")


@dataclass(frozen=True)
class ActReply:
    """Answers to the rows of one request."""

    actions: np.ndarray  #: (B, K, d) float32, physical units
    values: np.ndarray  #: (B,) float32, the policy's value of the chosen chunk, in [-1, 1]
    scores: np.ndarray  #: (B, N) float32 candidate scores in [0, 1]; N = 1 without planning
    chosen: np.ndarray  #: (B,) int64
    version: int  #: policy version that answered
    candidates: np.ndarray  #: (B, N, K, d) float32, every proposed chunk
    futures: np.ndarray | None = None  #: (B, cameras, H, W, 3) uint8 predicted frames at the end of the chunk
