"""A run of many tasks: what its settings mean, whose turn it is, what a worker keeps, what training draws, and the whole loop."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest

from cosmos_ray.config import RunConfig, SimConfig, check
from cosmos_ray.config.settings import changed, given, new_config
from cosmos_ray.errors import ConfigError
from cosmos_ray.inference.core import InferenceCore
from cosmos_ray.inference.local import LocalClient
from cosmos_ray.learner.mixture import BatchSource
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.replay.sampling.sampler import WindowSampler
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.rollout.core import RolloutCore
from cosmos_ray.rollout.fleet import Fleet
from cosmos_ray.rollout.ticket import EpisodeTicket, demonstrations, task_and_state
from cosmos_ray.seeds import state_seed
from cosmos_ray.sim import simulators
from cosmos_ray.sim.make import make
from cosmos_ray.sim.simulators import Simulators
from cosmos_ray.supervision import Supervisor
from tests.conftest import ROOT, SMALL, environment
from tests.scripted_cluster import Cluster
from tests.test_learner import BASE
from tests.test_planning import demo_policy
from tests.test_replay_episode import assert_same, make_episode

TWO = SimConfig(suite="robosuite", tasks=("Lift", "Stack"), actions="position", horizon=20)


# ---------------------------------------------------------------- settings


def test_a_suite_is_a_config_of_each_of_its_tasks_with_what_is_the_tasks_own():
    sim = SimConfig(suite="robosuite", tasks=("Stack", "Lift"), image_size=48)
    stack, lift = sim.each()
    assert (sim.task, sim.names, sim.title, sim.horizon, sim.instruction) == ("", ("Stack", "Lift"), "robosuite (2 tasks)", 0, "")
    assert lift == SimConfig(task="Lift", actions="pose", image_size=48)  # one action space for the whole run
    assert stack == SimConfig(task="Stack", image_size=48)
    assert [own.horizon for own in TWO.each()] == [20, 20]  # a horizon that was asked for is that of every task
    assert len(SimConfig(suite="robosuite").each()) == 5 and SimConfig(suite="robosuite", tasks=("Lift",)).actions == "position"


def test_a_run_of_one_task_is_its_own_config_and_one_without_a_simulation_has_none():
    assert SimConfig().each() == (SimConfig(),) and SimConfig().names == ("Lift",)
    assert SimConfig(task="").each() == () == SimConfig(task="").names


def test_a_suites_settings_come_back_from_what_was_given():
    config = new_config({"sim.suite": "robosuite", "sim.tasks": ("Lift", "Stack"), "sim.image_size": 48})
    check(config)
    assert config.rollout.horizon == 0 and new_config(given(config)) == config
    later = changed(RunConfig(sim=SimConfig(task="Door")), {"sim.suite": "robosuite"})  # of imported demonstrations, say
    assert later.sim == SimConfig(suite="robosuite") and later.rollout.horizon == 0


@pytest.mark.parametrize("values, complaint", [
    ({"suite": "robosuite", "tasks": ("Lift", "Wipe")}, "sim.tasks has 'Wipe', which suite robosuite has not: it has Lift, Stack,"),
    ({"suite": "libero_goal", "tasks": ("10",)}, "sim.tasks has '10', which suite libero_goal has not: it has 0 to 9"),
    ({"suite": "robosuite", "tasks": ("Lift", "Lift")}, "sim.tasks has 'Lift' twice"),
    ({"suite": "robosuite", "task": "Stack"}, "sim.suite = 'robosuite' and sim.task = 'Stack' both name tasks"),
    ({"tasks": ("Lift",)}, "sim.tasks = Lift are tasks of a suite: give sim.suite"),
    ({"suite": "robosuite", "instruction": "lift"}, "would be that of every task"),
    ({"horizon": 0}, "sim.horizon = 0 is out of range"),
])  # fmt: skip
def test_tasks_that_do_not_go_together_are_refused_in_one_line(values, complaint):
    with pytest.raises(ConfigError) as caught:
        SimConfig(**values).check()
    assert str(caught.value).startswith(complaint) or complaint in str(caught.value)


def test_a_suite_that_there_is_not_is_named_before_its_tasks():
    with pytest.raises(ConfigError, match="sim.suite = 'libero_gaol' is not one of .*libero_goal"):
        check(new_config({"sim.suite": "libero_gaol", "sim.tasks": ("5",)}))


# ---------------------------------------------------------------- whose turn it is


def test_tasks_take_turns_and_each_counts_its_own_states():
    assert [task_and_state(("a", "b", "c"), number) for number in range(5)] == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1)]
    assert [task_and_state(("a",), number) for number in range(3)] == [("a", 0), ("a", 1), ("a", 2)]


def test_a_task_lacks_demonstrations_while_another_has_more_than_its_share(tmp_path):
    store = ReplayStore(tmp_path)
    for seed, task in enumerate(["a"] * 4 + ["b"] + ["other"]):
        store.commit(make_episode(seed, "demo", size=8, task=task))
    assert demonstrations(store, ("a", "b"), 7) == (5, {"a": 0, "b": 2})  # shares of 4 and 3


def test_a_worker_gets_tickets_of_the_task_that_it_holds_while_there_are_any():
    cluster, given_to = Cluster(a=1, b=1), {0: [], 1: []}
    fleet = Fleet(cluster, cluster, 2, 2, lambda ticket: (ticket,), 60.0, Supervisor(clock=cluster.clock), clock=cluster.clock,
                  kind_of=lambda ticket: ticket[0])
    advance = cluster.advance
    cluster.advance = lambda handle, tickets, seconds: given_to[handle.index].extend(tickets) or advance(handle, tickets, seconds)
    tickets = [f"{kind}{number}" for number in range(8) for kind in "xy"]
    fleet.submit(tickets)
    finished = []
    while fleet.outstanding:
        finished += fleet.poll(0.5)
        assert cluster.now < 600
    assert sorted(f.name for f in finished) == sorted(tickets)
    kinds = [[name[0] for name in names] for names in given_to.values()]
    assert all(len(set(of_one[:6])) == 1 for of_one in kinds) and kinds[0][0] != kinds[1][0]  # the last ones may help the other


# ---------------------------------------------------------------- what a worker keeps


def tickets(count: int) -> list[EpisodeTicket]:
    made = []
    for number in range(count):
        task, state = task_and_state(TWO.names, number)
        seed = state_seed("rollout", 0, state)
        made.append(EpisodeTicket(EpisodeKey("run", task, "rollout", seed), noise_seed=seed))
    return made


def played(held: Simulators, folder, work: list[EpisodeTicket]) -> ReplayStore:
    core = RolloutCore(held, ReplayStore(folder), LocalClient(InferenceCore(demo_policy(), 4)), steps=1)
    finished, todo = [], work
    while len(finished) < len(work):
        finished, todo = finished + core.advance(todo, 0.5), []
    core.close()
    return core.store


@pytest.fixture
def built(monkeypatch) -> Counter:
    """How many environments of each task were built."""
    count: Counter = Counter()
    monkeypatch.setattr(simulators, "make", lambda config: count.update([config.task]) or make(config))
    return count


def test_episodes_of_two_tasks_in_one_worker_are_those_of_a_worker_for_each(tmp_path, one_thread, built):
    lift, stack = TWO.each()
    work = sorted(tickets(8), key=lambda ticket: ticket.key.task)
    together = played(Simulators([make(lift)], TWO.each(), count=2), tmp_path / "together", work)
    assert built == {"Lift": 1, "Stack": 2}  # at most two at once, and none is built twice
    for sim in (lift, stack):
        mine = [ticket for ticket in work if ticket.key.task == sim.task]
        alone = played(Simulators([make(sim)]), tmp_path / sim.task, mine)
        for ticket in mine:
            episodes = [store.read(ticket.key.name) for store in (together, alone)]
            for episode in episodes:
                episode.info["seconds"] = 0
            assert_same(*episodes)
            assert episodes[0].instruction == sim.instruction and episodes[0].info["fingerprint"]["task"] == sim.task


@pytest.mark.parametrize("memory_mb, again", [(0.0, {"Stack": 1, "Door": 1}), (1.0, {"Stack": 1, "Door": 2, "Lift": 1})])
def test_where_memory_is_short_an_environment_is_built_in_exchange_for_the_one_left_longest_ago(built, memory_mb, again):
    lift, stack = TWO.each()
    door = SimConfig(task="Door", actions="position", horizon=20)
    held = Simulators([make(lift)], (lift, stack, door), count=1, memory_mb=memory_mb)
    for task in ("Lift", "Stack", "Door", "Lift", "Door"):
        assert held.begin(0, 1, task=task).task == task
        assert len(held._left) <= (0 if memory_mb else 2)
    assert built == again and set(held.facts) == {"Lift", "Stack", "Door"}
    held.close()


# ---------------------------------------------------------------- what training draws


def test_training_draws_all_tasks_evenly_however_long_their_episodes_are(tmp_path):
    store = ReplayStore(tmp_path)
    for seed, (task, length) in enumerate([("long", 90)] * 3 + [("short", 12)]):
        store.commit(make_episode(seed, "demo", size=32, task=task, length=length))

    def drawn(by_task: bool) -> Counter:
        mixture = dataclasses.replace(BASE, by_task=by_task)
        batch = BatchSource(WindowSampler(store, chunk=8, gamma=0.98, seed=0), mixture, 400).draw()
        return Counter(name.split("-")[1] for name in batch.windows)

    assert drawn(False)["short"] < 40  # 12 of 282 windows
    assert 150 < drawn(True)["short"] < 250


# ---------------------------------------------------------------- the whole loop


@pytest.mark.slow  # four commands, each with a Ray of its own
def test_a_run_of_two_tasks_goes_through_every_stage_with_a_worker_killed_and_does_nothing_twice(tmp_path):
    flags = [*SMALL[2:], "--sim.suite", "robosuite", "--sim.tasks", "Lift,Stack", "--eval-episodes", "4", "--pretrain-steps", "10",
             "--refine-steps", "10", "--rollout.horizon", "30", "--rollout.workers", "2"]
    line = [sys.executable, "-m", "cosmos_ray", "demo", "--root", str(tmp_path), "--name", "two", *flags]
    folder, killed = tmp_path / "two", []
    driver = subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 1100
    while driver.poll() is None and time.monotonic() < until:
        if not killed and (folder / "checkpoints" / "base" / "policy.json").exists():
            for process in psutil.Process(driver.pid).children(recursive=True):
                if "ray::RolloutActor.advance" in " ".join(_line(process)) and not killed:
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
        time.sleep(0.1)
    out, err = driver.communicate()
    assert driver.returncode == 0 and killed, err[-3000:]
    store = ReplayStore(folder / "replay", create=False)
    store.refresh()
    classes = Counter((s.task, s.episode_class) for s in store.summaries())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert classes["Lift", "demo"] == classes["Stack", "demo"] == 3
    assert classes["Lift", "evaluation"] == classes["Stack", "evaluation"] == 2 * len(evaluation["arms"])
    assert sum(s.of_policy for s in store.summaries()) == 4 + 6 and evaluation["task"] == "robosuite (2 tasks)"
    for arm in evaluation["arms"].values():
        assert {task: row["episodes"] for task, row in arm["tasks"].items()} == {"Lift": 2, "Stack": 2}
    report = json.loads((folder / "report.json").read_text())
    assert [(row["task"], row["rollouts"]["episodes"]) for row in report["tasks"]] == [("Lift", 5), ("Stack", 5)]
    assert 'id="tasks"' in (folder / "report.html").read_text() and "  Stack " in out
    again = subprocess.run(["evaluate" if word == "demo" else word for word in line], cwd=ROOT, env=environment(), capture_output=True,
                           text=True, timeout=1100)
    assert again.returncode == 0, again.stderr[-3000:]
    store.refresh()
    assert Counter((s.task, s.episode_class) for s in store.summaries()) == classes
    suite = ["evaluate", *line[4:8], "--suite", "robosuite", "--tasks", "Stack,Lift", "--trials", "2", "--seeds", "195,196", "--video"]
    done = subprocess.run([*line[:3], *suite], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads((folder / "suite_robosuite.json").read_text())
    assert list(out["arms"]) == ["refined"] and out["arms"]["refined"]["episodes"] == 2 * 2 * 2 and out["tasks"] == ["Stack", "Lift"]
    assert len(list((folder / "videos" / "robosuite").glob("*.mp4"))) == 8 and "over 2 seeds" in done.stdout
    assert f"videos in {folder / 'videos' / 'robosuite'}" in done.stdout
    page = (folder / "suite_robosuite.html").read_text()
    assert "--trials 2 --seeds 195,196" in page and out["fingerprint"]["mujoco"] in page


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
