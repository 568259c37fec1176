"""Simulators in a child process: what a crash, a hang, a leak and the parent's death cost, with real processes and the real simulator."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from cosmos_ray.config import RunConfig, SimConfig
from cosmos_ray.errors import ConfigError, SimulationError
from cosmos_ray.inference.core import InferenceCore
from cosmos_ray.inference.local import LocalClient
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.rollout.actor import DemonstratorActor
from cosmos_ray.rollout.core import RolloutCore
from cosmos_ray.rollout.demonstrator import DemonstratorCore
from cosmos_ray.rollout.ticket import EpisodeTicket, Finished, SimulatorDied
from cosmos_ray.seeds import state_seed
from cosmos_ray.sim.child import Limits, SimulatorChild, SimulatorLost
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.simulators import Simulators
from tests.test_planning import demo_policy
from tests.test_replay_episode import assert_same

SIM = SimConfig(horizon=20)  # chunks of 8: two whole ones and a half

pytestmark = pytest.mark.usefixtures("one_thread")


def tickets(count: int) -> list[EpisodeTicket]:
    seeds = [state_seed("rollout", 0, index) for index in range(count)]
    return [EpisodeTicket(EpisodeKey("run", "Lift", "rollout", seed), noise_seed=seed, frame_stride=4) for seed in seeds]


def worker(simulators, folder: Path) -> RolloutCore:
    return RolloutCore(simulators, ReplayStore(folder), LocalClient(InferenceCore(demo_policy(), 4)), steps=1)


def finish(core, work: list) -> list:
    """The ends of ``work``; the deaths that the worker told of are in ``core.told``."""
    answers, until, core.told = core.advance(work, 1.0), time.monotonic() + 300, []
    while True:
        finished = [answer for answer in answers if isinstance(answer, Finished)]
        core.told = [answer for answer in answers if isinstance(answer, SimulatorDied)]
        if len(finished) >= len(work):
            return finished
        assert time.monotonic() < until, "the episodes never finished"
        answers += core.advance([], 1.0)


def wait_for(condition, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Store of the episodes as simulators in this process make them."""
    environments = [Environment(SIM) for _ in range(2)]
    core = worker(Simulators(environments), tmp_path_factory.mktemp("reference"))
    finish(core, tickets(6))
    core.close()
    return core.store


@pytest.fixture(scope="module")
def one_child():
    """One child for the whole file: what a test breaks, the next test finds replaced."""
    made = SimulatorChild(SIM, 2, Limits())
    yield made
    made.close()


@pytest.fixture
def child(one_child, monkeypatch):
    """The simulators in a child process, started, with the methods that a test may exchange."""
    monkeypatch.setattr(one_child, "limits", Limits())
    for name in ("execute", "demonstrate"):
        monkeypatch.setattr(one_child, name, getattr(one_child, name), raising=False)
    return started(one_child)


def started(simulators: SimulatorChild) -> SimulatorChild:
    wait_for(lambda: simulators.ready(1.0), 300)
    return simulators


def assert_as_in_this_process(store: ReplayStore, reference: ReplayStore, expected: list[EpisodeTicket]) -> None:
    assert store.keys() == sorted(t.key.name for t in expected)
    for name in store.keys():
        mine, theirs = store.read(name), reference.read(name)
        for episode in (mine, theirs):
            episode.info["seconds"] = 0
        assert_same(mine, theirs)


def without(places: set[int]) -> list[EpisodeTicket]:
    return [ticket for place, ticket in enumerate(tickets(6)) if place not in places]


# ---------------------------------------------------------------- outcomes


def test_episodes_are_those_of_simulators_in_the_same_process(child, reference, tmp_path):
    core, generation = worker(child, tmp_path), child.generation
    finished = finish(core, tickets(6))
    assert all(f.new and not f.broken for f in finished) and child.generation == generation
    assert_as_in_this_process(core.store, reference, tickets(6))


def test_a_child_is_replaced_after_its_episodes_and_running_ones_go_on_bit_for_bit(child, reference, tmp_path):
    child.limits, generation = Limits(episodes=3), child.generation
    core = worker(child, tmp_path)
    finished = finish(core, tickets(6))
    assert child.generation > generation and not any(f.broken for f in finished) and not core.told
    assert_as_in_this_process(core.store, reference, tickets(6))


def test_a_crash_an_abort_and_a_hang_under_a_chunk_each_cost_that_episode_alone(child, reference, tmp_path):
    troubles = {1: signal.SIGSEGV, 3: signal.SIGABRT, 4: signal.SIGSTOP}
    child.limits = Limits(order_s=5.0)
    core, execute, broken, generation = worker(child, tmp_path), child.execute, [], child.generation

    def watched(place, chunk, *arguments):
        running = next(slot.running for half in core._halves for slot in half.slots if slot.place == place)
        if (number := troubles.get(tickets(6).index(running.ticket))) and running.trajectory.length == 8:
            broken.append(child.pid)
            os.kill(child.pid, number)
        return execute(place, chunk, *arguments)

    child.execute = watched
    lost = {f.name: f.broken for f in finish(core, tickets(6)) if f.broken}
    names = [ticket.key.name for ticket in tickets(6)]
    assert lost.keys() == {names[index] for index in troubles}
    assert "SIGSEGV" in lost[names[1]] and "SIGABRT" in lost[names[3]] and lost[names[4]].startswith("no answer for 5 s")
    assert sorted(died.why for died in core.told) == sorted(lost.values())
    assert child.generation == generation + 3 and not any(map(psutil.pid_exists, broken))
    assert_as_in_this_process(core.store, reference, without(set(troubles)))


def test_a_child_killed_between_two_orders_costs_nothing(child, reference, tmp_path):
    core = worker(child, tmp_path)
    work = tickets(6)
    core.advance(work, 0.0)
    while not any(slot.running and slot.running.trajectory.length == 8 for half in core._halves for slot in half.slots):
        core.advance([], 0.01)
    os.kill(child.pid, signal.SIGKILL)
    child._process.wait()
    answers, until = [], time.monotonic() + 300
    while len([answer for answer in answers if isinstance(answer, Finished)]) < 6 and time.monotonic() < until:
        answers += core.advance([], 1.0)
    assert [answer.why for answer in answers if isinstance(answer, SimulatorDied)] == ["died of SIGKILL"]
    assert not any(answer.broken for answer in answers if isinstance(answer, Finished))
    assert_as_in_this_process(core.store, reference, work)


def test_a_demonstration_that_breaks_its_simulator_is_reported_and_the_next_one_runs(child, tmp_path):
    core, demonstrate = DemonstratorCore(child, ReplayStore(tmp_path)), child.demonstrate
    keys = [EpisodeKey("run", "Lift", "demo", state_seed("demo", 0, index)) for index in range(2)]

    def broken(place, seed, task):
        if seed == keys[0].seed:
            os.kill(child.pid, signal.SIGSEGV)
        return demonstrate(place, seed, task)

    child.demonstrate = broken
    first, second = finish(core, keys)
    assert (first.name, bool(first.broken), first.new, second.broken, second.new) == (keys[0].name, True, False, "", True)
    assert core.store.keys() == [second.name] and len(core.told) == 1


# ---------------------------------------------------------------- the child itself


def test_a_child_that_grows_under_a_chunk_is_replaced(child):
    """By the record of a chunk of a million steps."""
    child.limits, generation = Limits(order_s=300, memory_mb=child.memory_mb + 15), child.generation
    child.begin(0, 1, 10**6)
    with pytest.raises(SimulatorLost, match="MB under way, above rollout.simulator_memory_mb"):
        child.execute(0, np.zeros((10**6, 4), np.float32))
    assert child.generation == generation + 1


def test_a_child_above_its_memory_between_two_orders_is_replaced(child):
    generation, child.limits = child.generation, Limits(memory_mb=child.memory_mb - 1)
    child._looked = 0.0
    assert not child.ready(0.0) and child.generation == generation + 1
    child.limits = Limits(memory_mb=50)
    with pytest.raises(ConfigError, match="raise it, or lower rollout.envs_per_worker"):  # the new one needs more from the start
        started(child)


def test_a_hung_child_says_where(child):
    child.limits = Limits(order_s=2.0)
    child.begin(0, 1, 10**6)
    with pytest.raises(SimulatorLost, match=r"no answer for 2 s, in \w+ \(\w+\.py:\d+\)"):
        child.execute(0, np.zeros((10**6, 4), np.float32))


def test_a_bug_in_the_child_is_not_swallowed(child):
    with pytest.raises(RuntimeError, match="IndexError in the simulators' process"):
        child.begin(7, 1)
    child.begin(0, 1)  # and the child lives on


def test_a_child_has_neither_ray_nor_torch(child):
    maps = Path(f"/proc/{child.pid}/maps").read_text()
    assert "mujoco" in maps and not any(name in maps for name in ("_raylet", "libtorch", "libarrow"))


def test_what_the_child_raises_while_it_starts_is_raised_as_itself():
    simulators = SimulatorChild(SimConfig(third_cameras=("nowhere",)), 1, Limits())
    with pytest.raises(ConfigError, match="nowhere"):
        started(simulators)
    simulators.close()


def test_children_that_do_not_start_are_given_up(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    simulators = SimulatorChild(SIM, 1, Limits())
    with pytest.raises(SimulationError, match="did not start 3 times in a row, last: ended with exit code 1"):
        started(simulators)
    simulators.close()


def test_a_child_dies_with_its_parent_in_the_middle_of_an_order():
    code = ("import numpy; from cosmos_ray.config import SimConfig; from cosmos_ray.sim.child import Limits, SimulatorChild\n"
            "child = SimulatorChild(SimConfig(horizon=10**6), 1, Limits(600))\n"
            "while not child.ready(1.0): pass\n"
            "child.begin(0, 1); print(child.pid, flush=True)\n"
            "child.execute(0, numpy.zeros((10**6, 4), 'f'))")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert psutil.Process(pid).ppid() == parent.pid
    parent.kill()
    parent.wait()
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 10)


def test_simulators_die_with_their_ray_actor(local_ray, tmp_path):
    actor = DemonstratorActor.options(num_cpus=0).remote(RunConfig(), str(tmp_path))
    pid = ray.get(actor.pid.remote(), timeout=300)
    (child,) = [each for each in psutil.Process(pid).children(recursive=True) if "cosmos_ray.sim.child" in each.cmdline()]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 10)
