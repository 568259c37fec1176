"""A policy or demonstrations of another robot than the simulation's are refused before anything is trained or played."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cosmos_ray.config import RunConfig, SimConfig
from cosmos_ray.embodiment import Embodiment
from cosmos_ray.errors import ConfigError
from cosmos_ray.fit import check_fits
from cosmos_ray.model.checkpoint import read_description, save_policy
from cosmos_ray.model.policy import build
from cosmos_ray.model.spec import make_spec
from cosmos_ray.replay.format.episode import Episode, EpisodeKey
from cosmos_ray.run import Run, open_run
from cosmos_ray.sim.embodiment import simulated
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.simulation import start
from cosmos_ray.stages.pretrain import pretrain
from cosmos_ray.stages.training import make_initial_policy
from cosmos_ray.use import Use

UR5E = SimConfig(robots=("UR5e",), actions="pose", horizon=20)


def demonstrate(run: Run, sim: SimConfig) -> None:
    """Two short random episodes in the simulation ``sim``, as demonstrations of ``run``."""
    env = Environment(sim)
    for seed in range(2):
        trajectory = start(env, seed)
        env.execute(np.random.default_rng(seed).uniform(-1, 1, (10, env.action_dim)), trajectory, tuple(range(1, 11)))
        trajectory.success = True
        key = EpisodeKey(run.folder.identity.key, sim.task, "demo", seed)
        run.folder.store().commit(Episode.from_trajectory(trajectory, key, policy_version=-1))
    env.close()


def test_demonstrations_of_another_robot_are_refused_with_both_sizes(tmp_path):
    config = RunConfig(root=str(tmp_path), name="a", sim=SimConfig(actions="pose"))
    with open_run(config, Use(needs_ray=False), quiet=True) as run:
        demonstrate(run, UR5E)
        with pytest.raises(ConfigError) as caught:
            make_initial_policy(run)
        assert "13 numbers of proprioception" in str(caught.value) and "9 numbers of proprioception" in str(caught.value)
        assert "Lift with Panda under OSC_POSE" in str(caught.value) and "\n" not in str(caught.value)
        assert not run.folder.checkpoint("initial").exists()


def test_a_policy_learns_the_sizes_of_its_robot_and_is_refused_on_another(tmp_path):
    config = RunConfig(root=str(tmp_path), name="a", sim=UR5E)
    with open_run(config, Use(needs_ray=False), quiet=True) as run:
        demonstrate(run, UR5E)
        make_initial_policy(run)
        checkpoint = run.folder.checkpoint("initial")
        spec = read_description(checkpoint)[0]
        assert (spec.action_dim, spec.proprio_dim, spec.moving) == (7, 13, (0, 1, 2))
        elsewhere = dataclasses.replace(run, config=dataclasses.replace(config, sim=SimConfig()))
        with pytest.raises(ConfigError, match="7 numbers per action and 13 .* simulation of 4 numbers per action and 9 "):
            elsewhere.pool(checkpoint)


def test_a_policy_of_another_robot_than_the_demonstrations_does_not_begin_to_train(tmp_path):
    """As after `import` of a released policy: checkpoint `initial` is there, so that nothing is fitted on the demonstrations."""
    config = RunConfig(root=str(tmp_path), name="a", sim=UR5E)
    with open_run(config, Use(needs_ray=False), quiet=True) as run:
        demonstrate(run, UR5E)
        save_policy(build(make_spec(config.model, UR5E.cameras, 7, 9), seed=0), run.folder.checkpoint("initial"), 1, {})
        with pytest.raises(ConfigError, match="policy of 9 numbers of proprioception cannot learn from episodes of 13 .* new run"):
            pretrain(run)


def test_joint_actions_of_as_many_numbers_are_not_taken_for_those_of_a_hand():
    joints = simulated(SimConfig(robots=("UR5e",), controller="JOINT_POSITION"))
    hand = simulated(UR5E)
    assert (joints.action_dim, joints.proprio_dim) == (hand.action_dim, hand.proprio_dim) == (7, 13)
    with pytest.raises(ConfigError, match="numbers 0,1,2,3,4,5 .* numbers 0,1,2 "):
        check_fits("the policy", joints, UR5E)
    assert not hand.misfit(Embodiment(hand.cameras, 7, 13)), "a policy that does not say it fits, as released ones"


def test_a_chunk_that_no_latent_frame_holds_is_refused_with_the_robots_true_size(tmp_path):
    sim = SimConfig(robots=("PandaDexRH",), actions="pose")
    config = RunConfig(root=str(tmp_path), name="a", sim=sim)
    chunk = int(np.prod(make_spec(config.model, ("a",), 12, 19).frame_shape)) // 12 + 1
    too_long = dataclasses.replace(config, model=dataclasses.replace(config.model, chunk=chunk))
    with pytest.raises(ConfigError, match=f"model.chunk = {chunk} actions of 12 numbers"), open_run(too_long, Use(needs_ray=False)):
        raise AssertionError("opened")
    assert not (tmp_path / "a").exists()


def test_the_place_of_moving_numbers_survives_a_checkpoint(tmp_path):
    spec = dataclasses.replace(make_spec(RunConfig().model, ("a", "b"), 12, 14), moving=(0, 1, 2, 6, 7, 8))
    save_policy(build(spec, seed=0), tmp_path / "p", 1, {})
    assert read_description(tmp_path / "p")[0] == spec
