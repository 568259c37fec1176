"""What a round of `refine` begins from, when it trains the network that only plans, and when it need not. No Ray: nothing here gets as
far as training."""

import dataclasses
import shutil

import pytest

from cosmos_ray.config import LearnerConfig, ReplayConfig, RolloutConfig, RunConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.inference.messages import ActingPolicy
from cosmos_ray.learner.mixture import Mixture
from cosmos_ray.model.checkpoint import save_policy
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.run import Run, validate
from cosmos_ray.stages import refine as stage
from cosmos_ray.stages.round import Round
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


def trained(run: Run, checkpoint: str, step: int, version: int, **info) -> None:
    save_policy(tiny(), run.folder.checkpoint(checkpoint), version, {"step": step, **info})


def changed(run: Run, **settings) -> Run:
    return dataclasses.replace(run, config=dataclasses.replace(run.config, **settings))


def states(run: Run) -> set[str]:
    return {path.name for path in (run.folder.path / "learner").iterdir()}


def test_without_rollouts_there_is_nothing_to_train_it_on(run):
    run.folder.store().commit(make_episode(0, "demo"))
    with pytest.raises(ConfigError, match="no rollout to train the planning network on: run `rollout` first"):
        stage.train_planning_network(Round(run, 1, 1))


@pytest.fixture
def refined(run, monkeypatch):
    """A run with a rollout in which training is a learner state and a checkpoint at once, and what was trained, in order."""
    run.folder.store().commit(make_episode(3, "rollout"))
    run = changed(run, learner=dataclasses.replace(run.config.learner, planning_world_weight=7.0))
    started = []

    def start(run, learner, state, policy, mixture, rate, total, world_weight=0.0):
        assert world_weight == (7.0 if state.startswith("planning") else 0.0)  # it is the planning network's alone
        assert mixture == Mixture.for_planning_network(run.config.learner, run.config.replay)
        started.append((state, policy, total))
        run.folder.learner_state(state).mkdir(parents=True, exist_ok=True)

    def refine_round(round):
        round.begin()
        stage.train_planning_network(round)
        mixture = Mixture.for_planning_network(run.config.learner, run.config.replay)
        start(round.run, None, round.state("refined"), round.start("refined"), mixture, 0, round.run.config.refine_steps)
        trained(round.run, "refined", round.run.config.refine_steps, round.run.folder.next_version(), **round.description())
        return {"new": 1}

    monkeypatch.setattr(stage, "start_learner", start)
    monkeypatch.setattr(stage, "train_alone", lambda run, name, learner, total, target, info: trained(
        run, target, total, run.folder.next_version(), **info))
    monkeypatch.setattr(stage, "_refine_round", refine_round)
    return run, started


def test_each_round_trains_on_from_the_one_before(refined):
    run, started = refined
    assert stage.refine(run)["new"] == 1 and stage.refine(run)["new"] == 0
    assert started == [("planning_from_1", "base", 10), ("refined_from_1", "base", 600)]
    assert stage.refine(changed(run, rounds=2))["new"] == 1 and stage.refine(changed(run, rounds=2))["new"] == 0
    assert started[2:] == [("planning_from_2", "rounds/1/planning", 10), ("refined_from_3", "rounds/1/refined", 600)]
    assert states(run) == {"planning_from_2", "refined_from_3"}  # those of the first round are of no more use
    assert stage.refine(run)["new"] == 0 and len(started) == 4  # fewer rounds than there are


def test_a_base_policy_from_another_run_is_older_than_what_is_trained_from_it(refined, tmp_path):
    run, started = refined
    shutil.rmtree(run.folder.checkpoint("base"))
    save_policy(tiny(), tmp_path / "another", 7)
    run.folder.checkpoint("base").symlink_to(tmp_path / "another", target_is_directory=True)
    unfinished = run.folder.checkpoint(".refined.1.tmp")
    unfinished.mkdir()
    (unfinished / "policy.json").write_text("{")
    stage.refine(changed(run, rounds=2))
    assert [state for state, _, _ in started] == ["planning_from_7", "refined_from_7", "planning_from_8", "refined_from_9"]
    assert run.folder.next_version() == 12


def test_more_steps_continue_the_last_round_from_where_it_began(refined):
    run, started = refined
    stage.refine(changed(run, rounds=2))
    del started[:]
    stage.refine(changed(run, rounds=2, refine_steps=900))
    assert started == [("refined_from_3", "rounds/1/refined", 900)]
    stage.refine(changed(run, rounds=2, refine_steps=900, planning_steps=30))
    assert started[1:] == [("planning_from_2", "rounds/1/planning", 30)]


def test_more_steps_in_the_middle_of_a_later_round_leave_the_earlier_one_alone(refined):
    run, started = refined
    stage.refine(run)
    Round(run, 2, 1).begin()  # and interrupted in its rollouts
    del started[:]
    stage.refine(changed(run, rounds=2, refine_steps=900, planning_steps=30))
    assert started == [("planning_from_2", "rounds/1/planning", 30), ("refined_from_3", "rounds/1/refined", 900)]


def test_another_base_policy_begins_again(refined):
    run, started = refined
    stage.refine(changed(run, rounds=2))
    del started[:]
    keys = {ticket.key for ticket in Round(run, 2, 1).tickets()[0]}
    save_policy(tiny(), run.folder.checkpoint("base"), 40)
    stage.refine(changed(run, rounds=2))
    assert [(state, policy) for state, policy, _ in started[:2]] == [("planning_from_40", "base"), ("refined_from_40", "base")]
    assert [policy for _, policy, _ in started[2:]] == ["rounds/1/planning", "rounds/1/refined"]
    assert not keys & {ticket.key for ticket in Round(run, 2, 40).tickets()[0]}  # rollouts of another policy


def test_a_planning_network_that_earlier_rounds_did_without_begins_from_the_base_policy(refined):
    run, started = refined
    stage.refine(changed(run, planning_steps=0))
    stage.refine(changed(run, rounds=2))
    assert started[1:] == [("planning_from_1", "base", 10), ("refined_from_2", "rounds/1/refined", 600)]


def test_checkpoints_of_before_there_were_rounds_have_one_behind_them(run):
    trained(run, "refined", 10, 2, base_version=1)
    assert Round(run, 1, 1).done("refined", 10) and not Round(run, 1, 1).done("refined", 11)
    assert not Round(run, 2, 1).done("refined", 10) and not Round(run, 1, 4).done("refined", 10)


def test_rounds_never_share_a_rollout(run):
    trained(run, "refined", 10, 2, base_version=1)
    run = changed(run, rollouts=3, refine_rollouts=2)
    Round(run, 2, 1).begin()
    parts = [Round(run, number, 1).tickets() for number in (1, 2)]
    assert [(len(before), len(beside)) for before, beside in parts] == [(3, 2)] * 2
    assert len({ticket.key.seed for part in parts for tickets in part for ticket in tickets}) == 10
    assert {ticket.acting.planner for part in parts for tickets in part for ticket in tickets} == {None}


def test_rollouts_of_later_rounds_may_plan(run):
    trained(run, "refined", 10, 2, base_version=1)
    trained(run, "planning", 10, 3, base_version=1)
    run = changed(run, rollouts=2, refine_rollouts=1, rollout=RolloutConfig(planned=True))
    Round(run, 2, 1).begin()
    assert not any(ticket.acting.planner for tickets in Round(run, 1, 1).tickets() for ticket in tickets)
    before, (beside,) = Round(run, 2, 1).tickets()
    assert {t.acting for t in before} == {ActingPolicy(2, run.config.planner, str(run.folder.checkpoint("rounds/1/planning")))}
    assert beside.acting == ActingPolicy()  # it acts with whatever was pushed last


def test_more_rollouts_than_initial_states_are_refused_at_once():
    with pytest.raises(ConfigError, match="rounds = 3 of rollouts = 400000 .* more than the 1000000 initial states of a run"):
        validate(RunConfig(rounds=3, rollouts=400_000))


def test_its_mixture_has_every_value_that_may_be_asked_for():
    mixture = Mixture.for_planning_network(LearnerConfig(value_mode="both", self_imitation=0.5), ReplayConfig(success_share=0.3))
    assert (mixture.policy, mixture.world, mixture.value) == (0.0, 0.3, 0.7) and mixture.self_imitation == 0.0
    assert mixture.value_types == (SampleType.VALUE_FUTURE, SampleType.VALUE_ACTION) and mixture.success_share == 0.3
