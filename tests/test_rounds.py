"""The rounds that a run keeps: going back, what is deleted, runs from before rounds were kept. No Ray, no training: a round here writes
its checkpoints at once."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest

from cosmos_ray.commands.stage import run_stage
from cosmos_ray.config import PlannerConfig, RunConfig
from cosmos_ray.config.run import rounds_to_keep
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.inference.messages import ActingPolicy
from cosmos_ray.model.checkpoint import copy_checkpoint, read_description, save_policy
from cosmos_ray.model.exchange.files import recover
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.report.contents import by_round, training_curves
from cosmos_ray.rollout.ticket import own_rollouts
from cosmos_ray.rounds import Present, Rounds
from cosmos_ray.run import Run
from cosmos_ray.stages import refine as stage
from cosmos_ray.stages.acting import asked_policy, planning_network
from cosmos_ray.stages.evaluate import arms, evaluate, ticket
from cosmos_ray.stages.round import Round
from cosmos_ray.tracking import Tracker
from tests.test_evaluate import put
from tests.test_model import tiny
from tests.test_replay_episode import make_episode

POLICY = tiny()


def opened(root: Path, **settings) -> Run:
    settings = {"planning_steps": 10, "eval_episodes": 2, "rollouts": 2, "refine_rollouts": 2, **settings}
    config = RunConfig(root=str(root), planner=PlannerConfig(candidates=2), **settings)
    folder = RunFolder(config)
    for place in ("checkpoints", "checkpoints/rounds"):
        recover(folder.path / place)  # as when a command opens the run
    return Run(config, folder, Tracker(config, folder), quiet=True)


def make_run(tmp_path):
    """A run with a base policy and a rollout of it."""
    run = opened(tmp_path)
    save_policy(POLICY, run.folder.checkpoint("base"), run.folder.next_version())
    run.folder.store().commit(make_episode(3, "rollout"))
    yield run
    run.folder.close()


def train_at_once(monkeypatch):
    """Training is a checkpoint whose weights no other one has; what was trained, as (learner state, start)."""
    started = []

    def export(run: Run, name: str, step: int, info: dict) -> None:
        version = run.folder.next_version()
        POLICY.action_low.fill_(-version)  # other weights
        save_policy(POLICY, run.folder.checkpoint(name), version, {"step": step, **info})

    def start(run, learner, state, policy, *_, **__):
        started.append((state, policy))

    def refine_round(round):
        round.begin()
        stage.train_planning_network(round)
        start(round.run, None, round.state("refined"), round.start("refined"))
        round.run.folder.learner_state(round.state("refined")).mkdir(parents=True, exist_ok=True)
        export(round.run, "refined", round.run.config.refine_steps, round.description())
        return {"new": 1}

    monkeypatch.setattr(stage, "start_learner", start)
    monkeypatch.setattr(stage, "train_alone", lambda run, name, learner, total, target, info: export(run, target, total, info))
    monkeypatch.setattr(stage, "_refine_round", refine_round)
    return started


run = pytest.fixture(make_run, name="run")
trained = pytest.fixture(train_at_once, name="trained", autouse=True)


def changed(run: Run, **settings) -> Run:
    return dataclasses.replace(run, config=dataclasses.replace(run.config, **settings))


def refined(run: Run, rounds: int, **settings) -> Run:
    run = changed(run, rounds=rounds, **settings)
    stage.refine(run)
    return run


def versions(run: Run) -> dict[int, dict[str, int]]:
    return {number: {name: read_description(path)[1] for name, path in networks.items()}
            for number, networks in Rounds(run.folder).kept().items()}


def version(run: Run, checkpoint: str) -> int:
    return read_description(run.folder.checkpoint(checkpoint))[1]


# ---------------------------------------------------------------- what is kept


def test_every_round_keeps_its_policy_and_the_network_that_plans_for_it(run):
    run = refined(run, 3)
    assert versions(run) == {1: {"refined": 3, "planning": 2}, 2: {"refined": 5, "planning": 4}, 3: {"refined": 7, "planning": 6}}
    assert Rounds(run.folder).numbers() == [1, 2, 3] and (version(run, "refined"), version(run, "planning")) == (7, 6)
    newest, kept = (run.folder.checkpoint(name) / "model.safetensors" for name in ("refined", "rounds/3/refined"))
    assert newest.stat().st_ino == kept.stat().st_ino  # the weights are there once


def test_more_steps_in_the_newest_round_replace_it_and_no_other(run):
    run = refined(run, 2)
    before = versions(run)
    stage.refine(changed(run, refine_steps=700))
    assert versions(run) == {1: before[1], 2: {**before[2], "refined": 6}}
    stage.refine(changed(run, refine_steps=700, planning_steps=20))
    assert versions(run) == {1: before[1], 2: {"planning": 7, "refined": 6}}


def test_a_round_without_a_planning_network_of_its_own_has_the_one_before(run):
    run = refined(refined(run, 1), 2, planning_steps=0)
    assert versions(run)[2] == {"refined": 4, "planning": 2}
    assert planning_network(changed(run, planning_steps=10), "refined", 2) == run.folder.checkpoint("rounds/2/planning")
    assert planning_network(run, "refined", 2) is None  # the settings ask for none


def test_another_base_policy_moves_the_rounds_of_before_aside(run, caplog):
    run = refined(run, 2)
    save_policy(POLICY, run.folder.checkpoint("base"), 40)
    run = refined(run, 1)
    assert versions(run) == {1: {"planning": 41, "refined": 42}}
    assert sorted(path.name for path in run.folder.checkpoint("rounds.1").iterdir()) == ["1", "2"]
    assert "moved rounds 1 and 2 to" in caplog.text


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_from_before_rounds_were_kept_goes_on(run, trained, interrupted):
    """As the version before left it: `NAME_before` is what round 2 began from."""
    run = refined(run, 2)
    folder = run.folder
    for name in ("refined", "planning"):
        copy_checkpoint(folder.checkpoint(f"rounds/1/{name}"), folder.checkpoint(f"{name}_before"))
        if interrupted and name == "refined":
            copy_checkpoint(folder.checkpoint("rounds/1/refined"), folder.checkpoint("refined"))
    shutil.rmtree(folder.checkpoint("rounds"))
    (folder.path / "round.json").unlink()
    expected = {1: {"refined": 3, "planning": 2}, **({} if interrupted else {2: {"refined": 5, "planning": 4}})}
    assert versions(run) == expected and Rounds(folder).present(1) == Present(2, 1)
    del trained[:]
    stage.refine(changed(run, rounds=3))
    again = [("refined_from_3", "rounds/1/refined")] if interrupted else []
    assert trained == [*again, ("planning_from_4", "rounds/2/planning"), (f"refined_from_{6 if interrupted else 5}", "rounds/2/refined")]
    assert list(versions(run)) == [1, 2, 3] and versions(run)[1] == expected[1]
    assert not list(run.folder.path.glob("checkpoints/*_before"))


# ---------------------------------------------------------------- going back


def test_going_back_trains_the_later_rounds_anew_and_deletes_none(run, trained, caplog):
    run = refined(run, 4)
    before, keys = versions(run), {t.key for part in Round(run, 3, 1).tickets() for t in part}
    noise = {t.noise_seed for part in Round(run, 3, 1).tickets() for t in part}
    del trained[:]
    with caplog.at_level(logging.WARNING):
        assert stage.refine(run, from_round=2)["new"] == 2
    line = Rounds(run.folder).present(1).line
    assert trained == [(f"planning_from_{line}", "rounds/2/planning"), (f"refined_from_{line}", "rounds/2/refined"),
                       (f"planning_from_{line + 1}", "rounds/3/planning"), (f"refined_from_{line + 2}", "rounds/3/refined")]
    after = versions(run)
    assert {n: after[n] for n in (1, 2)} == {n: before[n] for n in (1, 2)} and min(after[3].values()) > max(before[4].values())
    aside = run.folder.checkpoint("rounds.1")
    assert {int(p.name): read_description(p / "refined")[1] for p in aside.iterdir()} == {n: before[n]["refined"] for n in (3, 4)}
    assert f"moved rounds 3 and 4 to {aside}" in caplog.text
    again = [t for part in Round(run, 3, 1).tickets() for t in part]
    assert not keys & {t.key for t in again} and not noise & {t.noise_seed for t in again}  # none of them is in the store already
    assert {t.key.seed for t in again} == {key.seed for key in keys}


def test_going_back_again_begins_another_line_and_the_same_command_goes_on_while_rounds_are_missing(run, trained, monkeypatch):
    run = refined(run, 3)
    whole = stage._refine_round

    def stops_in_round_3(round):
        if round.number == 3:
            round.begin()
            raise KeyboardInterrupt
        return whole(round)

    monkeypatch.setattr(stage, "_refine_round", stops_in_round_3)
    with pytest.raises(KeyboardInterrupt):
        stage.refine(run, from_round=1)
    present, second = Rounds(run.folder).present(1), versions(run)[2]
    assert (present.round, present.from_round) == (3, 1)
    monkeypatch.setattr(stage, "_refine_round", whole)
    assert stage.refine(run, from_round=1)["new"] == 1 and versions(run)[2] == second  # round 2 of this line is there
    assert stage.refine(run)["new"] == 0
    assert stage.refine(run, from_round=1)["new"] == 2 and Rounds(run.folder).present(1).line > present.line
    assert sorted(path.name for path in run.folder.path.glob("checkpoints/rounds*")) == ["rounds", "rounds.1", "rounds.2"]


def test_a_round_that_has_just_begun_goes_on(run, trained):
    run = refined(run, 2)
    Round(run, 3, 1).begin()
    stage.refine(changed(run, rounds=3), from_round=2)
    assert Rounds(run.folder).present(1) == Present(3, 1) and not run.folder.checkpoint("rounds.1").exists()


@pytest.mark.parametrize("rounds, back, message", [
    (2, 2, "--from-round 2 leaves no round to train with --rounds 2: give --rounds 3 or more"),
    (3, 7, "--from-round 7 leaves no round"),
    (9, 7, "run 'demo' keeps no round 7: it keeps rounds 1, 2 and 3"),
    (9, 0, "run 'demo' keeps no round 0: it keeps"),
])  # fmt: skip
def test_going_back_to_where_nothing_is_kept_is_refused(run, rounds, back, message):
    run = refined(run, 3)
    before = versions(run)
    with pytest.raises(ConfigError, match=message):
        stage.refine(changed(run, rounds=rounds), from_round=back)
    assert versions(run) == before


# ---------------------------------------------------------------- what is deleted


@pytest.mark.parametrize("keep, left", [("all", [1, 2, 3, 4]), ("last:3", [2, 3, 4]), ("last:1", [3, 4])])
def test_old_rounds_are_deleted_as_the_settings_say(run, keep, left, caplog):
    run = refined(run, 4, keep_rounds=keep)
    assert list(versions(run)) == left
    assert ("deleted round 1: keep_rounds is last" in caplog.text) == (keep != "all")
    stage.refine(changed(run, refine_steps=700))  # what the newest round began from is there
    assert list(versions(run)) == left


def evaluated(run: Run, number: int, successes: int) -> None:
    run.tracker.log("evaluate_round", round=number, arm="refined", version=versions(run)[number]["refined"], base_version=1,
                    successes=successes, episodes=10, low=0.0, high=1.0)


def test_the_best_rounds_stay_and_those_that_nobody_evaluated(run):
    run = refined(run, 6)
    for number, successes in ((1, 3), (2, 7), (3, 7), (5, 2)):
        evaluated(run, number, successes)
    assert Rounds(run.folder).forget("best:1", 1) == [1, 2]  # of two that are as good, the later one; 5 is what 6 began from
    assert list(versions(run)) == [3, 4, 5, 6]
    assert Rounds(run.folder).forget("best:1", 1) == [] and Rounds(run.folder).forget("all", 1) == []


@pytest.mark.parametrize("text", ["", "none", "last", "last:0", "best:-1", "last:2,best:2", "Last:2", "last:x"])
def test_a_retention_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="is none of all, last:N and best:N"):
        rounds_to_keep(text)


# ---------------------------------------------------------------- one round of several


def test_an_evaluation_of_the_newest_round_counts_when_it_is_an_earlier_one(run):
    """Its episodes have the same keys: nothing is played again, here without Ray."""
    run = refined(run, 2)
    keys = {arm.kind: arm.run_keys for arm in arms(run)}
    for arm in arms(run):
        for i in range(2):
            put(run, ticket(run, arm, i).key, True)
    assert evaluate(run)["new"] == 0
    run = refined(run, 3)
    assert {arm.kind: arm.run_keys for arm in arms(run)} != keys
    again = arms(run, (), [2])
    assert {arm.kind: arm.run_keys for arm in again} == keys
    assert [arm.name for arm in again] == ["base", "refined, round 2", "refined + planning, round 2"]
    assert again[2].acting == ActingPolicy(5, run.config.planner, str(run.folder.checkpoint("rounds/2/planning")))
    before = run.folder.read_json("evaluation.json")
    assert "refined, round 2 " in run_stage("evaluate", run, {"arms": None, "round": "2"})
    assert run.folder.read_json("evaluation.json") == before  # the report's arms are the newest round's


def test_all_rounds_are_evaluated_in_one_table(run):
    run = refined(run, 2)
    for arm in arms(run, (), [1, 2]):
        for i in range(2):
            put(run, ticket(run, arm, i).key, arm.round == 2 or i == 0)
    text = run_stage("evaluate", run, {"arms": None, "round": "all"})
    assert [line.split("  ")[0].rstrip() for line in text.splitlines()] == [
        "base", "refined, round 1", "refined + planning, round 1", "refined, round 2", "refined + planning, round 2"]
    rows = by_round(run.folder, [])
    assert [(row["round"], {arm: counts["successes"] for arm, counts in row["arms"].items()}) for row in rows] == [
        (0, {"base": 1}), (1, {"refined": 1, "refined + planning": 1}), (2, {"refined": 2, "refined + planning": 2})]
    assert [row["version"] for row in rows] == [1, 3, 5]
    text = run_stage("evaluate", run, {"arms": "refined", "round": "1"})
    assert text.startswith("refined, round 1") and len(text.splitlines()) == 1


@pytest.mark.parametrize("asked, message", [
    ("5", "run 'demo' keeps no round 5: it keeps rounds 1 and 2"), ("-1", "--round '-1' is neither the number of a round nor 'all'"),
    ("two", "--round 'two' is neither")])
def test_a_round_that_is_not_kept_is_refused_with_those_that_are(run, asked, message):
    with pytest.raises(ConfigError, match="keeps no round 1: it has none: run `refine` first"):
        Rounds(run.folder).asked("1")
    with pytest.raises(ConfigError, match="has no rounds: run `refine` first"):
        Rounds(run.folder).asked("all")
    run = refined(run, 2)
    with pytest.raises(ConfigError, match=message):
        run_stage("evaluate", run, {"arms": None, "round": asked})


def test_commands_take_the_networks_of_a_round(run):
    run = refined(run, 2)
    assert asked_policy(run, None, 1) == ("refined", run.folder.checkpoint("rounds/1/refined"))
    assert asked_policy(run, "planning", 1) == ("planning", run.folder.checkpoint("rounds/1/planning"))
    assert asked_policy(run, None, None) == ("refined", run.folder.checkpoint("refined"))
    with pytest.raises(ConfigError, match="round 1 has no checkpoint 'base', it has refined and planning: leave --checkpoint or --round"):
        asked_policy(run, "base", 1)
    with pytest.raises(ConfigError, match="keeps no round 3"):
        asked_policy(run, None, 3)


# ---------------------------------------------------------------- in the report


def test_rollouts_and_evaluations_are_told_apart_by_round_and_those_that_were_left_are_not_counted(run):
    run = refined(run, 3)
    for number, wins in ((2, 2), (3, 1)):
        for i, each in enumerate(t for part in Round(run, number, 1).tickets() for t in part):
            put(run, each.key, i < wins)
        evaluated(run, number, wins)
    put(run, EpisodeKey(run.folder.identity.key, "Lift", "rollout", 1_000_000), True)  # of the base policy

    def table() -> list[tuple]:
        rows = by_round(run.folder, own_rollouts(run.folder.store(), run.folder.identity.key, ["Lift"]))
        return [(row["round"], *[f"{c['successes']}/{c['episodes']}" if c else None for c in (row["arms"].get("refined"), row["rollouts"])])
                for row in rows]

    assert table() == [(1, None, "1/1"), (2, "2/10", "2/4"), (3, "1/10", "1/4")]
    for step in (10, 20):
        for number in (1, 2, 3):
            run.tracker.log("refine", step=step, round=number, loss=float(number))
    stage.refine(run, from_round=1)
    assert table() == [(1, None, "1/1")]
    run.tracker.log("refine", step=10, round=2, loss=9.0)
    assert training_curves(run.folder)["refine"]["loss"] == [1.0, 1.0, 9.0]


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"round": "three", "base_version": 1}), json.dumps({"round": 1})])
def test_a_damaged_round_file_is_named_and_may_be_deleted(run, text):
    run = refined(run, 2)
    stage.refine(run, from_round=1)
    before, file = versions(run), run.folder.path / "round.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="round.json does not say where the refinement stands .*: delete the file"):
        stage.refine(run)
    file.unlink()
    assert stage.refine(run)["new"] == 0 and versions(run) == before
    assert stage.refine(changed(run, rounds=3))["new"] == 1
