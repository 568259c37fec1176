"""The trace of one planned episode: what the filmstrip draws."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class EpisodeTrace:
    """A planned episode, decision by decision. Every image is (cameras, H, W, 3) uint8."""

    task: str
    seed: int  #: of the initial state
    cameras: tuple[str, ...]
    candidates: int
    success: bool = False
    length: int = 0  #: control steps
    steps: list[int] = field(default_factory=list)  #: control step of each decision
    observed: list[np.ndarray] = field(default_factory=list)  #: frames at the decision
    imagined: list[np.ndarray] = field(default_factory=list)  #: predicted frames at the end of the chosen chunk
    happened: list[np.ndarray] = field(default_factory=list)  #: true frames there
    scores: list[list[float]] = field(default_factory=list)  #: per candidate, in [0, 1]
    chosen: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)  #: the policy's own value of the chosen chunk, in [-1, 1]
