"""Eviction: what is kept is the same to the bit, what is gone stays gone, whenever the evicting process is killed."""

import json
import os
import shutil
import signal
import threading

import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.sampling.sampler import WindowSampler
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.replay.upkeep.repair import repair, verify
from cosmos_ray.rollout.ticket import stored_result
from tests.test_replay_episode import assert_same
from tests.test_replay_storage import die_before, fill, in_child, opened, scratch_folder, tiny

in_memory = pytest.fixture(scratch_folder, name="tmp_path")


def loose(root):
    return sorted(path.name.removesuffix(".arrow") for path in (root / "episodes").rglob("*.arrow"))


def name_of(seed):
    return tiny(seed).key.name


def assert_holds(root, seeds, removed=()):
    """A fresh process finds exactly the episodes of ``seeds``, each once and as it was, and verify has nothing to say."""
    store = opened(root)
    assert store.keys() == sorted(name_of(seed) for seed in seeds)
    for seed in seeds:
        assert_same(store.read(name_of(seed)), tiny(seed))
        assert store.commit(tiny(seed)) is False
    for seed in removed:
        assert name_of(seed) in store and store.commit(tiny(seed)) is False
    return store


@pytest.fixture
def store(tmp_path):
    """Six demonstrations."""
    return fill(tmp_path / "store", range(6))


def test_evicted_keys_stay_taken_everywhere(store):
    running, never = opened(store.root), ReplayStore(store.root)
    assert store.evict([name_of(0), name_of(1), name_of(0), "unknown"], "too old") == 2
    assert len(store) == 4 and len(loose(store.root)) == 4
    for each in (store, running, never, ReplayStore(store.root)):
        assert each.commit(tiny(0)) is False and name_of(0) in each
        assert each.evicted(name_of(0))["reason"] == "too old"
    running.update()
    assert running.keys() == [name_of(seed) for seed in range(2, 6)]
    never.update()
    with pytest.raises(StoreError, match="cannot read"):
        opened(store.root).read(name_of(0))
    assert_holds(store.root, (2, 3, 4, 5), removed=(0, 1))
    assert not any(each.commit(tiny(1)) for each in (running, never))


def test_readers_in_another_process_survive_an_eviction(store):
    """A reader that holds a view, an open store and a sampler goes on; it misses the evicted episodes alone."""
    ready, go = os.pipe(), os.pipe()
    names = [name_of(seed) for seed in (0, 1)]

    def read():
        reader = opened(store.root, open_limit=2)
        held, sampler = reader.view(names[0]), WindowSampler(reader, chunk=1, gamma=0.9, seed=0)
        sampler.draw(4)
        os.write(ready[1], b"x")
        assert os.read(go[0], 1) == b"x"
        assert_same(held.episode(), tiny(0))  # mapped: its bytes stay until it is let go
        for _ in range(20):
            sampler.draw(8)  # meets episodes whose files are gone, and goes on without them
        sampler.refresh()
        assert not set(sampler.draw(40).episodes) & set(names) and set(reader.keys()).isdisjoint(names)
        for seed in range(2, 6):
            assert_same(reader.read(name_of(seed)), tiny(seed))
        assert not reader.quarantine.entries()

    def control():
        os.read(ready[0], 1)
        store.evict(names, "test")
        os.write(go[1], b"x")

    thread = threading.Thread(target=control)
    thread.start()
    status = in_child(read)
    os.write(ready[1], b"x")
    thread.join()
    assert status == 0


def test_ticket_of_an_evicted_episode_is_done(store):
    """Also in a worker that knew the episode and has not refreshed since; what is not there has to run."""
    worker, late = opened(store.root), opened(store.root)
    late.view(name_of(0))
    before = stored_result(worker, name_of(0))
    store.evict([name_of(0)], "old")
    for each in (store, worker, late, ReplayStore(store.root)):
        assert stored_result(each, name_of(0)) == before and before.success and before.length == 2 and not before.new
        assert stored_result(each, name_of(7)) is None


def test_eviction_killed_at_any_step_is_done_or_not_begun(tmp_path):
    root = tmp_path / "made"
    fill(root, range(5))
    for step in range(10):
        copy = shutil.copytree(root, tmp_path / f"copy-{step}")

        def run(copy=copy, step=step):
            victim = opened(copy)
            die_before(step)
            victim.evict([name_of(0), name_of(2), name_of(3)], "old")

        status = in_child(run)
        recorded = bool(list((copy / "removed").glob("*.jsonl")) if (copy / "removed").exists() else [])
        assert recorded == (step > 0)
        gone = (0, 2, 3) if recorded else ()
        assert_holds(copy, [seed for seed in range(5) if seed not in gone], gone)
        left = [problem.path for problem in verify(opened(copy)).problems if problem.fault == "evicted"]
        kept = {name_of(1), name_of(4)}
        assert set(loose(copy)) - kept == {path.split("/")[-1].removesuffix(".arrow") for path in left} or not recorded
        assert repair(copy).leftovers == len(left)
        assert_holds(copy, [seed for seed in range(5) if seed not in gone], gone)
        assert verify(opened(copy)).problems == ()
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert step >= 4  # the record and three files


def test_damaged_record_of_removals_costs_only_its_lines(store, caplog):
    store.evict([name_of(0), name_of(1)], "old")
    (path,) = (store.root / "removed").glob("*.jsonl")
    lines = path.read_text().splitlines()
    record = json.loads(lines[1])
    hostile = [{**record, "name": 5}, {**record, "kind": "other"}, {**record, "length": "x"}, {"name": "a"}, [], 7,
               {**record, "name": "../../etc/passwd"}]  # fmt: skip
    path.write_text("\n".join([lines[0], "{torn", "[" * 100_000, *map(json.dumps, hostile)]) + "\n\xff")
    again = opened(store.root)
    assert again.evicted(name_of(0)) and again.commit(tiny(0)) is False
    assert again.evicted(name_of(1)) is None and len(again) == 4
    assert sum("do not say what was removed" in record.message for record in caplog.records) == 1
    (problem,) = verify(again).problems
    assert problem.fault == "damaged" and problem.path == str(path.relative_to(store.root))
    repair(store.root)
    assert path.exists() and opened(store.root).evicted(name_of(0))  # what it says still counts
