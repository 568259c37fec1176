"""The manifest: only a cache, whatever is in it; and how changes behind it are noticed."""

import json
import logging
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import catalog, manifest
from cosmos_ray.replay.files.storage import LocalStorage
from cosmos_ray.replay.format import schema
from cosmos_ray.replay.format.checksum import crc32
from cosmos_ray.replay.index import COLUMNS
from cosmos_ray.replay.sampling.sampler import WindowSampler
from cosmos_ray.replay.store import ReplayStore
from tests.test_replay_episode import assert_same, make_episode
from tests.test_replay_storage import die, fill, in_child, opened, scratch_folder, settle, snapshot, tiny

in_memory = pytest.fixture(scratch_folder, name="tmp_path")


def write_as_version(root, episode, version):
    """The file of ``episode`` as another version of this package might write it."""
    batch, _ = schema.encode(episode)
    text, number = batch.schema.metadata[schema.HEADER_FIELD], str(version).encode()
    path = root / catalog.episode_path(episode.key.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        schema.write(batch.replace_schema_metadata({
            schema.VERSION_FIELD: number, schema.HEADER_FIELD: text, schema.CRC_FIELD: schema.header_crc(number, text)}), file)


def mixed_store(root):
    """A store with episodes of all classes; every directory settled."""
    store = ReplayStore(root)
    for seed in range(6):
        store.commit(tiny(seed))
    for seed in range(3):
        store.commit(tiny(seed, source="rollout", success=seed == 1, chunk=2, length=5, score=0.25 * seed))
        store.commit(tiny(10 + seed, source="rollout", success=seed != 1))
    for seed in range(3, 6):
        store.commit(make_episode(seed, "eval", length=3, size=8, run="other", attempt=2, invalid="broke"))
        store.commit(tiny(10 + seed, source="rollout"))
    store.update()
    settle(root)
    store.update()
    store.save_manifest()
    return store


def same_batches(left, right):
    for name, value in vars(left).items():
        assert np.array_equal(value, getattr(right, name), equal_nan=name.startswith("value")), name


def draws(store, n=20):
    return WindowSampler(store, chunk=2, gamma=0.9, seed=3).draw(n)


def by_name(store):
    return sorted(store.summaries(), key=lambda summary: summary.name)


def forge(root, change):
    """Let ``change(names, columns, header)`` lie in the manifest, with checksums that fit."""
    path = root / manifest.FILE
    batch = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).get_batch(0)
    header = json.loads(batch.schema.metadata[b"cosmos_ray.manifest"])
    names = batch.column("name").to_pylist()
    columns = {name: batch.column(name).to_numpy(zero_copy_only=False).copy() for name in COLUMNS}
    change(names, columns, header)
    header["crc32"] = manifest._checksum(names, columns)
    arrays = {"name": pa.array(names, pa.string()), **{name: pa.array(column) for name, column in columns.items()}}
    text = json.dumps(header).encode()
    metadata = {b"cosmos_ray.manifest": text, b"cosmos_ray.manifest.crc32": str(crc32(text)).encode()}
    batch = pa.RecordBatch.from_pydict(arrays).replace_schema_metadata(metadata)
    with pa.ipc.new_file(path, batch.schema) as writer:
        writer.write_batch(batch)


@pytest.fixture(scope="module")
def made():
    """A mixed store. Do not change it."""
    yield from (mixed_store(folder / "store") for folder in scratch_folder())


@pytest.fixture
def copy(made, tmp_path):
    """A copy with the times of the directories, so that the manifest fits it."""
    return shutil.copytree(made.root, tmp_path / "copy")


def test_another_process_opens_from_the_manifest_without_opening_an_episode(made):
    def look():
        LocalStorage.open = die
        os.scandir = die  # the directories have settled too
        store = ReplayStore(made.root, create=False)
        store.marker.storage.read  # noqa: B018 - the marker is read, nothing else
        assert len(store.refresh()) == 18 and store.keys() == made.keys()

    assert in_child(look) == 0


def test_opening_needs_neither_pandas_nor_torch(made):
    """Which would take longer than the opening."""
    code = ("import sys; from cosmos_ray.replay import ReplayStore; store = ReplayStore(sys.argv[1], create=False); store.update()\n"
            "assert len(store) == 18 and not {'pandas', 'torch', 'ray'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, made.root], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_index_from_the_manifest_is_that_from_the_files(made, copy):
    os.unlink(copy / manifest.FILE)
    loaded, looked, cached = opened(made.root), opened(copy), made
    assert len(looked) == 18

    def fields(store):
        return [{**vars(summary), "path": summary.path.removeprefix(str(store.root))} for summary in by_name(store)]

    assert fields(loaded) == fields(looked) == fields(cached)
    assert all(os.path.isfile(summary.path) for store in (loaded, looked) for summary in store.summaries())
    for name in made.keys():
        assert loaded.index["order"][loaded.index.row(name)] == looked.index["order"][looked.index.row(name)]
        view = loaded.view(name)
        assert vars(view.summary) == {**vars(loaded.catalog.summaries(np.array([loaded.index.row(name)]))[0]), "path": view.summary.path}
    assert {s.success for s in loaded.summaries()} == {True, False} and all(s.created > 0 for s in loaded.summaries())


def test_deleting_the_manifest_costs_nothing_but_time(copy):
    with_it = opened(copy)
    expected, batch = by_name(with_it), draws(with_it)
    os.unlink(copy / manifest.FILE)
    without = opened(copy)
    assert by_name(without) == expected
    same_batches(draws(without), batch)
    assert not (copy / manifest.FILE).exists()  # so few are not worth one


def test_manifest_is_written_when_many_are_new_and_not_before(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "MANIFEST_FROM", 4)
    store = fill(tmp_path / "store", range(3))
    store.update()
    assert not (store.root / manifest.FILE).exists()
    store.commit(tiny(3))
    store.update()
    assert (store.root / manifest.FILE).exists()
    assert opened(store.root).keys() == store.keys()


def test_manifest_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(catalog, "MANIFEST_FROM", 2)
    store = fill(tmp_path / "store", range(3))
    (store.root / manifest.FILE).mkdir()
    store.update()
    store.update()
    assert len(store) == 3 and sum("the next process opens every episode" in r.message for r in caplog.records) == 1


def test_new_files_are_found_without_listing_settled_directories(copy, monkeypatch):
    writer = ReplayStore(copy, create=False)
    writer.commit(tiny(50))
    listed, read = [], []
    scandir, read_file = os.scandir, LocalStorage.open
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    monkeypatch.setattr(LocalStorage, "open", lambda self, path: read.append(path) or read_file(self, path))
    store = opened(copy)
    assert read == [catalog.episode_path(tiny(50).key.name)] and len(store) == 19
    shard = str(copy / read[0]).rpartition("/")[0]
    assert set(listed) <= {shard, os.path.dirname(shard)}


def test_files_deleted_by_hand_are_noticed(copy):
    running = opened(copy)
    (path,) = [copy / catalog.episode_path(tiny(4).key.name)]
    os.unlink(path)
    running.update()
    fresh = opened(copy)
    assert set(running.keys()) == set(fresh.keys())
    assert len(fresh) == 17 and tiny(4).key.name not in fresh.keys()
    assert running.commit(tiny(4)) is True  # the key is free again


@pytest.mark.parametrize("folder", ["episodes/demo-Lift", "episodes/demo-Lift/<shard>"])
def test_directories_that_go_away_and_come_back_are_noticed(copy, tmp_path, folder):
    shard = catalog.episode_path(tiny(4).key.name).split("/")[2]
    path = copy / folder.replace("<shard>", shard)
    running = opened(copy)
    names = running.keys()
    os.rename(path, tmp_path / "away")  # with its own stamp untouched
    running.update()
    assert set(running.keys()) == set(opened(copy).keys()) < set(names)
    running.save_manifest()
    os.rename(tmp_path / "away", path)
    running.update()
    assert running.keys() == opened(copy).keys() == names
    draws(running)


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "torn":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = b""
    elif how == "foreign":
        data = b"notes about the robot"
    elif how == "episode":
        data = next((path.parent / "episodes").rglob("*.arrow")).read_bytes()
    elif how == "flipped name":
        data[data.rindex(b"demo-Lift-000000")] ^= 1
    elif how == "flipped header":
        data[data.rindex(b'"scanned"') + 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["torn", "empty", "foreign", "episode", "flipped name", "flipped header", "directory", "pipe"])
def test_damaged_manifest_is_ignored_with_one_warning(made, copy, caplog, how):
    path = copy / manifest.FILE
    if how in ("directory", "pipe"):
        os.unlink(path)
        path.mkdir() if how == "directory" else os.mkfifo(path)
    else:
        damage(path, how)
    store = opened(copy)
    assert store.keys() == made.keys()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "ignoring the manifest" in record.message and "\n" not in record.message


def test_no_flip_in_a_manifest_changes_what_is_known(made, copy):
    path = copy / manifest.FILE
    whole, expected = path.read_bytes(), [vars(s) | {"path": ""} for s in by_name(made)]
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 60).tolist():
        data = bytearray(whole)
        data[at] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        assert [vars(s) | {"path": ""} for s in by_name(opened(copy))] == expected


def set_table(table, number, value):
    return lambda names, columns, header: header["tables"][table].__setitem__(number, value)


def set_column(column, value):
    return lambda names, columns, header: columns[column].__setitem__(slice(None), value)


def set_header(name, value):
    return lambda names, columns, header: header.__setitem__(name, value)


LIES = {
    "newer": set_header("version", 99), "another store's": set_header("store", "0" * 32), "no scan": set_header("scanned", 5),
    "no tables": set_header("tables", []), "scan of lists": set_header("scanned", {"episodes": [1, 2]}),
    "source": set_column("source", 7), "negative source": set_column("source", -1), "task": set_column("task", 99),
    "length": set_column("length", 0), "short": set_column("length", 1), "score": set_column("score", 7.0),
    "no score": set_column("score", np.nan),
    "order": set_column("order", 1), "seed": set_column("seed", 1),
    "unhashable task": set_table("task", 1, ["a"]), "number as run": set_table("run", 1, 5), "null": set_table("invalid", 0, None),
    "invalid is empty": set_table("invalid", 0, "broke"), "frames": set_table("frames", 1, [[0, 10**9, 1]]),
    "frames text": set_table("frames", 1, "x"),
    "hostile name": lambda names, columns, header: names.__setitem__(0, "../../x-00000001-a0-00000000"),
    "no name": lambda names, columns, header: names.__setitem__(0, "nonsense"),
    "same name twice": lambda names, columns, header: names.__setitem__(0, names[1]),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_impossible_manifest_is_ignored_with_one_warning(made, copy, caplog, lie):
    forge(copy, LIES[lie])
    store = opened(copy)
    assert [vars(s) | {"path": ""} for s in by_name(store)] == [vars(s) | {"path": ""} for s in by_name(made)]
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "ignoring the manifest" in record.message and "\n" not in record.message


def test_forgery_that_changes_nothing_is_taken(made, copy, caplog):
    """Else the tests above would pass whatever they change."""
    forge(copy, lambda *_: None)
    assert opened(copy).keys() == made.keys() and not caplog.records


def rename_digest(names, columns, header):
    for i, name in enumerate(names):
        names[i] = name[:-8] + f"{i:08x}"
    low = (columns["seed"].astype(np.uint64) * np.uint64(31) + columns["attempt"].astype(np.uint64)) & np.uint64(0xFFFFFFFF)
    columns["order"][:] = np.arange(len(names), dtype=np.uint64) << np.uint64(32) | low


def scan_elsewhere(names, columns, header):
    for state in header["scanned"].values():
        for folder in state:
            state[folder][1] += ["../../outside", "..", "../../../outside"]


@pytest.mark.parametrize("lie", [rename_digest, scan_elsewhere])
def test_plausible_lies_of_a_manifest_harm_nothing(made, copy, tmp_path, lie):
    """Names that do not exist, folders outside: some draws are repeated, no file is lost or touched."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious.arrow").write_text("mine")
    forge(copy, lie)
    before = {path for path in copy.rglob("*.arrow") if path.name != manifest.FILE}
    store = opened(copy)
    sampler = WindowSampler(store, chunk=2, gamma=0.9, seed=3)
    for _ in range(30):
        with suppress(StoreError):  # that there is no window left, once all names turned out to be made up
            sampler.draw(4)
        sampler.refresh()
    assert set(store.keys()) == set(made.keys())
    assert os.listdir(tmp_path / "outside") == ["precious.arrow"]
    assert {path for path in copy.rglob("*.arrow") if path.name != manifest.FILE} == before
    os.unlink(copy / manifest.FILE)
    again = opened(copy)
    assert again.keys() == made.keys()
    for name in again.keys():
        assert_same(again.read(name), made.read(name))


def test_what_a_newer_version_wrote_is_found_after_an_upgrade(tmp_path, monkeypatch):
    """Although the manifest of the older version says that nothing has changed there."""
    store = fill(tmp_path / "store", range(2))
    write_as_version(store.root, tiny(2), 3)
    settle(store.root)
    old = opened(store.root)
    assert len(old) == 2
    old.save_manifest()
    monkeypatch.setattr(schema, "VERSION", 3)
    assert len(opened(store.root)) == 3


def test_opening_changes_no_file(copy):
    before = snapshot(copy)
    store = opened(copy)
    draws(store)
    assert [store.read(name) for name in store.keys()]
    assert snapshot(copy) == before
