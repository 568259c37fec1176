"""A run keeps its episodes under any name: copied, renamed, or stored before runs had an identity."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from cosmos_ray.config import PlannerConfig, RolloutConfig, RunConfig, SimConfig
from cosmos_ray.config.stored import stored_config
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.identity import RunIdentity, evaluation_digest
from cosmos_ray.model.checkpoint import save_policy
from cosmos_ray.replay.format.episode import Episode, EpisodeKey
from cosmos_ray.run import Run
from cosmos_ray.stages.acting import rollout_ticket
from cosmos_ray.stages.collect import collect
from cosmos_ray.stages.evaluate import arms, evaluate, ticket
from cosmos_ray.stages.rollout import rollout
from cosmos_ray.tracking import Tracker
from tests.test_model import tiny
from tests.test_replay_episode import make_trajectory

BEFORE = Path(__file__).parent / "data" / "config_before.json"  #: of run "old", written by the code before identities

#: Keys of that run's episodes as the code before wrote them, for checkpoints whose weights file holds the checkpoint's name.
KEYS_BEFORE = {
    "base": ("old:base:e78f832340", "eval-Lift-08000000-a0-0f2944fa"),
    "refined": ("old:refined:bdbe1f0378", "eval-Lift-08000000-a0-3e87b7ad"),
    "refined + planning": ("old:refined + planning:ffea61ba21", "eval-Lift-08000000-a0-5e71ff41")}
ROLLOUT_BEFORE = "rollout-Lift-07000000-a0-1fe0f17e"


def opened(root: Path, name: str, config: RunConfig | None = None) -> Run:
    """The run as a command opens it: with the settings that it stored."""
    config = config or stored_config(RunConfig(root=str(root), name=name))
    folder = RunFolder(config)
    return Run(config, folder, Tracker(config, folder), quiet=True)


def put(run: Run, key: EpisodeKey, success: bool = True) -> None:
    run.folder.store().commit(Episode.from_trajectory(make_trajectory(0, 12, success=success), key, policy_version=1))


def complete(run: Run) -> None:
    """Commit every episode that the run's stages ask for."""
    for arm in arms(run):
        for index in range(run.config.eval_episodes):
            put(run, ticket(run, arm, index).key)
    for index in range(run.config.rollouts):
        put(run, rollout_ticket(run, index).key)
    put(run, EpisodeKey(run.folder.identity.key, run.config.sim.task, "demo", 0))


def assert_nothing_runs_again(run: Run) -> None:
    """Every stage finds its episodes in the store: here without Ray, so one that is missing would be an error."""
    before = len(run.folder.store())
    assert (evaluate(run)["new"], rollout(run)["new"], collect(run)["new"]) == (0, 0, 0)
    assert len(run.folder.store()) == before


@pytest.fixture
def run(tmp_path):
    """A run with a base and a refined policy and all its episodes, closed."""
    config = RunConfig(root=str(tmp_path), name="first", eval_episodes=2, rollouts=3, demos=1, planner=PlannerConfig(candidates=2))
    run = opened(tmp_path, "first", config)
    policy = tiny()
    save_policy(policy, run.folder.checkpoint("base"), 1)
    policy.action_low -= 1
    save_policy(policy, run.folder.checkpoint("refined"), 3)
    complete(run)
    run.folder.close()
    return run


def test_a_copied_run_runs_no_episode_again(run, tmp_path):
    shutil.copytree(run.folder.path, tmp_path / "second")
    copy = opened(tmp_path, "second")
    assert copy.folder.identity == run.folder.identity
    assert_nothing_runs_again(copy)
    copy.folder.close()


def test_a_renamed_run_runs_no_episode_again(run, tmp_path):
    run.folder.path.rename(tmp_path / "renamed")
    renamed = opened(tmp_path, "renamed")
    assert_nothing_runs_again(renamed)
    renamed.folder.close()


def test_a_run_begun_again_under_its_name_has_the_same_keys(run, tmp_path):
    """Training draws episodes in an order by their keys: other keys would be other weights from the same seed."""
    config = stored_config(RunConfig(root=str(tmp_path), name="first"))
    fresh = RunFolder(config, fresh=True)
    assert fresh.identity == run.folder.identity == RunIdentity("first") and not len(fresh.store())
    fresh.close()


def test_a_renamed_run_and_a_new_one_of_its_old_name_are_two_runs(run, tmp_path):
    config = stored_config(RunConfig(root=str(tmp_path), name="first"))
    run.folder.path.rename(tmp_path / "renamed")
    new, renamed = opened(tmp_path, "first", config), opened(tmp_path, "renamed")
    assert not len(new.folder.store())
    assert_nothing_runs_again(renamed)
    new.folder.close()
    renamed.folder.close()


def test_an_upgraded_run_finds_the_episodes_of_before_and_runs_none_again(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    settings = json.loads(BEFORE.read_text()) | {"eval_episodes": 1, "rollouts": 1, "demos": 1}
    (folder / "config.json").write_text(json.dumps(settings))
    for name, version, base in (("base", 1, None), ("refined", 3, 1), ("planning", 2, 1)):
        save_policy(tiny(), folder / "checkpoints" / name, version, {"base_version": base})
        (folder / "checkpoints" / name / "model.safetensors").write_bytes(name.encode())
    run = opened(tmp_path, "old")
    assert {arm.name: (arm.run_keys["Lift"], ticket(run, arm, 0).key.name) for arm in arms(run)} == KEYS_BEFORE
    assert rollout_ticket(run, 0).key.name == ROLLOUT_BEFORE
    complete(run)
    run.folder.close()
    for name in ("old", "moved"):  # upgraded, and then renamed as well
        folder = folder.rename(tmp_path / name)
        again = opened(tmp_path, name)
        assert {arm.name: arm.run_keys["Lift"] for arm in arms(again)} == {name: key for name, (key, _) in KEYS_BEFORE.items()}
        assert_nothing_runs_again(again)
        again.folder.close()


@pytest.mark.parametrize("content", ["", '{"key": "ab', '{"key": "ab", "colour": 3}', None])
def test_a_damaged_or_missing_identity_is_one_clear_line(run, tmp_path, content):
    file = run.folder.path / "identity.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ConfigError, match="identity.json is (damaged or of a newer version|missing).*bring it back") as error:
        opened(tmp_path, "first")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the digest


@pytest.mark.parametrize("digest_version", [1, 2])
@pytest.mark.parametrize("section, change", [
    ("planner", {"candidates": 9}), ("planner", {"spread": 0.5}), ("planner", {"rank_by": "joint"}),
    ("planner", {"futures": 3}), ("planner", {"aggregate": "lcb"}),
    ("inference", {"steps": 2}), ("inference", {"reference_steps": True}), ("rollout", {"execute": 2})])
def test_every_value_that_acts_changes_the_digest(digest_version, section, change):
    identity, config = dataclasses.replace(RunIdentity("run"), digest_version=digest_version), RunConfig()
    changed = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **change)})
    assert digest(identity, changed) != digest(identity, config)


# A suite and its tasks make simulations of one task each, whose digests are taken. An expert plays no part in an evaluation.
@pytest.mark.parametrize("change", [f.name for f in dataclasses.fields(SimConfig) if f.name not in ("suite", "tasks", "expert")])
def test_every_setting_of_the_simulator_changes_the_digest(change):
    other = {"task": "Door", "robots": ("Sawyer",), "controller": "JOINT_POSITION", "wrist_cameras": (), "third_cameras": ("frontview",),
             "image_size": 128, "actions": "pose", "horizon": 7, "control_freq": 10, "placement": 0.2, "mesh_cell": 0.0,
             "fast_step": False, "instruction": "lift it", "quality": "full"}[change]
    config, identity = RunConfig(), RunIdentity("run")
    assert digest(identity, dataclasses.replace(config, sim=dataclasses.replace(config.sim, **{change: other}))) != digest(identity, config)


@pytest.mark.parametrize("digest_version", [1, 2])
@pytest.mark.parametrize("change", [field.name for field in dataclasses.fields(PlannerConfig)])
def test_every_setting_of_the_planner_changes_the_digest(digest_version, change):
    other = {"candidates": 3, "rank_by": "both", "spread": 0.3, "futures": 2, "future_steps": 4, "value_samples": 3, "value_steps": 2,
             "aggregate": "success_vote", "ladder": "truncated", "early_rejection": True, "depth": 2, "branch": 2,
             "beam": 3, "deadline_ms": 100.0}
    assert change in other, f"give planner.{change} another value in this table, and append it in _planner_values of cosmos_ray/identity.py"
    identity, config = dataclasses.replace(RunIdentity("run"), digest_version=digest_version), RunConfig()
    changed = dataclasses.replace(config, planner=dataclasses.replace(config.planner, **{change: other[change]}))
    assert digest(identity, changed) != digest(identity, config), f"append planner.{change} in _planner_values of cosmos_ray/identity.py"


def test_settings_that_do_not_act_leave_the_digest_alone():
    identity, config = RunIdentity("run"), RunConfig()
    changed = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, workers=7, horizon=300), eval_episodes=9)
    assert digest(identity, changed) == digest(identity, config)
    alone = [evaluation_digest(identity, dataclasses.replace(config, planner=PlannerConfig(candidates=n)), None, "w", "") for n in (2, 3)]
    assert alone[0] == alone[1]  # a policy that acts without a planner


def test_digests_are_what_stored_episodes_carry():
    """Literal values: whatever renames or reorders the settings must leave these as they are."""
    config = RunConfig(sim=SimConfig(actions="position", horizon=100), rollout=RolloutConfig(execute=8), planner=PlannerConfig(spread=0.06))
    assert digest(dataclasses.replace(RunIdentity("run"), digest_version=2), config) == "4aea1a0c6e"


@pytest.mark.parametrize("digest_version", [1, 2])
def test_a_lower_bound_of_the_population_has_the_key_that_it_had_as_lcb(digest_version, monkeypatch):
    identity, keys = dataclasses.replace(RunIdentity("run"), digest_version=digest_version), {}
    for scheme in ("lcb", "lcb_population"):
        keys[scheme] = digest(identity, RunConfig(planner=PlannerConfig(aggregate=scheme)))
    monkeypatch.setattr("cosmos_ray.identity.AGGREGATES", {})  # earlier versions
    assert digest(identity, RunConfig(planner=PlannerConfig(aggregate="lcb"))) == keys["lcb_population"] != keys["lcb"]


def digest(identity: RunIdentity, config: RunConfig) -> str:
    return evaluation_digest(identity, config, config.planner, "weights", "planning")
