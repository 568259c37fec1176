"""Verify finds what is wrong and changes nothing; repair mends what can be mended."""

import os
import shutil
import signal

import numpy as np
import pyarrow as pa
import pytest

from cosmos_ray.replay import manifest
from cosmos_ray.replay.format import schema
from cosmos_ray.replay.sampling.sampler import WindowSampler
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.replay.upkeep.repair import repair, verify
from tests.test_replay_episode import assert_same
from tests.test_replay_eviction import assert_holds, name_of
from tests.test_replay_manifest import write_as_version
from tests.test_replay_storage import die_before, fill, in_child, opened, scratch_folder, settle, snapshot, tiny
from tests.test_replay_store import rewrite

in_memory = pytest.fixture(scratch_folder, name="tmp_path")


def long(seed):
    return tiny(seed, length=6, size=48)


def flip(path, needle):
    """Change one bit in the middle of ``needle`` in a file."""
    data = bytearray(path.read_bytes())
    data[data.index(needle) + len(needle) // 2] ^= 4
    path.write_bytes(data)


def path_of(root, seed):
    return root / "episodes" / "demo-Lift" / name_of(seed)[-8:-6] / f"{name_of(seed)}.arrow"


def fill_long(root, seeds):
    store = ReplayStore(root)
    assert all(store.commit(long(seed)) for seed in seeds)
    return store


def faults(found):
    return [problem.fault for problem in found.problems]


def nothing(done):
    return not (done.quarantined or done.restored or done.salvaged or done.leftovers)


@pytest.fixture
def root(tmp_path):
    """Five episodes of one length."""
    root = tmp_path / "store"
    fill(root, range(5))
    return root


def test_whole_store_has_no_problems_and_all_of_it_is_read(root):
    audit = verify(opened(root), decode=True, threads=2)
    assert audit.problems == () and audit.episodes == 5 and audit.quarantined == 0
    assert audit.size == sum(path.stat().st_size for path in (root / "episodes").rglob("*.arrow"))


def torn(root):
    os.truncate(path_of(root, 2), 700)


def flipped_column(root):
    flip(path_of(root, 2), tiny(2).states.tobytes())


def flipped_frame(root):
    flip(path_of(root, 2), tiny(2).frames[1][0])


def flipped_header(root):
    data = bytearray(path_of(root, 2).read_bytes())
    data[data.rindex(b'"success": true') + 11] ^= 1
    path_of(root, 2).write_bytes(data)


def not_an_image(root):
    """Every checksum fits."""
    episode = tiny(2)
    path_of(root, 2).unlink()
    broken = {**episode.frames, 1: [b"no JPEG", episode.frames[1][1]]}
    batch, _ = schema.encode(type(episode)(**{**vars(episode), "frames": broken}))
    with open(path_of(root, 2), "wb") as file:
        schema.write(batch, file)


def foreign(root):
    path_of(root, 2).write_text("notes about the robot")


def missing_column(root):
    rewrite(path_of(root, 2), lambda table, metadata: (table.drop_columns(["reward"]), metadata))


def stray(root):
    path = path_of(root, 2).with_name(".x.arrow.1-ab.tmp")
    path.write_bytes(b"half")
    os.utime(path, (1_000_000, 1_000_000))


def link(root):
    path_of(root, 2).with_name("link.arrow").symlink_to(path_of(root, 2))


def pipe(root):
    os.mkfifo(root / "episodes" / "pipe.arrow")


def notes(root):
    (root / "episodes" / "demo-Lift" / "notes.txt").write_text("hello")


def misplaced(root):
    (root / "episodes" / "demo-Lift" / "zz").mkdir()
    os.rename(path_of(root, 2), root / "episodes" / "demo-Lift" / "zz" / path_of(root, 2).name)


def another_under_its_name(root):
    shutil.copy(path_of(root, 3), path_of(root, 2))


def left_behind(root):
    """By an eviction that was killed between its record and the deletion."""
    kept = path_of(root, 2).read_bytes()
    opened(root).evict([name_of(2)], "old")
    path_of(root, 2).write_bytes(kept)


def version_1(root):
    path_of(root, 2).unlink()
    write_as_version(root, tiny(2), 1)


def newer(root):
    path_of(root, 2).unlink()
    write_as_version(root, tiny(2), 3)


# What to do to a store, how verify calls it, how many episodes it still counts, and what a repair brings back.
CASES = [
    (torn, "damaged", 4, "none"), (flipped_column, "damaged", 4, "none"), (flipped_frame, "damaged", 4, "salvaged"),
    (flipped_header, "damaged", 4, "all"), (not_an_image, "damaged", 4, "salvaged"), (foreign, "damaged", 4, "none"),
    (missing_column, "damaged", 4, "none"), (version_1, "damaged", 4, "none"), (stray, "stray", 5, "all"),
    (link, "foreign", 5, "all"), (pipe, "foreign", 5, "all"), (notes, "foreign", 5, "all"),
    (misplaced, "misplaced", 4, "all"), (another_under_its_name, "misplaced", 4, "none"),
    (left_behind, "evicted", 4, "none"), (newer, "newer", 4, "none"),
]  # fmt: skip


@pytest.mark.parametrize("harm, fault, episodes, back", CASES, ids=[case[0].__name__ for case in CASES])
def test_verify_finds_it_and_changes_nothing_and_repair_mends_what_it_can(root, harm, fault, episodes, back):
    harm(root)
    before = snapshot(root)
    audit = verify(ReplayStore(root, create=False), decode=True)
    assert snapshot(root) == before
    assert faults(audit) == [fault] and audit.episodes == episodes
    assert audit.problems[0].path and "\n" not in audit.problems[0].reason

    done = repair(root)
    after = verify(opened(root), decode=True)
    assert faults(after) == (["newer"] if fault == "newer" else [])
    assert len(done.salvaged) == (back == "salvaged") and after.episodes == (4 if back == "none" else 5)
    assert len(done.quarantined) == (fault not in ("evicted", "newer")) and done.leftovers == (fault == "evicted")
    for seed in range(5):
        if name_of(seed) in opened(root).keys() and not (back == "salvaged" and seed == 2):
            assert_same(opened(root).read(name_of(seed)), tiny(seed))
    assert (root / manifest.FILE).exists() and opened(root).keys() == sorted(ReplayStore(root).refresh() and opened(root).keys())

    settled = {path: content[3] for path, content in snapshot(root).items() if path.name != manifest.FILE}
    assert nothing(repair(root))
    assert {path: content[3] for path, content in snapshot(root).items() if path.name != manifest.FILE} == settled


def test_not_an_image_is_found_by_decoding_only(root):
    not_an_image(root)
    assert verify(opened(root)).problems == ()


def test_young_temporaries_are_left_alone(root):
    path = path_of(root, 2).with_name(".x.arrow.1-ab.tmp")
    path.write_bytes(b"half")
    assert verify(opened(root)).problems == () and nothing(repair(root)) and path.exists()


def test_strays_among_the_removal_records_are_found(root):
    opened(root).evict([name_of(4)], "old")
    path = root / "removed" / ".x.jsonl.1-ab.tmp"
    path.write_bytes(b"half")
    os.utime(path, (1_000_000, 1_000_000))
    assert faults(verify(opened(root))) == ["stray"]


def test_everything_at_once(root):
    """Several kinds of harm to different episodes are all found, and mended in one go, also after readers have met them."""
    misplaced(root)
    flip(path_of(root, 3), tiny(3).frames[0][1])
    os.truncate(path_of(root, 0), path_of(root, 0).stat().st_size - 200)
    stray(root)
    assert sorted(faults(verify(ReplayStore(root)))) == ["damaged", "damaged", "misplaced", "stray"]
    reader = opened(root)  # puts these away as it finds them
    assert sorted(reader.keys()) == sorted([name_of(1), name_of(3), name_of(4)])
    done = repair(root)
    assert sorted(done.restored) == [name_of(0), name_of(2)] and done.salvaged == {name_of(3): 1}
    assert verify(opened(root), decode=True).problems == () and len(opened(root)) == 5


def test_episode_that_is_brought_back_is_as_old_as_before(root):
    (before,) = [s for s in opened(root).summaries() if s.name == name_of(2)]
    misplaced(root)
    assert repair(root).restored == [name_of(2)]
    (after,) = [s for s in opened(root).summaries() if s.name == name_of(2)]
    assert after == before


def test_healthy_files_in_quarantine_come_back(root):
    """Put there by mistake, or by an older version."""
    store = opened(root)
    for seed in (2, 3):
        store.discard(name_of(seed), "by mistake")
    os.rename(path_of(root, 0), root / "quarantine" / "1-1-x.arrow")
    store.update()
    assert store.keys() == [name_of(1), name_of(4)] and verify(store).quarantined == 3
    done = repair(root)
    assert sorted(done.restored) == [name_of(0), name_of(2), name_of(3)]
    assert nothing(repair(root))
    assert_holds(root, range(5))


def test_evicted_episodes_do_not_come_back_from_quarantine(root):
    store = opened(root)
    shutil.copy(path_of(root, 2), root / "2.arrow")
    store.evict([name_of(2), name_of(0)], "old")
    (root / "quarantine").mkdir(exist_ok=True)
    os.rename(root / "2.arrow", root / "quarantine" / "1-1-x.arrow")
    assert nothing(repair(root))
    assert_holds(root, (1, 3, 4), removed=(0, 2))


def test_episode_of_which_only_frames_are_damaged_comes_back_without_them(tmp_path):
    """The steps that were lost are counted, and samplers draw the windows that are left."""
    root = tmp_path / "store"
    store = fill_long(root, range(2))
    name = long(0).key.name
    path = root / store.path(name)
    sizes = WindowSampler(opened(root), chunk=2, gamma=0.9, seed=0).counts()["demo"].windows
    assert sizes == 12
    flip(path, long(0).frames[3][1])
    done = repair(root)
    assert done.salvaged == {name: 1} and not done.restored
    again = opened(root)
    back = again.read(name)
    assert back.info == {**long(0).info, "dropped_frames": 1} and sorted(back.frames) == [0, 1, 2, 4, 5, 6]
    back.info, back.frames = long(0).info, long(0).frames
    assert_same(back, long(0))
    sampler = WindowSampler(again, chunk=2, gamma=0.9, seed=0)
    assert sampler.counts()["demo"].windows == 6 + 4  # neither from 3 nor to 3
    drawn = sampler.draw(60)
    assert {int(t) for t, e in zip(drawn.offsets, drawn.episodes, strict=True) if e == name} == {0, 2, 4, 5}
    assert nothing(repair(root)) and verify(again, decode=True).problems == ()


def test_repair_killed_at_any_step_loses_nothing(root, tmp_path):
    misplaced(root)
    flip(path_of(root, 1), tiny(1).frames[1][1])
    os.truncate(path_of(root, 0), path_of(root, 0).stat().st_size - 200)
    flip(path_of(root, 3), tiny(3).frames[1][0])
    for step in range(40):
        copy = shutil.copytree(root, tmp_path / f"copy-{step}")

        def run(copy=copy, step=step):
            die_before(step)
            repair(copy)

        status = in_child(run)
        repair(copy)
        again = opened(copy)
        assert again.keys() == sorted(name_of(seed) for seed in range(5)) and verify(again, decode=True).problems == ()
        for seed in (0, 2, 4):
            assert_same(again.read(name_of(seed)), tiny(seed))
        assert [sorted(again.read(name_of(seed)).frames) for seed in (1, 3)] == [[0, 2], [0, 2]]
        shutil.rmtree(copy)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert step > 5


def test_file_of_which_only_the_end_is_lost_is_recovered(root):
    os.truncate(path_of(root, 2), path_of(root, 2).stat().st_size - 50)
    assert repair(root).restored == [name_of(2)]
    assert_holds(root, range(5))


def test_repair_writes_a_manifest_from_the_files_and_not_from_the_old_one(root):
    (root / manifest.FILE).write_bytes(b"nonsense")
    repair(root)
    settle(root)
    index = opened(root).index
    assert len(index) == 5 and pa.ipc.open_file(str(root / manifest.FILE)).get_batch(0).num_rows == 5
    assert np.all(index.alive)
