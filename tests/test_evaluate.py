"""Counting evaluation episodes: intervals, paired tests, held-out states, and results that come from the store alone."""

import dataclasses
import json

import pytest

from cosmos_ray.config import PlannerConfig, RolloutConfig, RunConfig, SimConfig
from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.folder import RunFolder
from cosmos_ray.model.checkpoint import save_policy
from cosmos_ray.replay.format.episode import Episode, EpisodeKey
from cosmos_ray.run import Run
from cosmos_ray.seeds import state_seed
from cosmos_ray.stages.acting import rollout_ticket
from cosmos_ray.stages.evaluate import _pairs, arms, check_held_out, compare_repeats, evaluate, results, ticket, wilson
from cosmos_ray.tracking import Tracker
from tests.test_model import tiny
from tests.test_replay_episode import make_trajectory


@pytest.mark.parametrize("successes, n, low, high", [  # Wilson (1927) score interval, z = 1.96
    (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (45, 60, 0.6277, 0.8422), (1, 1, 0.2065, 1.0),
])  # fmt: skip
def test_wilson_known_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=2e-4)


def outcomes(**arms: str) -> dict:
    return {name: {"outcomes": [int(c) for c in text]} for name, text in arms.items()}


@pytest.mark.parametrize("base, other, won, lost, p", [
    ("0000011111", "1111111111", 5, 0, 2 / 32),
    ("1111100000", "0000000000", 0, 5, 2 / 32),
    ("0000000001", "1111111110", 9, 1, 2 * (1 + 10) / 1024),
    ("0011", "1100", 2, 2, 1.0),
    ("0101", "0101", 0, 0, 1.0),
    ("0111", "1111", 1, 0, 1.0),
])  # fmt: skip
def test_mcnemar_pairs(base, other, won, lost, p):
    (pair,) = _pairs(outcomes(base=base, other=other))
    assert (pair["arm"], pair["against"], pair["won"], pair["lost"]) == ("other", "base", won, lost)
    assert pair["p"] == pytest.approx(p) and pair["gain_points"] == pytest.approx(100 * (won - lost) / len(base))


def test_every_arm_is_compared_with_the_first():
    pairs = _pairs(outcomes(base="00", refined="01", planned="11"))
    assert [(p["arm"], p["against"], p["won"]) for p in pairs] == [("refined", "base", 1), ("planned", "base", 2)]


# ---------------------------------------------------------------- results


@pytest.fixture
def run(tmp_path):
    """A run with a base and a refined checkpoint and an empty store; no Ray."""
    config = RunConfig(root=str(tmp_path), eval_episodes=4, seed=2, planner=PlannerConfig(candidates=2))
    folder = RunFolder(config)
    policy = tiny()
    save_policy(policy, folder.checkpoint("base"), 1)
    policy.action_low -= 1
    save_policy(policy, folder.checkpoint("refined"), 3)
    run = Run(config, folder, Tracker(config, folder), quiet=True)
    yield run
    folder.close()


def changed(run: Run, **settings) -> Run:
    return dataclasses.replace(run, config=dataclasses.replace(run.config, **settings))


def put(run: Run, key: EpisodeKey, success: bool, seed: int = 0, length: int = 12) -> None:
    trajectory = make_trajectory(seed, length, success=success)
    run.folder.store().commit(Episode.from_trajectory(trajectory, key, policy_version=1))


def fill(run: Run, **texts: str) -> None:
    """Commit outcomes of the arms, given as ``base="0101"``."""
    by_name = {arm.name.replace(" + ", "_"): arm for arm in arms(run)}
    for name, text in texts.items():
        for i, success in enumerate(text):
            put(run, ticket(run, by_name[name], i).key, success == "1", length=10 + i)


def test_results_are_counted_from_the_store(run):
    fill(run, base="0001", refined="0011", refined_planning="1111")
    put(run, EpisodeKey("other", "Lift", "eval", 5), True)  # of another run: not counted
    out = results(run, run.folder.store())
    assert {name: arm["outcomes"] for name, arm in out["arms"].items()} == {
        "base": [0, 0, 0, 1], "refined": [0, 0, 1, 1], "refined + planning": [1, 1, 1, 1]}
    base, planned = out["arms"]["base"], out["arms"]["refined + planning"]
    assert (base["successes"], base["episodes"], base["rate"], base["policy_version"], base["planner"]) == (1, 4, 0.25, 1, None)
    assert (base["low"], base["high"]) == wilson(1, 4) and base["mean_steps_of_successes"] == 13
    assert planned["planner"]["candidates"] == 2 and planned["policy_version"] == 3
    assert out["seeds"] == [state_seed("eval", 2, i) for i in range(4)]
    assert [(p["won"], p["lost"]) for p in out["pairs"]] == [(1, 0), (3, 0)]


def test_an_evaluation_by_a_deadline_says_that_it_cannot_be_repeated(run):
    assert not any("reproducible" in arm for arm in _counted(run)["arms"].values())
    timed = _counted(changed(run, planner=PlannerConfig(candidates=2, deadline_ms=50.0)))["arms"]
    assert timed["refined + planning"]["reproducible"] is False and timed["refined + planning"]["planner"]["deadline_ms"] == 50
    assert "reproducible" not in timed["refined"] and timed["refined"]["planner"] is None


def _counted(run: Run) -> dict:
    fill(run, base="0001", refined="0011", refined_planning="1111")
    return results(run, run.folder.store())


def test_missing_episodes_are_named_not_counted_as_failures(run):
    fill(run, base="0001", refined="001", refined_planning="1111")
    with pytest.raises(StoreError, match=r"1 of 4 evaluation episodes of arm 'refined' .*run `evaluate` again"):
        results(run, run.folder.store())


def test_evaluating_again_needs_no_simulator_and_changes_nothing(run):
    """Everything is there already: the stage must answer from the store alone, here without Ray."""
    fill(run, base="0001", refined="0011", refined_planning="1111")
    expected = results(run, run.folder.store())
    assert evaluate(run) == evaluate(run) == {**expected, "new": 0}
    assert json.loads((run.folder.path / "evaluation.json").read_text()) == json.loads(json.dumps(expected))
    assert run.folder.metrics("evaluate")[-1]["refined_successes"] == 2
    assert list(evaluate(run, ["refined"])["arms"]) == ["refined"]
    assert json.loads((run.folder.path / "evaluation.json").read_text()) == json.loads(json.dumps(expected))  # of all arms, still


def test_evaluate_compares_repeated_episodes_step_by_step(run):
    run = changed(run, repeat=2)
    fill(run, base="0001", refined="0011", refined_planning="1111")
    for arm in arms(run):
        for i in range(2):
            first = run.folder.store().read(ticket(run, arm, i).key.name)
            same = not (arm.name == "refined" and i == 1)
            put(run, ticket(run, arm, i, attempt=1).key, first.success, seed=0 if same else 7, length=first.length)
    out = compare_repeats(run, run.folder.store())
    assert (out["repeated"], out["identical"]) == (6, 5)
    assert out["different"] == [ticket(run, arms(run)[1], 1).key.name]


def test_all_arms_draw_the_same_states_and_noise(run):
    tickets = [[ticket(run, arm, i) for i in range(4)] for arm in arms(run)]
    for same in zip(*tickets, strict=True):
        assert len({(t.key.seed, t.noise_seed) for t in same}) == 1 and len({t.key.name for t in same}) == 3
    assert len({t.noise_seed for t in tickets[0]}) == 4
    assert [row[0].acting.version for row in tickets] == [1, 3, 3]
    assert [bool(row[0].acting.planner) for row in tickets] == [False, False, True]


def test_rollouts_have_a_horizon_of_their_own_and_evaluation_does_not(run):
    longer = dataclasses.replace(run, config=dataclasses.replace(run.config, rollout=RolloutConfig(horizon=70)))
    assert (rollout_ticket(longer, 0).horizon, rollout_ticket(run, 0).horizon) == (70, run.config.sim.horizon)
    assert {ticket(longer, arm, 0) for arm in arms(longer)} == {ticket(run, arm, 0) for arm in arms(run)}
    assert {ticket(longer, arm, 0).horizon for arm in arms(longer)} == {0}


@pytest.mark.parametrize("change, kept", [
    ({"sim": SimConfig(horizon=7)}, []),
    ({"inference": dataclasses.replace(RunConfig().inference, steps=2)}, []),
    ({"rollout": dataclasses.replace(RunConfig().rollout, execute=2)}, []),
    ({"planner": PlannerConfig(candidates=9)}, ["base", "refined"]),
    ({"rollout": dataclasses.replace(RunConfig().rollout, workers=9), "eval_episodes": 9}, ["base", "refined", "refined + planning"]),
])  # fmt: skip
def test_what_decides_an_outcome_is_part_of_the_key(run, change, kept):
    before = {arm.name: arm.run_keys for arm in arms(run)}
    after = {arm.name: arm.run_keys for arm in arms(changed(run, **change))}
    assert [name for name in before if before[name] == after[name]] == kept


def test_other_weights_are_another_arm(run):
    before = {arm.name: arm.run_keys for arm in arms(run)}
    policy = tiny()
    policy.action_low -= 2
    save_policy(policy, run.folder.checkpoint("refined"), 3)
    after = {arm.name: arm.run_keys for arm in arms(run)}
    assert [name for name in before if before[name] == after[name]] == ["base"]


def test_a_planning_network_plans_where_the_settings_have_one(run):
    before = {arm.name: arm.run_keys for arm in arms(run)}
    assert all(not arm.acting.planning_checkpoint for arm in arms(changed(run, planning_steps=10)))  # it is not trained yet
    save_policy(tiny(), run.folder.checkpoint("planning"), 2)
    assert {arm.name: arm.run_keys for arm in arms(run)} == before
    after = arms(changed(run, planning_steps=10))
    assert [arm.acting.planning_checkpoint for arm in after] == ["", "", str(run.folder.checkpoint("planning"))]
    assert [arm.name for arm in after if arm.run_keys != before[arm.name]] == ["refined + planning"]


def test_only_arms_with_a_checkpoint_are_evaluated(tmp_path):
    config = RunConfig(root=str(tmp_path))
    folder = RunFolder(config)
    run = Run(config, folder, Tracker(config, folder), quiet=True)
    with pytest.raises(ConfigError, match="run `pretrain` first"):
        arms(run)
    save_policy(tiny(), folder.checkpoint("base"), 1)
    assert [arm.name for arm in arms(run)] == ["base"]
    folder.close()


# ---------------------------------------------------------------- held-out states


@pytest.mark.parametrize("source", ["demo", "rollout"])
def test_evaluating_on_a_state_that_was_trained_on_is_refused(run, source):
    seed = state_seed("eval", run.config.seed, 3)
    put(run, EpisodeKey("run", "Lift", source, seed), True)
    for check in (lambda: check_held_out(run, run.folder.store()), lambda: evaluate(run)):
        with pytest.raises(StoreError, match=f"initial state {seed} is held out"):
            check()


def test_other_states_and_evaluation_episodes_are_no_leak(run):
    for source, purpose in (("demo", "demo"), ("rollout", "rollout"), ("eval", "eval")):
        put(run, EpisodeKey("run", "Lift", source, state_seed(purpose, run.config.seed, 3)), True)
    put(run, EpisodeKey("run", "Lift", "rollout", state_seed("eval", run.config.seed, 4)), True)  # beyond the four that are evaluated
    check_held_out(run, run.folder.store())
