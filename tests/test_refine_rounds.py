"""What a round of `refine` begins from, when it trains the network that only plans, and when it need not. No Ray: nothing here gets as
far as training."""

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


def trained(run: Run, step: int, version: int, checkpoint: str = "planning", **info) -> None:
    save_policy(tiny(), run.folder.checkpoint(checkpoint), version, {"step": step, **info})


def test_without_rollouts_there_is_nothing_to_train_it_on(run):
    run.folder.store().commit(make_episode(0, "demo"))
    with pytest.raises(ConfigError, match="no rollout to train the planning network on: run `rollout` first"):
        stage.train_planning_network(stage.Round(run, 1, 1))


def test_it_is_trained_once_for_every_base_policy_and_round(run, monkeypatch):
    run.folder.store().commit(make_episode(3, "rollout"))
    started = []
    monkeypatch.setattr(stage, "start_learner", lambda run, learner, name, policy, mixture, rate, total, actors_beside: started.append(
        (name, policy, total)))
    monkeypatch.setattr(stage, "train_alone", lambda run, name, learner, total, target, info: trained(run, total, 7, **info))
    for _ in range(2):
        stage.train_planning_network(stage.Round(run, 1, 1))
    assert started == [("planning_from_1", "base", 10)]
    more = dataclasses.replace(run, config=dataclasses.replace(run.config, planning_steps=20))
    stage.train_planning_network(stage.Round(more, 1, 1))
    assert started.pop() == ("planning_from_1", "planning", 20)  # the same learner state, which goes on
    for number in (2, 1, 2):
        stage.train_planning_network(stage.Round(run, number, 1))
    assert started[1:] == [("planning_from_7", "planning", 10)]
    stage.train_planning_network(stage.Round(more, 2, 1))
    assert started.pop() == ("planning_from_7", "planning", 20)
    stage.train_planning_network(stage.Round(run, 1, 3))  # of another base policy
    assert started.pop() == ("planning_from_3", "base", 10)
    stage.train_planning_network(stage.Round(dataclasses.replace(run, config=dataclasses.replace(run.config, planning_steps=0)), 9, 3))
    assert len(started) == 2


def test_checkpoints_of_before_there_were_rounds_have_one_behind_them(run):
    trained(run, 10, 2, "refined", base_version=1)
    assert stage.Round(run, 1, 1).done("refined", 10) and not stage.Round(run, 1, 1).done("refined", 11)
    assert not stage.Round(run, 2, 1).done("refined", 10) and not stage.Round(run, 1, 4).done("refined", 10)
    assert stage.Round(run, 2, 1).start("refined") == ("refined", 2) and stage.Round(run, 1, 1).start("refined") == ("refined", 1)


def test_learner_states_of_a_round_are_kept_until_the_next_one_has_its_rollouts(run):
    for checkpoint in ("planning", "refined"):
        trained(run, 10, 2, checkpoint, base_version=1, round=1, from_version=1)
        for version in (1, 2):
            run.folder.learner_state(f"{checkpoint}_from_{version}").mkdir(parents=True)
    stage.Round(run, 1, 1).forget_the_one_before()
    assert len(list((run.folder.path / "learner").iterdir())) == 4
    stage.Round(run, 2, 1).forget_the_one_before()
    assert {path.name for path in (run.folder.path / "learner").iterdir()} == {"planning_from_2", "refined_from_2"}


def test_rounds_never_share_a_rollout(run):
    config = dataclasses.replace(run.config, rollouts=3, refine_rollouts=2, rounds=3)
    parts = [stage.round_indices(dataclasses.replace(run, config=config), number) for number in (1, 2, 3)]
    assert [(len(before), len(beside)) for before, beside in parts] == [(3, 2)] * 3
    assert sorted(i for part in parts for indices in part for i in indices) == list(range(15))


def test_its_mixture_has_every_value_that_may_be_asked_for():
    mixture = Mixture.planning(LearnerConfig(value_mode="both", self_imitation=0.5), ReplayConfig(success_share=0.3))
    assert (mixture.policy, mixture.world, mixture.value) == (0.0, 0.3, 0.7) and mixture.self_imitation == 0.0
    assert mixture.value_kinds == (SampleType.VALUE_FUTURE, SampleType.VALUE_ACTION) and mixture.success_share == 0.3
