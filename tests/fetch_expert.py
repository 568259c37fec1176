"""An expert of your own (``sim.expert tests.fetch_expert:reach``), for the Fetch tasks of Gymnasium-Robotics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def reach(env) -> Iterator[np.ndarray]:
    """FetchReach: straight to the goal. An action is (dx, dy, dz, gripper)."""
    while True:
        seen = env.observation
        yield np.append(np.clip(8 * (seen["desired_goal"] - seen["achieved_goal"]), -1, 1), 0.0)


def soon_over(env) -> Iterator[np.ndarray]:
    """Ends too early."""
    yield np.zeros(4)
