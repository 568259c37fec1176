"""Demonstrations: a scripted expert acts under disturbance, and each label is the expert's clean action (DART, arXiv 1703.09327)."""

from __future__ import annotations

import numpy as np

from cosmos_ray.config.tasks import NoiseMix, task_spec
from cosmos_ray.errors import ConfigError
from cosmos_ray.seeds import purpose_of
from cosmos_ray.sim.experts import expert
from cosmos_ray.sim.simulation import Simulation, start
from cosmos_ray.sim.trajectory import Trajectory

CLEAN = NoiseMix(level=0.0, kick_share=0.0)
"""No disturbance."""

_STREAM = 0xDA27
"""Keeps the noise of a seed independent of what the environment draws from the same seed."""


def demonstrate(env: Simulation, seed: int, noise: NoiseMix | None = None, render_every: int = 1) -> Trajectory:
    """Run one expert episode. The episode depends on the seed alone.

    ``actions`` are the executed actions (expert plus noise). ``labels`` are the clean expert actions in the same states. Some
    episodes fail, above all under noise: check ``success``.

    Args:
        env: an environment whose task has an expert; this function resets it.
        seed: seed of the initial state and of the noise.
        noise: the disturbance. None takes the task's recommendation; :data:`CLEAN` disturbs nothing.
        render_every: render frames at step 0, at multiples of this number and at the last step; 0 renders only the first
            and the last.

    Raises:
        ConfigError: the task has no expert, or the seed is one of evaluations, whose initial states no demonstration may begin in.
    """
    if purpose_of(seed)[0] == "eval":
        raise ConfigError(f"seed {seed} is of an evaluation's initial state, which is held out: demonstrate from another seed")
    policy = expert(env)  # a generator: it reads nothing before the first `next`, after the reset
    trajectory = start(env, seed)
    disturbance = _disturbance(env, seed, task_spec(env.task).noise if noise is None else noise)
    while not trajectory.done:
        label = next(policy)
        action = label.copy()
        action[:-1] += disturbance[trajectory.length]
        env.advance(action, trajectory, label)
        if render_every and trajectory.length % render_every == 0 and trajectory.length not in trajectory.frames:
            trajectory.frames[trajectory.length] = env.render()
    if trajectory.length not in trajectory.frames:
        trajectory.frames[trajectory.length] = env.render()
    return trajectory


def _disturbance(env: Simulation, seed: int, noise: NoiseMix) -> np.ndarray:
    """Noise of a whole episode, for every action entry but the gripper: (horizon, d-1) float32."""
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
