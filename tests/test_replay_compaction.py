"""Compaction and eviction: what is kept is the same to the bit, what is gone stays gone, whenever they are killed."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import threading

import numpy as np
import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import catalog, removals
from cosmos_ray.replay.files.storage import LocalStorage
from cosmos_ray.replay.format import schema
from cosmos_ray.replay.sampling.sampler import WindowSampler
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.replay.upkeep import compaction
from cosmos_ray.replay.upkeep.compaction import compact
from cosmos_ray.replay.upkeep.repair import repair, verify
from cosmos_ray.rollout.ticket import stored_result
from tests.test_replay_episode import assert_same
from tests.test_replay_manifest import same_batches, write_version_1, write_version_3
from tests.test_replay_storage import die_before, fill, in_child, opened, scratch_folder, tiny

in_memory = pytest.fixture(scratch_folder, name="tmp_path")


def loose(root):
    return sorted(path.name.removesuffix(".arrow") for path in (root / "episodes").rglob("*.arrow"))


def packs(root):
    return sorted((root / "packs").rglob("*.arrow"))


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
    """Six demonstrations, loose."""
    return fill(tmp_path / "store", range(6))


def flip(path, needle):
    """Change one bit in the middle of ``needle`` in a file."""
    data = bytearray(path.read_bytes())
    data[data.index(needle) + len(needle) // 2] ^= 4
    path.write_bytes(data)


def test_episodes_and_draws_are_the_same_before_during_and_after(store, monkeypatch):
    """For samplers of this process, and of another one that was opened before."""
    before = WindowSampler(store, chunk=1, gamma=0.9, seed=0)
    other = WindowSampler(opened(store.root), chunk=1, gamma=0.9, seed=0)
    stream = WindowSampler(opened(store.root), chunk=1, gamma=0.9, seed=0)
    expected = [stream.draw(6) for _ in range(3)]
    held = [store.view(name) for name in store.keys()]
    same_batches(before.draw(6), expected[0])
    same_batches(other.draw(6), expected[0])
    during = []

    published = LocalStorage.publish

    def publish(self, *arguments):
        new = published(self, *arguments)
        during.append(WindowSampler(opened(store.root), chunk=1, gamma=0.9, seed=0).draw(6))
        other.refresh()
        same_batches(other.draw(6), expected[1])
        return new

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "publish", publish)
        done = compact(store)
    assert (done.packed, done.packs, done.removed, done.damaged) == (6, 1, 6, ())
    assert loose(store.root) == [] and len(packs(store.root)) == 1
    same_batches(during[0], expected[0])
    assert before.refresh() == 0 and other.refresh() == 0  # nothing is new
    same_batches(before.draw(6), expected[1])
    same_batches(other.draw(6), expected[2])
    same_batches(WindowSampler(opened(store.root), chunk=1, gamma=0.9, seed=0).draw(6), expected[0])
    for seed, view in enumerate(held):  # sorted names are in the order of the seeds
        assert_same(view.episode(), tiny(seed))
        assert_same(store.read(name_of(seed)), tiny(seed))
    assert_holds(store.root, range(6))
    assert verify(opened(store.root)).problems == ()


def test_readers_in_another_process_survive(store):
    """It holds views and a sampler, does not refresh, and reads on after everything has moved."""
    ready, go = os.pipe(), os.pipe()

    def read():
        reader = opened(store.root, open_limit=2)
        held = reader.view(name_of(0))
        sampler = WindowSampler(reader, chunk=1, gamma=0.9, seed=0)
        sampler.draw(4)
        os.write(ready[1], b"x")
        assert os.read(go[0], 1) == b"x"
        assert_same(held.episode(), tiny(0))
        for seed in range(6):
            assert_same(reader.read(name_of(seed)), tiny(seed))
        sampler.draw(20)
        assert len(reader) == 6 and sampler.refresh() == 0 and not reader.quarantine.entries()

    def control():
        os.read(ready[0], 1)
        compact(store)
        os.write(go[1], b"x")

    thread = threading.Thread(target=control)
    thread.start()
    status = in_child(read)
    os.write(ready[1], b"x")
    thread.join()
    assert status == 0


def test_retry_of_a_packed_key_is_no_new_commit(store):
    """In the process that packed, in one that knew the file, in one that never refreshed, and with and without a manifest."""
    knew = opened(store.root)
    compact(store)
    never = ReplayStore(store.root)
    assert not any(each.commit(tiny(3)) for each in (store, knew, never))
    (store.root / "manifest.arrow").unlink()
    never = ReplayStore(store.root)
    assert never.commit(tiny(3)) is False and name_of(3) in ReplayStore(store.root)
    assert loose(store.root) == []
    assert never.commit(tiny(6)) is True


def test_commit_that_races_with_a_compaction_is_one_commit(store, monkeypatch):
    """The key is packed between the look at the packs and the write, in another process."""
    knew, published = ReplayStore(store.root), LocalStorage.publish

    def publish(self, *arguments):
        monkeypatch.undo()
        compact(store)
        return published(self, *arguments)

    monkeypatch.setattr(LocalStorage, "publish", publish)
    assert knew.commit(tiny(3)) is False
    assert_same(knew.read(name_of(3)), tiny(3))
    assert loose(store.root) == [] and len(opened(store.root)) == 6


def test_known_file_that_turns_into_a_pack_during_a_retry_is_found(store, monkeypatch):
    """The name is still taken when it is tried, and gone when it is read afterwards."""
    knew, summarise = opened(store.root), catalog.Catalog.summarise

    def late(self, *arguments):
        monkeypatch.undo()
        existing = summarise(self, *arguments)
        compact(store)
        return existing

    monkeypatch.setattr(catalog.Catalog, "summarise", late)
    assert knew.commit(tiny(3)) is False
    assert_same(knew.read(name_of(3)), tiny(3))


def test_moved_episode_is_not_reported_as_new_although_the_listing_was_older(store, monkeypatch):
    """The compaction happens after a reader looked for packs and before it lists the files."""
    reader = opened(store.root)
    assert len(reader.refresh()) == 6
    scan = LocalStorage.scan

    def late(self, folder, *arguments):
        if folder == "episodes":
            monkeypatch.undo()
            compact(store)
        return scan(self, folder, *arguments)

    monkeypatch.setattr(LocalStorage, "scan", late)
    assert reader.refresh() == [] and reader.refresh() == [] and len(reader) == 6 and reader.index.removed == 0


def test_another_episode_under_a_packed_name_is_refused(store, monkeypatch):
    compact(store)
    other, name = tiny(3, run="another run"), name_of(3)
    monkeypatch.setattr(type(other.key), "name", property(lambda key: name))
    with pytest.raises(StoreError, match="holds another episode whose name is the same"):
        opened(store.root).commit(other)


def test_different_schemas_and_tasks_go_to_different_packs(tmp_path):
    store = fill(tmp_path / "store", range(3))
    for seed in range(3, 6):
        write_version_1(store.root, tiny(seed))
        store.commit(dataclasses.replace(tiny(seed, task="Stack"), cameras=("front", "wrist")))
    assert compact(store).packs == 3
    assert sorted(path.parent.name for path in packs(store.root)) == ["demo-Lift", "demo-Lift", "demo-Stack"]
    again = opened(store.root)
    for seed in range(6):
        assert_same(again.read(name_of(seed)), tiny(seed))
        assert again.view(name_of(seed)).version == (2 if seed < 3 else 1)
    assert len(again) == 9 and verify(again, decode=True).problems == ()


def test_packs_are_about_as_large_as_asked_and_the_young_stay_loose(store):
    size = store.summaries()[0].size
    assert compact(store, min_age_s=1000).packed == 0 and len(loose(store.root)) == 6
    seen = []
    assert compact(store, pack_bytes=2 * size, progress=lambda *done: seen.append(done)).packs == 3
    assert seen == [(i, 6) for i in range(1, 7)]
    assert_holds(store.root, range(6))
    assert compact(store) == compaction.Compacted(0, 0, 0, ())  # nothing left to do


def test_more_episodes_than_files_may_be_open_are_packed(tmp_path):
    store = fill(tmp_path / "store", range(40))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, hard))
        assert compact(ReplayStore(store.root, open_limit=8)).packed == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(opened(store.root)) == 40


# ---------------------------------------------------------------- killed, twice at once


def test_killed_at_any_step_it_loses_nothing_and_doubles_nothing(tmp_path):
    """Loose files, a pack that is to be rewritten and one that is all evicted; the next compaction cleans up."""
    root = tmp_path / "made"
    store = fill(root, range(4))
    compact(store)
    store.evict([name_of(0), name_of(1)], "old")
    fill(root, range(4, 6))
    compact(store, dead_share=1.0)
    store.evict([name_of(4), name_of(5)], "old")
    fill(root, range(6, 9))
    for step in range(100):
        copy = shutil.copytree(root, tmp_path / f"copy-{step}")

        def run(copy=copy, step=step):
            victim = opened(copy)
            die_before(step)
            compact(victim)

        status = in_child(run)
        assert_holds(copy, (2, 3, 6, 7, 8), removed=(0, 1, 4, 5))
        doubled = verify(opened(copy)).problems
        assert {problem.kind for problem in doubled} <= {"doubled"}
        compact(opened(copy))
        compact(opened(copy))  # a pack whose successors are all there is deleted by the one after
        assert_holds(copy, (2, 3, 6, 7, 8), removed=(0, 1, 4, 5))
        assert loose(copy) == [] and verify(opened(copy)).problems == ()
        shutil.rmtree(copy)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert step > 6  # two packs, three files, two old packs, the manifest


def test_two_compactions_at_once_lose_nothing(tmp_path):
    root = tmp_path / "store"
    fill(root, range(20))
    ready = os.pipe()

    def run():
        mine = opened(root)
        os.read(ready[0], 1)
        compact(mine, pack_bytes=20_000)
        compact(mine)

    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            os._exit(0 if in_child(run) == 0 else 1)
        children.append(child)
    os.write(ready[1], b"xxx")
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert_holds(root, range(20))
    compact(opened(root), dead_share=0.0)
    assert_holds(root, range(20))
    assert loose(root) == [] and verify(opened(root)).problems == ()


def test_two_compactions_that_packed_the_same_agree_on_the_pack_that_counts(store, monkeypatch):
    """Each sees its own pack first, and the other's later: neither may take its own for the only one and delete the other's."""
    first, second = opened(store.root), opened(store.root)
    monkeypatch.setattr(compaction._Compaction, "remove_leftovers", lambda self: None)
    publish = LocalStorage.publish

    def both(self, path, *arguments):
        if path.startswith("packs/"):
            monkeypatch.setattr(LocalStorage, "publish", publish)
            compact(second)
        return publish(self, path, *arguments)

    monkeypatch.setattr(LocalStorage, "publish", both)
    compact(first)
    monkeypatch.undo()
    assert len(packs(store.root)) == 2
    for each in (first, second):
        each.update()
    for each in (second, opened(store.root)):
        assert each.index.place(name_of(0)) == first.index.place(name_of(0))
    compact(first)
    compact(second)
    assert len(packs(store.root)) == 1
    assert_holds(store.root, range(6))


def test_pack_is_newer_than_those_before_it_whatever_the_clock_says(store, monkeypatch):
    compact(store)
    store.evict([name_of(0), name_of(1), name_of(2)], "old")
    monkeypatch.setattr(compaction.time, "time_ns", lambda: 1_000_000_000_000_000_000)  # years ago
    compact(store)
    assert len(packs(store.root)) == 1
    assert_holds(store.root, (3, 4, 5), removed=(0, 1, 2))


# ---------------------------------------------------------------- damage


def test_damaged_episode_is_quarantined_and_named_and_not_packed(store):
    flip(store.root / store.path(name_of(2)), tiny(2).actions.tobytes())
    done = compact(opened(store.root))
    assert done.damaged == (name_of(2),) and done.packed == 5
    (entry,) = store.quarantine.entries()
    assert name_of(2) in entry["file"] and "column action does not match its checksum" in entry["reason"]
    again = opened(store.root)
    assert len(again) == 5 and again.commit(tiny(2)) is True


@pytest.mark.parametrize("how", ["torn", "empty", "no end", "foreign"])
@pytest.mark.parametrize("manifest", [True, False])
def test_pack_that_is_no_pack_any_more_is_named_and_the_other_files_stay(store, how, manifest):
    compact(store)
    path = packs(store.root)[0]
    fill(store.root, range(6, 8))
    data = path.read_bytes()
    os.unlink(path)  # not in place: who has it mapped keeps it
    path.write_bytes({"torn": data[: len(data) // 2], "empty": b"", "no end": data[:-10], "foreign": b"x" * 5000}[how])
    if not manifest:
        (store.root / "manifest.arrow").unlink()
    again = opened(store.root)
    sampler = WindowSampler(again, chunk=1, gamma=0.9, seed=0)
    sampler.draw(30)
    sampler.refresh()
    assert set(again.keys()) == {name_of(6), name_of(7)}
    (entry,) = again.quarantine.entries()
    assert entry["file"] == str(path.relative_to(store.root)) and "is not a complete" in entry["reason"] and not path.exists()
    assert again.commit(tiny(0)) is True


def test_damaged_episode_of_a_pack_is_named_and_the_others_stay(store):
    compact(store)
    path = packs(store.root)[0]
    flip(path, tiny(2).actions.tobytes())
    again = opened(store.root)
    with pytest.raises(schema.DamagedEpisode):
        again.read(name_of(2))
    (entry,) = again.quarantine.entries()
    assert entry["file"] == f"{path.relative_to(store.root)}#{name_of(2)}" and entry["moved_to"] == ""
    assert len(again) == len(opened(store.root)) == 5  # in other processes too
    assert again.commit(tiny(2)) is True  # its key is free
    compact(again, dead_share=0.0)
    assert_holds(store.root, range(6))
    # The pack was rewritten without it; the damaged bytes are put aside, not thrown away.
    assert not path.exists() and any(path.name in file for file in os.listdir(store.root / "quarantine"))


def test_file_left_behind_by_a_killed_compaction_takes_the_place_of_a_damaged_pack(store):
    copy = shutil.copytree(store.root / "episodes", store.root.parent / "episodes")
    compact(store)
    shutil.copytree(copy, store.root / "episodes", dirs_exist_ok=True)
    flip(packs(store.root)[0], tiny(2).actions.tobytes())
    again = opened(store.root)
    with pytest.raises(schema.DamagedEpisode):
        again.read(name_of(2))
    again.update()
    assert_same(again.read(name_of(2)), tiny(2))
    compact(again)
    assert_holds(store.root, range(6))


def test_damaged_copy_in_a_pack_does_not_cost_the_healthy_file(store):
    """A killed compaction left both; the damage came after. Cleaning up must look at the copy before it deletes the file."""
    copy = shutil.copytree(store.root / "episodes", store.root.parent / "episodes")
    compact(store)
    shutil.copytree(copy, store.root / "episodes", dirs_exist_ok=True)
    flip(packs(store.root)[0], tiny(2).actions.tobytes())
    compact(opened(store.root))
    assert loose(store.root) == [name_of(2)]
    repair(store.root)
    assert_holds(store.root, range(6))


def test_pack_with_episodes_of_a_newer_schema_is_never_deleted(tmp_path, monkeypatch):
    root = tmp_path / "store"
    store = fill(root, range(2))
    for seed in (2, 3):
        write_version_3(root, tiny(seed))
    monkeypatch.setattr(schema, "VERSION", 3)
    compact(ReplayStore(root))  # a later version of this package
    assert len(packs(root)) == 1
    monkeypatch.undo()
    (root / "manifest.arrow").unlink()
    old = opened(root)
    assert len(old) == 2
    old.evict([name_of(0), name_of(1)], "old")
    compact(old)
    assert len(packs(root)) == 1
    monkeypatch.setattr(schema, "VERSION", 3)
    assert opened(root).keys() == [name_of(2), name_of(3)]
    assert store.storage.exists("manifest.arrow")


# ---------------------------------------------------------------- eviction


def test_evicted_keys_stay_taken_everywhere(store):
    running, never = opened(store.root), ReplayStore(store.root)
    assert store.evict([name_of(0), name_of(1), name_of(0), "unknown"], "too old") == 2
    assert len(store) == 4 and len(loose(store.root)) == 4
    for each in (store, running, never, ReplayStore(store.root)):
        assert each.commit(tiny(0)) is False and name_of(0) in each
        assert each.evicted(name_of(0))["reason"] == "too old"
    running.update()
    assert running.keys() == [name_of(seed) for seed in range(2, 6)]
    compact(store)
    store.evict([name_of(2)], "packed")  # from a pack: gone to readers at once
    never.update()
    with pytest.raises(StoreError, match="cannot read"):
        opened(store.root).read(name_of(2))
    assert_holds(store.root, (3, 4, 5), removed=(0, 1, 2))
    compact(store, dead_share=0.0)
    assert tiny(2).actions.tobytes() not in b"".join(path.read_bytes() for path in packs(store.root))
    assert_holds(store.root, (3, 4, 5), removed=(0, 1, 2))
    assert not any(each.commit(tiny(2)) for each in (running, never))


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
    store = fill(root, range(2))
    compact(store)
    fill(root, range(2, 5))
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
        left = [problem.path for problem in verify(opened(copy)).problems if problem.kind == "evicted"]
        assert set(loose(copy)) - {name_of(4)} == {path.split("/")[-1].removesuffix(".arrow") for path in left} or not recorded
        if step % 2 and recorded:
            assert repair(copy).doubles == len(left)
        else:
            compact(opened(copy))
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
    assert problem.kind == "damaged" and problem.path == str(path.relative_to(store.root))
    repair(store.root)
    assert path.exists() and opened(store.root).evicted(name_of(0))  # what it says still counts


def test_damage_in_a_pack_that_cannot_be_recorded_is_a_warning(store, monkeypatch, caplog):
    """As on a read-only file system: training goes on without the episode."""
    compact(store)
    flip(packs(store.root)[0], tiny(2).actions.tobytes())
    again = opened(store.root)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(removals.Removals, "add", refuse)
    with pytest.raises(schema.DamagedEpisode):
        again.read(name_of(2))
    assert len(again) == 5 and np.sum(["cannot be recorded" in record.message for record in caplog.records]) == 1
    again.update()
    assert len(again) == 5
