"""The manifest of a run: what a resume takes from it, and that a run goes on without it."""

from __future__ import annotations

import dataclasses
import json
import logging
from types import SimpleNamespace

import pytest

from cosmos_ray.config import LearnerConfig, RunConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.model.checkpoint import save_policy
from cosmos_ray.report.contents import training_curves
from cosmos_ray.resume import POINTS_KEPT, RunManifest
from cosmos_ray.run import Run
from cosmos_ray.stages.refine import _RefineLoop
from cosmos_ray.stages.round import Round
from cosmos_ray.tracking import Tracker
from tests.test_model import tiny
from tests.test_replay_episode import make_episode


@pytest.fixture
def config(tmp_path):
    return RunConfig(root=str(tmp_path), refine_steps=40, refine_rollouts=4)


def opened(config: RunConfig) -> Run:
    folder = RunFolder(config)
    return Run(config, folder, Tracker(config, folder))


def account(step: int) -> dict:
    return {"inserted": 10 * step, "sampled": 8 * step, "stored": 10 * step, "batch": 8, "episodes": step, "tickets": [f"t{step}"]}


def test_each_of_the_last_states_has_what_goes_with_it(tmp_path, config):
    manifest = RunManifest(tmp_path, config)
    assert manifest.read() == {} and manifest.point("refined_from_1", 100) is None
    for step in range(0, 60, 10):
        manifest.saved("refined_from_1", step, "refine", 2, **account(step))
    manifest.saved("planning_from_1", 30, "planning")
    again = RunManifest(tmp_path, config)
    assert again.point("refined_from_1", 50) == {**account(50), "step": 50}
    assert again.point("refined_from_1", 49) == {**account(40), "step": 40}  # the newest state is torn: that of before has its own
    assert again.point("refined_from_1", 9) is None  # older than what is kept
    assert len(again.read()["states"]["refined_from_1"]) == POINTS_KEPT and again.point("planning_from_1", 99) == {"step": 30}
    assert not list(tmp_path.glob(".manifest*"))


def test_a_resume_from_an_older_state_forgets_the_later_ones(tmp_path, config):
    manifest = RunManifest(tmp_path, config)
    for step in (10, 20, 30):
        manifest.saved("refined_from_1", step, "refine", **account(step))
    manifest.saved("refined_from_1", 20, "refine", **account(2))
    assert RunManifest(tmp_path, config).point("refined_from_1", 90) == {**account(2), "step": 20}


DAMAGE = ["", "[1]", "{", '{"format": 1, "version": "x"}', '{"format": 1, "version": true}', '{"states": [1]}',
          '{"states": {"a": {"b": {}}}}',
          '{"states": {"a": {"1": {"stored": null}}}}', '{"states": {"a": {"1": {"tickets": 3}}}}', '{"version": 1, "version": 2}']


@pytest.mark.parametrize("content", DAMAGE)
def test_a_damaged_manifest_is_said_and_the_run_goes_on(config, content, caplog):
    run = opened(config)
    save_policy(tiny(), run.folder.checkpoint("base"), 3)
    run.folder.record("refine", step=10, version=6)
    run.folder.store().commit(dataclasses.replace(make_episode(0, "rollout"), key=dataclasses.replace(
        make_episode(0, "rollout").key, run=run.folder.identity.key), policy_version=8))
    (run.folder.path / "manifest.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert run.folder.manifest.point("refined_from_1", 10) is None
        assert run.folder.next_version() == 9  # the store has episodes of version 8
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "manifest.json" in said[0] and "goes on from the learner's states and the store" in said[0]
    run.folder.close()
    assert RunFolder(config).next_version() == 10


def test_a_manifest_of_a_newer_version_is_refused_and_stays(config):
    run = opened(config)
    file = run.folder.path / "manifest.json"
    file.write_text('{"format": 9}')
    with pytest.raises(ConfigError, match="of format 9, this version reads up to 1"):
        run.folder.next_version()
    assert file.read_text() == '{"format": 9}'


def test_a_run_of_an_earlier_version_goes_on_with_its_files(config):
    run = opened(config)
    run.folder.write_json("version.json", {"version": 11})
    state = run.folder.learner_state("refined_from_1")
    state.mkdir(parents=True)
    limiter = {"inserted": 100, "sampled": 80, "stored": 300, "step": 10, "batch": 8}
    (state / "limiter.json").write_text(json.dumps(limiter))
    assert run.folder.manifest.point("refined_from_1", 20) == limiter and run.folder.manifest.point("refined_from_1", 5) is None
    assert run.folder.next_version() == 12
    run.folder.manifest.saved("refined_from_1", 20, "refine", **account(20))
    assert run.folder.manifest.point("refined_from_1", 20)["stored"] == 200  # its own from now on


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"step": "x"}', '{"inserted": 1, "sampled": 2, "stored": null}'])
def test_an_old_account_that_cannot_be_read_begins_a_new_one(tmp_path, config, content):
    state = tmp_path / "learner" / "refined_from_1"
    state.mkdir(parents=True)
    (state / "limiter.json").write_text(content)
    assert RunManifest(tmp_path, config).point("refined_from_1", 10) is None


def test_a_resume_under_other_settings_or_packages_says_which(tmp_path, config):
    RunManifest(tmp_path, config).saved("base", 10, "pretrain")
    assert RunManifest(tmp_path, config).differences() == []
    other = dataclasses.replace(config, learner=LearnerConfig(lr=0.5), eval_episodes=7)
    manifest = RunManifest(tmp_path, other)
    manifest.write(packages={**manifest.read()["packages"], "torch": "1.0"})
    settings, packages = manifest.differences()
    assert f"learner.lr {config.learner.lr:g} -> 0.5" in settings and "eval" not in settings
    assert "torch 1.0 -> " in packages and "bits may differ" in packages


# ---------------------------------------------------------------- the refinement's driver


@pytest.fixture
def base(config):
    run = opened(config)
    save_policy(tiny(), run.folder.checkpoint("base"), 1)
    yield run
    run.folder.close()


def loop(run: Run, step: int) -> _RefineLoop:
    """The driver's side of a refinement whose learner is at ``step``, before anything runs."""
    learner = SimpleNamespace(step=step, folder=run.folder.learner_state("refined_from_1"))
    return _RefineLoop(Round(run, 1, 1), Round(run, 1, 1).tickets()[1], None, SimpleNamespace(capacity=2), learner, 50.0)


def commit(run: Run, ticket) -> None:
    run.folder.store().commit(dataclasses.replace(make_episode(1, "rollout"), key=ticket.key))


def test_a_resume_says_from_where_and_counts_what_nobody_counted(base, capfd):
    tickets = Round(base, 1, 1).tickets()[1]
    first = loop(base, 0)
    assert capfd.readouterr().err == ""  # nothing to resume from
    commit(base, tickets[0])
    first._take([SimpleNamespace(name=tickets[0].key.name, length=12, success=True, policy_version=1)])
    first.running = {tickets[1].key.name, tickets[2].key.name}
    first.learner.step = 20
    first.note_point(20)
    commit(base, tickets[1])  # and the driver is killed before it hears of it
    again = loop(base, 20)
    said = capfd.readouterr().err
    assert "refine goes on from step 20 of 40 (policy version 0, 1 episodes stored since, 1 of them not counted before" in said
    assert f"1 that were running start again, such as {tickets[2].key.name})" in said
    assert [row["name"] for row in base.folder.metrics("refine_episode")] == [tickets[0].key.name, tickets[1].key.name]
    assert again.account["sampled"] == 20 * base.config.learner.batch_size
    loop(base, 20)
    assert len(base.folder.metrics("refine_episode")) == 2  # counted once


def test_the_account_is_that_of_the_state_that_is_resumed_from(base):
    tickets, batch = Round(base, 1, 1).tickets()[1], base.config.learner.batch_size
    first = loop(base, 0)
    for step, ticket in zip((10, 20), tickets, strict=False):
        commit(base, ticket)
        first._take([SimpleNamespace(name=ticket.key.name, length=make_episode(1).length, success=True, policy_version=1)])
        first.learner.step = step
        first.note_point(step)
    stored = 2 * make_episode(1).length
    assert loop(base, 20).limiter.state_dict() == {"inserted": stored, "sampled": 20 * batch}
    assert loop(base, 10).limiter.state_dict() == {"inserted": stored, "sampled": 10 * batch}  # the newest state was torn
    assert loop(base, 0).limiter.state_dict() == {"inserted": stored, "sampled": 0}  # all states were lost


def test_steps_behind_a_resume_count_once_in_the_curves(base):
    for step in (10, 15, 25):
        base.folder.record("refine", step=step, loss=1.0, round=1)
    base.folder.record("resume", what="refine", round=1, step=10)
    base.folder.record("resume", what="pretrain", round=1, step=0)
    for step in (20, 30):
        base.folder.record("refine", step=step, loss=2.0, round=1)
    curve = training_curves(base.folder)["refine"]
    assert curve["step"] == [10, 20, 30] and curve["loss"] == [1.0, 2.0, 2.0]
