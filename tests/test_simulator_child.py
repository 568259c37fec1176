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

from cosmos_ray.config import SimConfig
from cosmos_ray.errors import ConfigError, SimulationError
from cosmos_ray.inference.core import InferenceCore
from cosmos_ray.inference.local import LocalClient
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.rollout.core import RolloutCore
from cosmos_ray.rollout.demonstrator import DemonstratorCore
from cosmos_ray.rollout.ticket import EpisodeTicket, state_seed
from cosmos_ray.sim.child import Limits, SimulatorChild, SimulatorLost
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.simulators import Simulators
from tests.test_planning import demo_policy
from tests.test_replay_episode import assert_same

SIM = SimConfig(horizon=20)  # chunks of 8: two whole ones and a half
TROUBLE = 3  #: place of the ticket that breaks the simulators, among :func:`tickets`

pytestmark = pytest.mark.usefixtures("one_thread")


def tickets(count: int) -> list[EpisodeTicket]:
    seeds = [state_seed("rollout", 0, index) for index in range(count)]
    return [EpisodeTicket(EpisodeKey("run", "Lift", "rollout", seed), noise_seed=seed, frame_stride=4) for seed in seeds]


def worker(simulators, folder: Path) -> RolloutCore:
    return RolloutCore(simulators, ReplayStore(folder), LocalClient(InferenceCore(demo_policy(), 4)), steps=1)


def finish(core, work: list) -> list:
    finished, until = core.advance(work, 1.0), time.monotonic() + 300
    while len(finished) < len(work):
        assert time.monotonic() < until, "the episodes never finished"
        finished += core.advance([], 1.0)
    return finished


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


@pytest.fixture
def child():
    """``child(count, ...)`` starts simulators in a child process."""
    made = []

    def make(count: int = 2, config: SimConfig = SIM, **limits) -> SimulatorChild:
        made.append(SimulatorChild(config, count, Limits(**limits)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def assert_as_in_this_process(store: ReplayStore, reference: ReplayStore, expected: list[EpisodeTicket]) -> None:
    assert store.keys() == sorted(t.key.name for t in expected)
    for name in store.keys():
        mine, theirs = store.read(name), reference.read(name)
        for episode in (mine, theirs):
            episode.info["seconds"] = 0
        assert_same(mine, theirs)


def breaking(core: RolloutCore, how) -> list[int]:
    """Have ``how(pid)`` befall the child under the second chunk of ticket TROUBLE, every time; returns the pids of those children."""
    execute, broken = core.simulators.execute, []

    def watched(place, chunk, *arguments):
        running = next(slot.running for half in core._halves for slot in half.slots if slot.place == place)
        if running.ticket == tickets(TROUBLE + 1)[-1] and running.trajectory.length == 8:
            broken.append(core.simulators.pid)
            how(core.simulators.pid)
        return execute(place, chunk, *arguments)

    core.simulators.execute = watched
    return broken


# ---------------------------------------------------------------- outcomes


def test_episodes_are_those_of_simulators_in_the_same_process(child, reference, tmp_path):
    core = worker(child(3), tmp_path)
    finished = finish(core, tickets(6))
    assert all(f.new and not f.broken for f in finished) and core.simulators.generation == 0
    assert_as_in_this_process(core.store, reference, tickets(6))


def test_a_child_is_replaced_after_its_episodes_and_running_ones_go_on_bit_for_bit(child, reference, tmp_path):
    core = worker(child(2, episodes=2), tmp_path)
    finished = finish(core, tickets(6))
    assert core.simulators.generation >= 2 and not any(f.broken for f in finished)
    assert_as_in_this_process(core.store, reference, tickets(6))


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_child_killed_by_a_signal_under_a_chunk_costs_that_episode_alone(child, reference, tmp_path, number):
    core = worker(child(2), tmp_path)
    broken = breaking(core, lambda pid: os.kill(pid, number))
    finished = finish(core, tickets(6))
    (lost,) = [f for f in finished if f.broken]
    assert lost.name == tickets(6)[TROUBLE].key.name and signal.Signals(number).name in lost.broken and not lost.problem
    assert core.simulators.generation == len(broken) == 1 and not psutil.pid_exists(broken[0])
    assert_as_in_this_process(core.store, reference, tickets(6)[:TROUBLE] + tickets(6)[TROUBLE + 1 :])


def test_a_child_that_hangs_is_replaced_after_the_deadline(child, reference, tmp_path):
    core = worker(child(2, order_s=3.0), tmp_path)
    broken = breaking(core, lambda pid: os.kill(pid, signal.SIGSTOP))
    finished = finish(core, tickets(6))
    (lost,) = [f for f in finished if f.broken]
    assert lost.broken.startswith("no answer for 3 s") and lost.name == tickets(6)[TROUBLE].key.name
    assert not psutil.pid_exists(broken[0])
    assert_as_in_this_process(core.store, reference, tickets(6)[:TROUBLE] + tickets(6)[TROUBLE + 1 :])


def test_a_child_killed_between_two_orders_costs_nothing(child, reference, tmp_path):
    core = worker(child(2), tmp_path)
    work = tickets(6)
    core.advance(work, 0.0)
    while not any(slot.running and slot.running.trajectory.length == 8 for half in core._halves for slot in half.slots):
        core.advance([], 0.01)
    os.kill(core.simulators.pid, signal.SIGKILL)
    core.simulators._process.wait()
    finished = finish(core, [])
    while len(finished) < 6:
        finished += core.advance([], 1.0)
    assert core.simulators.deaths == ["died of SIGKILL"] and not any(f.broken for f in finished)
    assert_as_in_this_process(core.store, reference, work)


# ---------------------------------------------------------------- the child itself


def started(simulators: SimulatorChild) -> SimulatorChild:
    wait_for(lambda: simulators.ready(1.0), 300)
    return simulators


def test_a_child_that_grows_under_a_chunk_is_replaced(child):
    """A horizon and a chunk of a million steps: the record of the chunk is what grows."""
    simulators = started(child(1, SimConfig(horizon=10**6)))
    simulators.limits = Limits(order_s=300, memory_mb=simulators.memory_mb + 15)
    simulators.begin(0, 1)
    chunk = np.zeros((10**6, 4), np.float32)
    with pytest.raises(SimulatorLost, match="MB under way, above rollout.simulator_memory_mb"):
        simulators.execute(0, chunk)
    started(simulators).begin(0, 1)
    assert simulators.generation == 1


def test_a_child_above_its_memory_between_two_orders_is_replaced(child):
    simulators = started(child(1))
    assert simulators.memory_mb > 100
    simulators.limits = Limits(memory_mb=simulators.memory_mb - 1)
    simulators._looked = 0.0
    assert simulators._used_up() and not simulators._used_up()  # looked a moment ago
    simulators._looked = 0.0
    assert not simulators.ready(0.0) and simulators.generation == 1
    with pytest.raises(ConfigError, match="raise it, or lower rollout.envs_per_worker"):  # the new one needs as much
        simulators.limits = Limits(memory_mb=50)
        started(simulators)


def test_a_hung_child_says_where(child):
    simulators = started(child(1, SimConfig(horizon=10**6), order_s=2.0))
    simulators.begin(0, 1)
    with pytest.raises(SimulatorLost, match=r"no answer for 2 s, in \w+ \(\w+\.py:\d+\)"):
        simulators.execute(0, np.zeros((10**6, 4), np.float32))


def test_what_the_child_raises_while_it_starts_is_raised_as_itself(child):
    simulators = child(1, SimConfig(third_cameras=("nowhere",)))
    with pytest.raises(ConfigError, match="nowhere"):
        started(simulators)


def test_children_that_do_not_start_are_given_up(child, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    simulators = child(1)
    with pytest.raises(SimulationError, match="did not start 3 times in a row, last: ended with exit code 1"):
        started(simulators)


def test_a_bug_in_the_child_is_not_swallowed(child):
    simulators = started(child(1))
    with pytest.raises(RuntimeError, match="no episode runs at place 0"):
        simulators.execute(0, np.zeros((8, 4), np.float32))
    simulators.begin(0, 1)  # and the child lives on


def test_a_child_has_neither_ray_nor_torch(child):
    simulators = started(child(1))
    maps = Path(f"/proc/{simulators.pid}/maps").read_text()
    assert "mujoco" in maps and not any(name in maps for name in ("_raylet", "libtorch", "libarrow"))


@pytest.mark.parametrize("busy", [False, True])
def test_a_child_dies_with_its_parent(busy):
    """Also in the middle of an order, when it does not look at its parent."""
    code = ("import numpy, sys; from cosmos_ray.config import SimConfig; from cosmos_ray.sim.child import Limits, SimulatorChild\n"
            "child = SimulatorChild(SimConfig(horizon=10**6), 1, Limits(600))\n"
            "while not child.ready(1.0): pass\n"
            "child.begin(0, 1); print(child.pid, flush=True)\n"
            f"child.execute(0, numpy.zeros((10**6, 4), 'f')) if {busy} else sys.stdin.read()")
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert psutil.Process(pid).ppid() == parent.pid
    parent.kill()
    parent.wait()
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 10)


def test_a_demonstration_that_breaks_its_simulator_is_reported_and_the_next_one_runs(child, tmp_path):
    core = DemonstratorCore(child(1), ReplayStore(tmp_path))
    keys = [EpisodeKey("run", "Lift", "demo", state_seed("demo", 0, index)) for index in range(2)]
    demonstrate = core.simulators.demonstrate

    def broken(place, seed):
        if seed == keys[0].seed:
            os.kill(core.simulators.pid, signal.SIGSEGV)
        return demonstrate(place, seed)

    core.simulators.demonstrate = broken
    first, second = finish(core, keys)
    assert (first.name, bool(first.broken), first.new, second.broken, second.new) == (keys[0].name, True, False, "", True)
    assert core.store.keys() == [second.name]
