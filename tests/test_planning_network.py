"""When `refine` trains the network that only plans, and when it need not. No Ray: nothing here gets as far as training."""

import dataclasses

import pytest

from cosmos_ray.config import LearnerConfig, ReplayConfig, RunConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.learner.mixture import Mixture
from cosmos_ray.model.checkpoint import save_policy
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.run import Run
from cosmos_ray.stages import refine as stage
from cosmos_ray.tracking import Tracker
from tests.test_model import tiny
from tests.test_replay_episode import make_episode


@pytest.fixture
def run(tmp_path):
    """A run with a base checkpoint of version 1 and an empty store."""
    config = RunConfig(root=str(tmp_path), planning_steps=10)
    folder = RunFolder(config)
    save_policy(tiny(), folder.checkpoint("base"), 1)
    yield Run(config, folder, Tracker(config, folder), quiet=True)
    folder.close()


def trained(run: Run, step: int, base_version: int) -> None:
    save_policy(tiny(), run.folder.checkpoint("planning"), 2, {"step": step, "base_version": base_version})


def test_without_rollouts_there_is_nothing_to_train_it_on(run):
    run.folder.store().commit(make_episode(0, "demo"))
    with pytest.raises(ConfigError, match="no rollout to train the planning network on: run `rollout` first"):
        stage.train_planning_network(run, 1)


def test_it_is_trained_once_for_every_base_policy(run, monkeypatch):
    run.folder.store().commit(make_episode(3, "rollout"))
    started = []
    monkeypatch.setattr(stage, "start_learner", lambda run, learner, name, policy, mixture, rate, total, actors_beside: started.append(
        (name, policy, mixture, total)))
    monkeypatch.setattr(stage, "train_alone", lambda run, name, learner, total, target, info: trained(run, total, info["base_version"]))
    stage.train_planning_network(run, 1)
    assert started == [("planning_from_1", "base", Mixture.planning(run.config.learner, run.config.replay), 10)]
    stage.train_planning_network(run, 1)
    assert len(started) == 1
    for step, version in ((5, 1), (10, 2)):  # interrupted; of another base policy
        trained(run, step, version)
        stage.train_planning_network(run, 1)
    assert len(started) == 3
    stage.train_planning_network(dataclasses.replace(run, config=dataclasses.replace(run.config, planning_steps=0)), 9)
    assert len(started) == 3


def test_its_mixture_has_every_value_that_may_be_asked_for():
    mixture = Mixture.planning(LearnerConfig(value_mode="both", self_imitation=0.5), ReplayConfig(success_share=0.3))
    assert (mixture.policy, mixture.world, mixture.value) == (0.0, 0.3, 0.7) and mixture.self_imitation == 0.0
    assert mixture.value_kinds == (SampleType.VALUE_FUTURE, SampleType.VALUE_ACTION) and mixture.success_share == 0.3
