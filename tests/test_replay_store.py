"""Commits, reads, refresh and quarantine of the replay store."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.files.cache import LeastRecentlyUsed
from cosmos_ray.replay.store import ReplayStore
from tests.test_replay_episode import CAMERAS, assert_same, make_episode


def episode_files(root):
    return sorted(path for path in (root / "episodes").rglob("*") if path.is_file())


def path_of(store, name):
    """The file of an episode."""
    return store.root / store.path(name)


def rewrite(path, change):
    """Write the Arrow file at ``path`` again after ``change(table, metadata)``, with its checksums as they are."""
    table = pa.ipc.open_file(path).read_all()
    table, metadata = change(table, dict(table.schema.metadata))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema.with_metadata(metadata)) as writer:
        writer.write_table(table.replace_schema_metadata(metadata))
    path.write_bytes(sink.getvalue())


def fresh_store(tmp_path):
    return ReplayStore(tmp_path / "store")


def store_of_three(tmp_path):
    """A store's root with three demonstrations, and the file of the middle one."""
    root = tmp_path / "store"
    store = ReplayStore(root)
    for seed in range(3):
        assert store.commit(make_episode(seed))
    return root, path_of(store, make_episode(1).key.name)


store = pytest.fixture(fresh_store)
three = pytest.fixture(store_of_three)


def test_round_trip_is_bit_exact(store):
    for episode in (
        make_episode(0),
        make_episode(5, source="rollout", chunk=5, success=False),
        make_episode(6, source="eval", chunk=100, length=1, invalid="non-finite action"),
    ):
        episode.predicted_values[0] = np.float32(np.nan)
        assert store.commit(episode)
        assert_same(store.read(episode.key.name), episode)
        assert_same(ReplayStore(store.root, create=False).read(episode.key.name), episode)


@pytest.mark.parametrize("success, score, expected", [(True, None, 1.0), (False, None, 0.0), (False, 0.2, 0.2), (True, 0.0, 0.0)])
def test_score_is_kept_where_it_was_graded(store, success, score, expected):
    episode = make_episode(0, source="rollout", success=success, score=score)
    store.commit(episode)
    again = ReplayStore(store.root, create=False)
    (summary,) = again.refresh()
    assert (summary.success, summary.score) == (success, expected)
    assert_same(again.read(episode.key.name), episode)
    # What was not graded is stored as before there were scores: such files, old or new, have no score in their header.
    assert ("score" in again.view(episode.key.name).header) == (score is not None)


def test_info_keeps_numpy_numbers_as_json(store):
    episode = make_episode(0)
    episode.info = {"seconds": np.float32(0.5), "counts": np.arange(3), "flag": np.bool_(True)}
    store.commit(episode)
    assert store.read(episode.key.name).info == {"seconds": 0.5, "counts": [0, 1, 2], "flag": True}
    episode = make_episode(1)
    episode.info = {"policy": object()}
    with pytest.raises(StoreError, match="info is not JSON"):
        store.commit(episode)
    assert len(episode_files(store.root)) == 1


def test_any_arrow_reader_understands_the_file(store):
    episode = make_episode(0, source="rollout", chunk=5)
    store.commit(episode)
    table = pa.ipc.open_file(store.summaries()[0].path).read_all()
    table.validate(full=True)
    assert table.num_rows == 13
    assert table["action"][-1].as_py() is None and table["reward"].null_count == 1
    assert np.array_equal(np.array(table["action"].to_pylist()[:-1], np.float32), episode.actions)
    assert [i for i, jpeg in enumerate(table[f"frame/{CAMERAS[0]}"]) if jpeg.is_valid] == [0, 5, 10, 12]
    assert table["policy_version"].null_count == 1 and table["predicted_value"].null_count == 1


def test_summaries_come_from_the_footer_alone(store):
    episode = make_episode(4, source="rollout", chunk=5, success=False)
    store.commit(episode)
    path = store.summaries()[0].path
    with open(path, "rb") as file:
        data = bytearray(file.read())
    # Overwrite every data page, between the schema message at the front and the footer.
    start, end = data.index(episode.frames[0][0]), data.rindex(b"cosmos_ray.header") - 2000
    data[start:end] = bytes(end - start)
    with open(path, "wb") as file:
        file.write(data)
    (summary,) = ReplayStore(store.root).refresh()
    assert (summary.name, summary.source, summary.task) == (episode.key.name, "rollout", "Lift")
    assert (summary.success, summary.episode_return, summary.length, summary.policy_version) == (False, 0.0, 12, 4)
    assert summary.frame_steps.tolist() == [0, 5, 10, 12] and summary.key == episode.key and summary.path == path


def test_repeated_commit_is_one_commit(store):
    assert store.commit(make_episode(0)) is True
    before = episode_files(store.root)
    stamp = before[0].stat()
    assert store.commit(make_episode(0)) is False
    assert ReplayStore(store.root).commit(make_episode(0)) is False
    assert episode_files(store.root) == before and before[0].stat().st_ino == stamp.st_ino
    assert len(store) == 1 and store.keys() == [make_episode(0).key.name]
    assert make_episode(0).key.name in store and make_episode(1).key.name not in store


def test_commit_without_hard_links_is_still_one_commit(store, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert store.commit(make_episode(0)) is True
    assert store.commit(make_episode(0)) is False
    assert_same(store.read(make_episode(0).key.name), make_episode(0))
    assert len(episode_files(store.root)) == 1


def test_refresh_reports_each_episode_once_from_any_writer(store):
    other = ReplayStore(store.root)
    other.commit(make_episode(0))
    store.commit(make_episode(1))
    assert {summary.key.seed for summary in store.refresh()} == {0, 1}
    assert store.refresh() == []
    other.commit(make_episode(2))
    assert [summary.key.seed for summary in store.refresh()] == [2]
    assert len(store) == 3 and store.keys() == sorted(make_episode(seed).key.name for seed in range(3))
    assert {summary.key.seed for summary in other.refresh()} == {0, 1, 2}


def test_refresh_lists_only_directories_that_changed(store, monkeypatch):
    for seed in range(4):
        store.commit(make_episode(seed))
    for shard in {path.parent for path in episode_files(store.root)}:
        os.utime(shard, (1_000_000, 1_000_000))  # long settled
    store.refresh()
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    store.refresh()
    assert not [path for path in listed if os.path.basename(path) not in ("episodes", "demo-Lift")]
    ReplayStore(store.root).commit(make_episode(9))
    assert [summary.key.seed for summary in store.refresh()] == [9]
    changed = path_of(store, make_episode(9).key.name).parent
    assert str(changed) in listed


def test_file_added_within_one_tick_of_the_directory_stamp_is_seen(store):
    store.commit(make_episode(0))
    shard = path_of(store, make_episode(0).key.name).parent
    store.refresh()
    stamp = shard.stat()
    made = ReplayStore(store.root.with_name("other"))
    other = next(
        seed for seed in range(1, 10_000) if path_of(store, make_episode(seed, length=1).key.name).parent == shard
    )
    made.commit(make_episode(other))
    name = make_episode(other).key.name
    shutil.copy(path_of(made, name), shard)
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as a clock with coarse ticks would have left it
    assert [summary.name for summary in store.refresh()] == [name]


def test_layout_of_the_directory_stays_what_it_is(store):
    store.commit(make_episode(0))
    (path,) = episode_files(store.root)
    name = make_episode(0).key.name
    assert path == store.root / "episodes" / "demo-Lift" / name[-8:-6] / f"{name}.arrow"


@pytest.mark.parametrize(
    "marker, message", [(None, "no store.json"), ("{}", "does not describe"), ('{"version": 99}', "upgrade")]
)
def test_wrong_directory_is_refused(tmp_path, marker, message):
    if marker is not None:
        (tmp_path / "store.json").write_text(marker)
    with pytest.raises(StoreError, match=message):
        ReplayStore(tmp_path, create=False)


def test_missing_or_impossible_names_are_refused(store):
    with pytest.raises(StoreError, match="cannot read"):
        store.read(make_episode(0).key.name)
    for name in ("nonsense", "../../etc-1-2-3"):
        with pytest.raises(StoreError, match="not an episode name"):
            store.read(name)


def test_open_episodes_are_bounded_and_views_outlive_their_eviction(tmp_path):
    store = ReplayStore(tmp_path / "store", open_limit=3)
    for seed in range(8):
        store.commit(make_episode(seed))
    before = len(os.listdir("/proc/self/fd"))
    views = [store.view(make_episode(seed).key.name).column("action") for seed in range(8)]
    assert all(np.array_equal(view, make_episode(seed).actions) for seed, view in enumerate(views))
    assert not views[0].flags.owndata and not views[0].flags.writeable
    del views
    assert len(store._open) == 3 and len(os.listdir("/proc/self/fd")) - before <= 3


def test_least_recently_used_is_forgotten_first():
    cache = LeastRecentlyUsed(3)
    for key in "abc":
        cache.put(key, key.upper())
    assert cache.get("a") == "A"
    cache.put("d", "D")
    assert [cache.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    cache.put("e", "E", cost=2)
    assert [cache.get(key) for key in "acde"] == [None, None, "D", "E"] and cache.cost == 3
    cache.put("f", "F", cost=4)
    assert cache.get("f") is None and cache.cost == 3
    cache.drop("e")
    assert len(cache) == 1 and cache.cost == 1


def test_log_lines_are_complete_json(three):
    root, path = three
    os.truncate(path, 10)
    ReplayStore(root).refresh()
    (line,) = (root / "quarantine" / "log.jsonl").read_text().splitlines()
    assert set(json.loads(line)) == {"time", "file", "reason", "moved_to"}
