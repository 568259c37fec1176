"""A policy on a suite: every task, state and noise seed once, counted from the store, paired with another arm and another run."""

from __future__ import annotations

import dataclasses
import json

import pytest

from cosmos_ray.config import PlannerConfig, RunConfig, SimConfig
from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.evidence import wilson
from cosmos_ray.folder import RunFolder
from cosmos_ray.model.checkpoint import save_policy
from cosmos_ray.quarantine import Quarantined
from cosmos_ray.replay.format.episode import Episode, EpisodeKey
from cosmos_ray.report.benchmark_page import benchmark_text
from cosmos_ray.run import Run
from cosmos_ray.seeds import state_seed
from cosmos_ray.stages.benchmark import Benchmark, _tickets, benchmark, simulation
from cosmos_ray.stages.evaluate import arms
from cosmos_ray.tracking import Tracker
from tests.test_model import tiny
from tests.test_replay_episode import make_trajectory

ASKED = Benchmark("robosuite", ("Stack", "Lift"), trials=3, seeds=(195, 196))


@pytest.fixture
def make_run(tmp_path):
    """``make_run(name)``: a run with a base and a refined checkpoint and an empty store; no Ray."""
    folders = []

    def make(name: str, **settings) -> Run:
        config = RunConfig(root=str(tmp_path), name=name, planner=PlannerConfig(candidates=2), **settings)
        folders.append(folder := RunFolder(config))
        save_policy(tiny(), folder.checkpoint("base"), 1)
        save_policy(tiny(), folder.checkpoint("refined"), 3)
        return Run(config, folder, Tracker(config, folder), quiet=True)

    yield make
    for folder in folders:
        folder.close()


def fill(run: Run, outcomes: str, kind: str = "refined", asked: Benchmark = ASKED) -> None:
    """Commit outcomes of an arm in the order of its tickets: by noise seed, then by task, then by state; "." leaves one out."""
    run = run.simulating(simulation(run, asked))
    (arm,) = arms(run, [kind])
    for number, (ticket, outcome) in enumerate(zip(_tickets(run, arm, asked), outcomes, strict=True)):
        if outcome != ".":
            trajectory = make_trajectory(number, 12, success=outcome == "1", task=ticket.key.task)
            run.folder.store().commit(Episode.from_trajectory(trajectory, ticket.key, policy_version=3, info={
                "fingerprint": {"task": ticket.key.task, "mujoco": "3"}}))


def test_counts_are_by_task_by_seed_and_over_all(make_run):
    run = make_run("one")
    fill(run, "111" "000" "110" "001")
    out = benchmark(run, ASKED)
    arm = out["arms"]["refined"]
    assert (arm["successes"], arm["episodes"], out["new"], arm["policy_version"]) == (6, 12, 0, 3)
    assert {task: (row["successes"], row["episodes"], row["low"], row["high"]) for task, row in arm["tasks"].items()} == {
        "Stack": (5, 6, *wilson(5, 6)), "Lift": (1, 6, *wilson(1, 6))}
    assert {seed: row["successes"] for seed, row in arm["seeds"].items()} == {195: 3, 196: 3}
    assert out["states"] == [state_seed("eval", 0, trial) for trial in range(3)] and out["fingerprint"] == {"mujoco": "3"}
    text = benchmark_text(out)
    assert "6/12" in text and "50.0 ± 0.0 over 2 seeds" in text and "lift the red cube" in text
    written = json.loads((run.folder.path / "suite_robosuite.json").read_text())
    assert written["arms"]["refined"]["outcomes"]["Lift, 2000002, 196"] == 1
    page = (run.folder.path / "suite_robosuite.html").read_text()
    assert "stack the red cube on the green cube" in page and written["versions"]["mujoco"] in page


def test_every_ticket_is_another_episode_and_arms_draw_the_same_noise(make_run):
    run = make_run("one")
    run = run.simulating(simulation(run, ASKED))
    both = [_tickets(run, arm, ASKED) for arm in arms(run, ["base", "refined + planning"])]
    assert all(len({t.key.name for t in tickets}) == 12 for tickets in both)
    assert [(t.key.seed, t.noise_seed) for t in both[0]] == [(t.key.seed, t.noise_seed) for t in both[1]]
    assert len({t.noise_seed for t in both[0]}) == 6  # three states with two seeds


def test_a_run_of_one_task_plays_the_suite_and_its_own_evaluation_keeps_its_keys(make_run):
    run = make_run("one", eval_episodes=3)
    assert simulation(run, ASKED) == SimConfig(suite="robosuite", tasks=("Stack", "Lift"), actions="position")
    before = {arm.name: arm.run_keys for arm in arms(run)}
    fill(run, "1" * 12)
    benchmark(run, ASKED)
    assert {arm.name: arm.run_keys for arm in arms(run)} == before and run.config.sim == SimConfig()


def test_adding_a_task_or_a_seed_runs_nothing_again(make_run):
    run = make_run("one")
    fill(run, "1" * 12)
    fewer = dataclasses.replace(ASKED, tasks=("Lift",), trials=2)
    assert benchmark(run, fewer)["arms"]["refined"]["episodes"] == 4
    assert benchmark(run, ASKED)["new"] == 0


def test_two_arms_and_two_runs_are_paired_on_the_same_states(make_run):
    one, two = make_run("one"), make_run("two", seed=7)  # states are those of every run
    fill(one, "111" "000" "110" "001")
    fill(one, "111" "110" "110" "001", "base")
    fill(two, "111" "111" "000" "001")
    benchmark(two, ASKED)
    out = benchmark(one, ASKED, ["base", "refined"], against="two")
    (pair,) = out["pairs"]
    assert (pair["arm"], pair["against"], pair["won"], pair["lost"], pair["pairs"]) == ("refined", "base", 0, 2, 12)
    other = out["against"]
    assert (other["run"], other["arm"], other["won"], other["lost"], other["pairs"]) == ("two", "base", 2, 1, 12)
    assert other["counts"]["successes"] == 7 and "of run two: +8.3" in benchmark_text(out)
    with pytest.raises(ConfigError, match=r"trials = 3, and this is 2: evaluate both alike"):
        benchmark(one, dataclasses.replace(ASKED, trials=2), against="two")
    with pytest.raises(ConfigError, match=r"--against none: there is no .*suite_robosuite.json"):
        benchmark(one, ASKED, against="none")


def test_a_quarantined_state_counts_in_no_arm_and_is_named(make_run):
    run = make_run("one")
    fill(run, "111" "000" "110" "001")
    run.quarantine.entries.append(Quarantined("eval-x", "Stack", state_seed("eval", 0, 2), "it broke"))
    out = benchmark(run, ASKED)
    assert out["arms"]["refined"]["episodes"] == 10 and "it broke" in benchmark_text(out)
    assert out["arms"]["refined"]["tasks"]["Stack"]["episodes"] == 4


def test_a_state_that_was_trained_on_is_refused(make_run):
    run = make_run("one")
    fill(run, "1" * 12)
    key = EpisodeKey("x", "Lift", "rollout", state_seed("eval", 0, 1))
    run.folder.store().commit(Episode.from_trajectory(make_trajectory(1, 12), key, policy_version=1))
    with pytest.raises(StoreError, match="is held out"):
        benchmark(run, ASKED)


@pytest.mark.parametrize("asked, complaint", [
    (Benchmark("libero_goal", trials=51), "more than the 50 initial states that LIBERO publishes"),
    (Benchmark("robosuite", ("Wipe",)), "sim.tasks has 'Wipe'"),
    (Benchmark("robosuite", seeds=(1, 1)), "seeds that differ"),
    (Benchmark("robosuite", trials=0), "give at least 1 trial"),
])  # fmt: skip
def test_what_makes_no_benchmark_is_refused_in_one_line(make_run, asked, complaint):
    with pytest.raises(ConfigError, match=complaint):
        benchmark(make_run("one"), asked)
