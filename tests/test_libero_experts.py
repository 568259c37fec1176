"""Scripted experts of LIBERO, on fresh placements from each task's own sampler. docs/libero.md has the counts of 20 episodes."""

from __future__ import annotations

import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.seeds import state_seed
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.experts import check_expert, expert
from cosmos_ray.sim.libero.experts import LIBERO_EXPERTS
from cosmos_ray.sim.libero.grasp import Grasp, across, by_rim, choose

QUICK = ("libero_spatial/7", "libero_object/0")  # a bowl on the stove, taken by its rim, and a can, taken whole
CIRCLE = np.stack([np.cos(angles := np.arange(36) * 2 * np.pi / 36), np.sin(angles)], axis=1)
HEIGHTS = np.linspace(0, 0.05, 11)


def episode(env: Environment, seed: int) -> bool:
    """Whether the expert succeeds, without pictures."""
    env.reset(seed)
    policy = expert(env)
    while not env.done:
        env.step(next(policy))
    return env.success


@pytest.mark.parametrize("task", [task if task in QUICK else pytest.param(task, marks=pytest.mark.slow) for task in LIBERO_EXPERTS])
def test_expert_succeeds_on_fresh_placements(task):
    config = SimConfig(task=task)
    check_expert(config)
    env = Environment(config)
    try:
        episodes = 2 if task in QUICK else 6
        assert sum(episode(env, state_seed("demo", 1, index)) for index in range(episodes)) >= episodes - (episodes > 2)
    finally:
        env.close()


def test_a_task_of_libero_without_an_expert_is_refused():
    with pytest.raises(ConfigError, match="no scripted expert for task libero_90/0; there is one for .*libero_object/0 to 9 and"):
        check_expert(SimConfig(task="libero_90/0"))


def test_a_hollow_object_is_pinched_at_its_rim():
    bowl = np.array([[*(0.05 * place), height] for place in CIRCLE for height in HEIGHTS])
    for grasp in by_rim(bowl + [0.3, 0.1, 0.9]):
        away = grasp.position - [0.3, 0.1, 0.95]
        assert abs(np.linalg.norm(away[:2]) - 0.046) < 1e-6 and -0.02 < away[2] < 0
        assert abs(np.cos(grasp.yaw) * away[1] - np.sin(grasp.yaw) * away[0]) < 1e-6  # one finger inside, one outside


def test_a_box_is_taken_across_its_narrow_side():
    box = np.stack(np.meshgrid([-0.1, 0.0, 0.1], [-0.02, 0.0, 0.02], HEIGHTS), axis=-1).reshape(-1, 3)
    grasps = across(box)
    assert grasps and np.isclose(choose(grasps, np.zeros((0, 3)), yaw=0.0).yaw, np.pi / 2)
    assert across(box * [1, 4, 1]) == []  # 16 cm do not fit between the fingers


def test_the_hand_avoids_a_neighbour():
    ways = [Grasp(np.zeros(3), 0.0, 0.0), Grasp(np.zeros(3), np.pi / 2, 0.0)]
    assert choose(ways, np.array([[0.5, 0.5, 0.0]]), yaw=0.1).yaw == 0.0
    assert choose(ways, np.array([[0.05, 0.0, 0.0]]), yaw=0.1).yaw == np.pi / 2
