"""Finished episodes while the store cannot be written: full, read-only and unmounted file systems, and what workers do meanwhile."""

import dataclasses
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from cosmos_ray.config import RunConfig, SimConfig
from cosmos_ray.errors import StoreError, StoreUnavailable
from cosmos_ray.inference.core import InferenceCore
from cosmos_ray.inference.local import LocalClient
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.rollout.actor import DemonstratorActor
from cosmos_ray.rollout.calls import RayCalls
from cosmos_ray.rollout.core import RolloutCore
from cosmos_ray.rollout.demonstrator import DemonstratorCore, failure_key
from cosmos_ray.rollout.fleet import Fleet
from cosmos_ray.rollout.outbox import LONGEST_WAIT_S, Outbox
from cosmos_ray.rollout.ticket import EpisodeTicket
from cosmos_ray.seeds import state_seed
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.simulators import Simulators
from cosmos_ray.supervision import Supervisor
from tests.anywhere import Anywhere
from tests.test_planning import demo_policy
from tests.test_replay_crash import names_on_disk, tiny_disk  # noqa: F401 - a fixture
from tests.test_replay_episode import assert_same, make_episode

PATIENCE_S = 100.0


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def mount(*arguments):
    subprocess.run(["mount", *map(str, arguments)], check=True)


class Full:
    advice = "the disk is full"

    def __init__(self, disk):
        self.ballast = disk / "ballast"

    def begin(self):
        with self.ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    def end(self):
        self.ballast.unlink()


class ReadOnly:
    advice = "the file system is read-only"

    def __init__(self, disk):
        self.disk = disk

    def begin(self):
        mount("-o", "remount,ro", self.disk)

    def end(self):
        mount("-o", "remount,rw", self.disk)


class Unmounted:
    """What is under the mount point then is an empty directory that can be written."""

    advice = "has vanished"

    def __init__(self, disk):
        self.disk, self.kept = disk, disk.with_name("kept")
        self.kept.mkdir()
        mount("--bind", disk, self.kept)

    def begin(self):
        subprocess.run(["umount", "--lazy", self.disk], check=True)

    def end(self):
        assert not list(self.disk.iterdir())  # nothing was written below the mount
        mount("--bind", self.kept, self.disk)


@pytest.fixture(params=[Full, ReadOnly, Unmounted])
def trouble(request, tiny_disk):  # noqa: F811
    made = request.param(tiny_disk)
    yield made
    if request.param is Unmounted:
        subprocess.run(["umount", "--lazy", made.kept], check=True)


@pytest.fixture
def store(tiny_disk):  # noqa: F811
    return ReplayStore(tiny_disk / "store")


def temporaries(store):
    return [path for path in Path(store.root).rglob("*") if path.name.endswith(".tmp")]


def test_an_episode_waits_until_the_store_can_be_written_again(trouble, store, caplog):
    clock = Clock()
    outbox = Outbox(store, PATIENCE_S, clock)
    outbox.put(make_episode(0), "before")
    assert outbox.flush() == [("before", True)]
    trouble.begin()
    for seed in (1, 2, 0):
        outbox.put(make_episode(seed), seed)
    tries = 0
    while clock.now < 0.8 * PATIENCE_S:
        assert outbox.flush() == [] and len(outbox) == 3 and outbox.failing
        clock.now += 1.0
        tries += 1
    (warning,) = [record.getMessage() for record in caplog.records]
    assert trouble.advice in warning and "\n" not in warning and "kept in memory" in warning
    trouble.end()
    assert ReplayStore(store.root, create=False).refresh()[0].key.seed == 0 and len(names_on_disk(store.root)) == 1
    assert temporaries(store) == []
    clock.now += LONGEST_WAIT_S
    assert outbox.flush() == [(1, True), (2, True), (0, False)]  # the last was stored before
    assert len(outbox) == 0 and outbox.flush() == [] and not outbox.failing
    assert len(names_on_disk(store.root)) == 3
    for seed in range(3):
        assert_same(ReplayStore(store.root, create=False).read(make_episode(seed).key.name), make_episode(seed))
    assert len(caplog.records) == 2 and "can be used again" in caplog.records[1].getMessage()


def test_once_patience_is_over_there_is_one_clear_error_and_nothing_half_written(trouble, store, caplog):
    clock = Clock()
    outbox = Outbox(store, PATIENCE_S, clock)
    trouble.begin()
    outbox.put(make_episode(0))
    with pytest.raises(StoreUnavailable, match=trouble.advice) as error:
        for _ in range(100):
            outbox.flush()
            clock.now += LONGEST_WAIT_S
    message = str(error.value)
    assert "\n" not in message and "1 finished episodes are lost with this process" in message
    assert PATIENCE_S <= clock.now <= PATIENCE_S + 2 * LONGEST_WAIT_S and len(caplog.records) == 1
    trouble.end()
    assert names_on_disk(store.root) == [] and temporaries(store) == []


def test_without_patience_the_first_failure_is_the_error(trouble, store, caplog):
    outbox = Outbox(store, 0.0)
    trouble.begin()
    outbox.put(make_episode(0))
    with pytest.raises(StoreUnavailable, match=trouble.advice):
        outbox.flush()
    assert not caplog.records
    trouble.end()


def test_tries_become_rarer_and_a_second_trouble_has_a_patience_of_its_own(store):
    clock, tries = Clock(), []
    outbox = Outbox(store, 60.0, clock)

    def down():
        tries.append(clock.now)
        raise StoreUnavailable("down")

    def hold(seconds):
        for _ in range(4 * seconds):
            assert outbox.attempt(down) == (False, None)
            clock.now += 0.25

    hold(59)
    gaps = [b - a for a, b in zip(tries, tries[1:], strict=False)]
    assert gaps == sorted(gaps) and gaps[0] == 0.25 and gaps[-1] == LONGEST_WAIT_S
    clock.now = tries[-1] + LONGEST_WAIT_S
    assert outbox.attempt(lambda: "up") == (True, "up")
    hold(59)  # raises if the first trouble counted


def test_an_error_that_no_later_try_can_mend_is_raised_at_once(tmp_path, caplog):
    outbox = Outbox(ReplayStore(tmp_path / "store"), PATIENCE_S)
    outbox.put(make_episode(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(StoreError, match="file size limit") as error:
            outbox.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not isinstance(error.value, StoreUnavailable) and not caplog.records


# ---------------------------------------------------------------- workers


@pytest.fixture(scope="module")
def short_and_long():
    """Two simulators, whose episodes take one chunk and many."""
    made = [Environment(SimConfig(horizon=8)), Environment(SimConfig(horizon=40))]
    yield made
    for env in made:
        env.close()


def ticket(index):
    return EpisodeTicket(EpisodeKey("run", "Lift", "rollout", state_seed("rollout", 0, index)), noise_seed=index)


def test_a_worker_runs_on_without_new_episodes_and_reports_one_once_it_is_durable(store, tiny_disk, short_and_long, caplog):  # noqa: F811
    trouble = ReadOnly(tiny_disk)
    mount("-o", "remount,size=8m", tiny_disk)
    torch.set_num_threads(1)
    core = RolloutCore(Simulators(short_and_long), store, LocalClient(InferenceCore(demo_policy(), 1)), steps=1, patience_s=1e6)
    short, long = (half.slots[0] for half in core._halves)
    outbox_turns, turn = [], core._turn

    def watched(half):
        outbox_turns.append((len(core.outbox), short.running is None, long.running.trajectory.length if long.running else None))
        return turn(half)

    core._turn = watched
    for _ in range(200):  # begin both, then stop before the short one ends
        if long.running is not None:
            break
        core._queue.extend([ticket(0), ticket(1), ticket(2)] if not core._queue else [])
        for half in core._halves:
            turn(half)
    assert short.running.trajectory.length == 0 and [t.key.seed for t in core._queue] == [ticket(2).key.seed]
    trouble.begin()
    reported = []
    while long.running is not None and len(outbox_turns) < 10_000:
        reported += core.advance([], 0.2)  # comes back although it has not stored anything
    held = [steps for waiting, idle, steps in outbox_turns if waiting == 1 and idle and steps is not None]
    assert reported == [] and len(core.outbox) == 2  # the long one ended while the short one waited
    assert min(held) <= 16 and max(held) >= 32 and len(core._queue) == 1
    assert core.advance([], 0.2) == [] and short.running is None  # still no new episode
    assert len(caplog.records) == 1
    trouble.end()
    for _ in range(1000):
        reported += core.advance([], 0.2)
        assert len(caplog.records) <= 2
        if len(reported) == 3:
            break
    assert [done.name for done in reported] == [ticket(i).key.name for i in range(3)] and all(done.new for done in reported)
    kept = ReplayStore(store.root, create=False)
    assert sorted(s.name for s in kept.refresh()) == sorted(done.name for done in reported)
    assert [kept.read(done.name).length for done in reported] == [8, 40, 8]


def test_a_worker_whose_store_is_away_when_it_wants_to_begin_waits_too(store, tiny_disk, short_and_long):  # noqa: F811
    core = RolloutCore(Simulators(short_and_long[:1]), store, LocalClient(InferenceCore(demo_policy(), 1)), steps=1, patience_s=1e6)
    trouble = Unmounted(tiny_disk)
    trouble.begin()
    try:
        assert core.advance([ticket(0)], 0.3) == [] and core._halves[0].slots[0].running is None
        trouble.end()
        reported = []
        for _ in range(1000):
            reported += core.advance([], 0.2)
            if reported:
                break
        assert [done.name for done in reported] == [ticket(0).key.name]
    finally:
        subprocess.run(["umount", "--lazy", trouble.kept], check=True)


def test_a_demonstrator_comes_back_in_time_and_reports_once_it_is_durable(store, tiny_disk):  # noqa: F811
    trouble = Full(tiny_disk)
    env = Environment(SimConfig(horizon=5, image_size=16))  # every demonstration fails, in a moment
    core = DemonstratorCore(Simulators([env]), store, patience_s=1e6)
    keys = [EpisodeKey("run", "Lift", "demo", state_seed("demo", 0, index)) for index in range(3)]
    names = [failure_key(key).name for key in keys]
    assert [done.name for done in core.advance(keys[:1], 0.1)] == names[:1]
    trouble.begin()
    assert core.advance(keys[1:], 0.1) == [] and core.advance([], 0.1) == []
    assert len(core.outbox) <= 1 and len(core.outbox) + len(core._queue) == 2  # the second is not even begun
    trouble.end()
    reported = []
    for _ in range(1000):
        reported += core.advance([], 0.1)
        if len(reported) == 2:
            break
    assert [(done.name, done.new) for done in reported] == [(name, True) for name in names[1:]]
    assert sorted(names_on_disk(store.root)) == sorted(f"{name}.arrow" for name in names)
    env.close()


def test_the_fleet_keeps_a_worker_that_waits_for_the_store(tiny_disk, store, local_ray):  # noqa: F811
    """The outage lasts for longer than a worker may be silent."""
    config = dataclasses.replace(RunConfig(), sim=SimConfig(horizon=5, image_size=16))
    keys = [EpisodeKey("run", "Lift", "demo", state_seed("demo", 0, index)) for index in range(3)]
    supervisor = Supervisor()
    crew = Anywhere(lambda i: DemonstratorActor.options(num_cpus=1).remote(config, str(store.root)))
    fleet = Fleet(crew, RayCalls(), 1, 2, lambda key: (key.name, failure_key(key).name), 8.0, supervisor, turn_s=0.5)
    trouble = ReadOnly(tiny_disk)
    try:
        fleet.submit(keys[:1])
        finished = []
        while fleet.outstanding:
            finished += fleet.poll(timeout=5.0)
        trouble.begin()
        fleet.submit(keys[1:])
        until = time.monotonic() + 10.0
        while time.monotonic() < until:
            assert fleet.poll(timeout=0.5) == []
        assert "cannot commit an episode" in supervisor.waiting["rollout worker 0"][0]
        trouble.end()
        while fleet.outstanding:
            finished += fleet.poll(timeout=5.0)
        assert fleet.replaced == 0
        assert sorted((done.name, done.new) for done in finished) == sorted((failure_key(key).name, True) for key in keys)
    finally:
        fleet.close()
    assert len(names_on_disk(store.root)) == 3 and os.path.exists(store.root)
