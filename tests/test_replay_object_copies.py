"""The copies of objects that a machine keeps: bounded, checked, never served stale."""

import os

import pytest

from cosmos_ray import caches
from cosmos_ray.errors import StoreError
from cosmos_ray.replay import ReplayStore, WindowSampler
from cosmos_ray.replay.files import objects
from cosmos_ray.replay.upkeep.repair import verify
from tests.s3_server import NAMES, episode_objects, fill, fresh_uri, opened, running_server
from tests.test_replay_episode import assert_same, make_episode

server = pytest.fixture(running_server, scope="module")
uri = pytest.fixture(fresh_uri)


def copies(store):
    return [path for path in store.storage.cache.rglob("*") if path.is_file()]


def test_the_local_cache_is_bounded(uri):
    store = ReplayStore(uri)
    fill(store, range(6))
    size = max(store.storage._head(path)["size"] for path in episode_objects(store))
    reader = opened(uri)
    reader.storage.cache_bytes = 3 * size + size // 2
    for seed in range(6):
        assert_same(reader.read(NAMES[seed]), make_episode(seed))
        assert sum(path.stat().st_size for path in copies(reader)) <= reader.storage.cache_bytes
    assert len(copies(reader)) >= 2
    left_behind = copies(reader)[0].with_name("x.tmp")
    left_behind.write_bytes(b"x")
    os.utime(left_behind, (0, 0))
    ReplayStore(uri, create=False).read(NAMES[0])  # a new process looks through it with its first copy
    assert not left_behind.exists() or sum(path.stat().st_size for path in copies(reader)) <= objects.CACHE_BYTES


@pytest.mark.parametrize("place", ["begin", "middle", "end"])
def test_a_damaged_copy_is_fetched_again_and_not_blamed_on_the_object(uri, place):
    store = ReplayStore(uri)
    fill(store, range(3))
    assert_same(opened(uri).read(NAMES[1]), make_episode(1))
    for copy in copies(store):
        size = copy.stat().st_size
        spots = {"begin": range(8, size // 2, 64), "middle": range(size // 4, 3 * size // 4, 64), "end": range(size // 2, size - 10, 64)}
        with copy.open("r+b") as file:
            for at in spots[place]:
                file.seek(at)
                file.write(b"\xa5")
    reader = opened(uri)
    for seed in range(3):
        assert_same(reader.read(NAMES[seed]), make_episode(seed))
    assert not verify(reader, decode=True).problems and not reader.quarantine.entries()
    draw = WindowSampler(opened(uri), chunk=5, gamma=0.9, seed=0).draw(20, "demo")
    assert len(draw.episodes) == 20


def test_verify_checks_the_objects_not_the_copies(uri):
    store = ReplayStore(uri)
    fill(store, range(2))
    reader = opened(uri)
    reader.read(NAMES[0])
    for copy in copies(store):
        copy.write_bytes(bytes(copy.stat().st_size))
    assert not verify(opened(uri)).problems
    flipped = bytearray(store.storage.read(store.path(NAMES[0])))
    flipped[len(flipped) // 2] ^= 0xFF
    reader = opened(uri)
    reader.read(NAMES[0])
    store.storage._put(store.path(NAMES[0]), bytes(flipped))
    assert [problem.path for problem in verify(reader).problems] == [store.path(NAMES[0])]


def test_an_object_that_was_replaced_by_one_of_the_same_size_is_not_served_stale(uri):
    storage = ReplayStore(uri).storage
    for content in (b"first", b"other", b"third"):
        storage.replace("quarantine/x", content)
        assert storage.open("quarantine/x").read() == content == opened(uri).storage.open("quarantine/x").read()
    assert len(copies(ReplayStore(uri))) == 1  # of the earlier states none is left


def test_a_cache_that_cannot_be_written_costs_speed_only(uri, tmp_path, monkeypatch, caplog):
    fill(ReplayStore(uri), [0])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COSMOS_RAY_CACHE", str(tmp_path / "file"))
    assert_same(opened(uri).read(NAMES[0]), make_episode(0))
    assert "no copy of" in caplog.text


def test_a_default_cache_that_somebody_else_made_is_refused(uri, tmp_path, monkeypatch):
    monkeypatch.delenv("COSMOS_RAY_CACHE")
    monkeypatch.setattr(caches.tempfile, "gettempdir", lambda: str(tmp_path))
    ReplayStore(uri)
    folder = tmp_path / f"cosmos_ray-cache-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(StoreError, match="belongs to another user: set"):
        ReplayStore(uri)
