"""Demonstrations: a scripted expert under disturbance, labelled with what it would have done (DART, arXiv 1703.09327)."""

from __future__ import annotations

import numpy as np

from cosmos_ray.config.tasks import NoiseMix
from cosmos_ray.sim import tasks
from cosmos_ray.sim.environment import Environment, start
from cosmos_ray.sim.experts import expert
from cosmos_ray.sim.trajectory import Trajectory

CLEAN = NoiseMix(level=0.0, kick_share=0.0)
"""No disturbance."""

_STREAM = 0xDA27
"""Keeps the noise of a seed independent of what the environment draws from the same seed."""


def demonstrate(env: Environment, seed: int, noise: NoiseMix | None = None, render_every: int = 1) -> Trajectory:
    """One expert episode, a function of the seed alone.

    ``actions`` holds what was executed (expert plus noise), ``labels`` the clean expert action in the state it was executed
    in. Not every episode succeeds, least of all under noise: check ``success``.

    Args:
        env: any environment with an expert; it is reset.
        seed: of the initial state and of the noise.
        noise: the disturbance; None takes the task's recommendation, :data:`CLEAN` disturbs nothing.
        render_every: frames are rendered at step 0, at multiples of this number and at the last step; 0 renders only the
            first and the last.

    Raises:
        ConfigError: the task has no expert.
    """
    policy = expert(env)  # a generator: it reads nothing before the first `next`, after the reset
    trajectory = start(env, seed)
    disturbance = _disturbance(env, seed, tasks.spec(env.task).noise if noise is None else noise)
    while not trajectory.done:
        label = next(policy)
        action = label.copy()
        action[:-1] += disturbance[trajectory.length]
        env.advance(action, trajectory, label)
        if render_every and trajectory.length % render_every == 0 and trajectory.length not in trajectory.frames:
            trajectory.frames[trajectory.length] = env.render_state(trajectory.states[-1])
    if trajectory.length not in trajectory.frames:
        trajectory.frames[trajectory.length] = env.render_state(trajectory.states[-1])
    return trajectory


def _disturbance(env: Environment, seed: int, noise: NoiseMix) -> np.ndarray:
    """What is added to every entry but the gripper, for a whole episode: (horizon, d-1) float32."""
    rng = np.random.default_rng([_STREAM, seed])
    width = env.action_dim - 1
    level = noise.level * rng.uniform(*noise.scale)
    innovations = rng.standard_normal((env.horizon, width)) * level * np.sqrt(1 - noise.correlation**2)
    added = np.empty((env.horizon, width))
    current = rng.standard_normal(width) * level
    for step in range(env.horizon):
        added[step] = current
        current = noise.correlation * current + innovations[step]
    if rng.uniform() < noise.kick_share:
        begin = rng.integers(env.horizon // 4)
        added[begin : begin + noise.kick_steps] += rng.standard_normal(width) * noise.kick_level
    return added.astype(np.float32)
