"""Value targets: discounted Monte Carlo returns of a sparse terminal reward, in [-1, 1]."""

from __future__ import annotations

import numpy as np

from cosmos_ray.errors import StoreError


def value_targets(length: int, success: bool, gamma: float, terminal_reward: float = 1.0) -> np.ndarray:
    """Value of each of the ``length + 1`` states of an episode of ``length`` actions, ``(length + 1,)`` float32.

    With ``h = length - t`` steps from state ``t`` to the end, the return is ``G_t = gamma**h * terminal_reward`` and
    the target ``2 * G_t - 1``. The state after the last action of a success (``h = 0``) thus has ``+1``, and every
    state of a failure ``-1``. (The reference writes ``gamma**(T - 1 - t)`` because its ``T`` counts states.)

    The reference divides ``G_t`` by ``terminal_reward`` before rescaling, which gives an episode with a partial score
    of 0.2 the targets of a full success. Here the scale is 1, so partial credit stays partial. StoreError unless
    ``length >= 0``, ``0 < gamma <= 1`` and ``0 <= terminal_reward <= 1``.
    """
    if length < 0 or not 0.0 < gamma <= 1.0 or not 0.0 <= terminal_reward <= 1.0:
        raise StoreError(
            f"value targets need length >= 0, gamma in (0, 1] and terminal_reward in [0, 1], got {length}, {gamma}, "
            f"{terminal_reward}"
        )
    if not success:
        return np.full(length + 1, -1.0, dtype=np.float32)
    steps_to_end = np.arange(length, -1, -1, dtype=np.float64)
    return (2.0 * gamma**steps_to_end * terminal_reward - 1.0).astype(np.float32)
