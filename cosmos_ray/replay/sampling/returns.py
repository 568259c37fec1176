"""Value targets: discounted Monte Carlo returns of a sparse terminal score, in [-1, 1]."""

from __future__ import annotations

import numpy as np

from cosmos_ray.errors import StoreError


def value_targets(length: int, score: float, gamma: float, last_seen: int | None = None) -> np.ndarray:
    """Value of each of the ``length + 1`` states of an episode of ``length`` actions, ``(length + 1,)`` float32.

    With ``h = length - t`` steps from state ``t`` to the end, the target is ``2 * gamma**h * score - 1``. The state after
    the last action (``h = 0``) of an episode of score 1 thus has ``+1``, and every state of one of score 0 has ``-1``.

    Files with as many observations as actions lack the state after the last action. There the episode ends at state
    ``last_seen = length - 1``, which has ``h = 0``, as has the row that repeats it: the reference's ``gamma**(T - 1 - t)``.

    The reference divides the return by the score before rescaling, which gives an episode with a partial score of 0.2
    the targets of a full success (method section 3). Here the scale is 1, so partial credit stays partial. StoreError
    unless ``length >= 0``, ``0 < gamma <= 1`` and ``0 <= score <= 1``.
    """
    if length < 0 or not 0.0 < gamma <= 1.0 or not 0.0 <= score <= 1.0:
        raise StoreError(
            f"value targets need length >= 0, gamma in (0, 1] and score in [0, 1], got {length}, {gamma}, {score}"
        )
    end = length if last_seen is None else last_seen
    steps_to_end = np.maximum(np.arange(end, end - length - 1, -1, dtype=np.float64), 0.0)
    return (2.0 * gamma**steps_to_end * score - 1.0).astype(np.float32)
