"""The state of a foreign environment that runs on MuJoCo, as one flat vector."""

from __future__ import annotations

from typing import Any

import numpy as np

POSES = ("xpos", "xquat")
"""Poses of bodies. MuJoCo leaves them one substep behind the joints, and an environment may read them before the next substep (Fetch
moves its mocap body from there), so they are part of the state."""


class MujocoState:
    """Saves and restores MuJoCo's state, and the numbers that an environment keeps beside it (such as the goal of an episode).

    Args:
        env: the innermost environment, with ``model`` and ``data``.
        before: its numbers (:func:`numbers`) in one episode; those that differ at this moment, in another episode, are part of the state.
    """

    def __init__(self, env: Any, before: dict[str, np.ndarray]):
        import mujoco

        self.mujoco, self.env, self.model, self.data = mujoco, env, env.model, env.data
        self.kind = mujoco.mjtState.mjSTATE_INTEGRATION
        self.physics = np.zeros(mujoco.mj_stateSize(self.model, self.kind))
        now = numbers(env)
        self.kept = [name for name, value in before.items() if name in now and not np.array_equal(value, now[name])]
        self.size = len(self.save())

    def save(self) -> np.ndarray:
        """(S,) float64."""
        self.mujoco.mj_getState(self.model, self.data, self.physics, self.kind)
        poses = [getattr(self.data, name).ravel() for name in POSES]
        return np.concatenate([self.physics, *poses, *(np.ravel(getattr(self.env, name)) for name in self.kept)]).astype(np.float64)

    def restore(self, state: np.ndarray) -> None:
        """Return to a saved state (S,)."""
        start = len(self.physics)
        self.mujoco.mj_setState(self.model, self.data, state[:start], self.kind)
        self.mujoco.mj_forward(self.model, self.data)
        self.mujoco.mj_setState(self.model, self.data, state[:start], self.kind)  # takes back what the forward pass changed
        for name in POSES:
            array = getattr(self.data, name)
            array[:] = state[start : start + array.size].reshape(array.shape)
            start += array.size
        for name in self.kept:
            value = getattr(self.env, name)
            shape, kind = np.shape(value), np.asarray(value).dtype
            read = state[start : start + np.size(value)].reshape(shape).astype(kind)
            setattr(self.env, name, read.copy() if shape else type(value)(read[()]))
            start += np.size(value)


def runs_on_mujoco(env: Any) -> bool:
    """Whether the innermost environment has a MuJoCo model and its data."""
    try:
        import mujoco
    except ImportError:
        return False
    return isinstance(getattr(env, "model", None), mujoco.MjModel) and isinstance(getattr(env, "data", None), mujoco.MjData)


def numbers(env: Any) -> dict[str, np.ndarray]:
    """A copy of every number and array of numbers among the attributes of ``env``, by name; not those of its random generator."""
    return {name: np.array(value) for name, value in vars(env).items() if not name.startswith("_np_random") and _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number | np.bool_) or isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
