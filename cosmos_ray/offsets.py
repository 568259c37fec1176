"""Offsets of whole action chunks: what rollouts explore with and what the planner proposes, so that one has seen what the other tries.

Noise that is drawn anew at every control step averages out over a chunk; an offset that stays moves the hand somewhere else.
"""

from __future__ import annotations

import numpy as np


def translations(action_dim: int) -> np.ndarray:
    """(d,) bool: which numbers of an end-effector action move a hand, where only their count is known: the first three of each arm, whose
    action is 7 numbers (with rotation and gripper) or 4 (with the gripper alone)."""
    width = 7 if action_dim % 7 == 0 else 4 if action_dim % 4 == 0 else action_dim
    return np.arange(action_dim) % width < 3


def chunk_offset(seed: int | list[int], action_dim: int, scale: float, moving: tuple[int, ...] = ()) -> np.ndarray:
    """(d,) float32: one offset for every action of a chunk, normal with standard deviation ``scale`` in the numbers that move a hand.

    ``moving`` are these numbers' places (:attr:`Embodiment.moving`); empty leaves them to :func:`translations`.
    """
    chosen = np.isin(np.arange(action_dim), moving) if moving else translations(action_dim)
    return (scale * np.random.default_rng(seed).standard_normal(action_dim) * chosen).astype(np.float32)
