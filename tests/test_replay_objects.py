"""A store in an object store: a real S3 server on this machine."""

import os
import socket
import subprocess
import sys
import time
import uuid

import boto3
import pytest

from cosmos_ray.errors import StoreError, StoreUnavailable
from cosmos_ray.replay import ReplayStore, WindowSampler
from cosmos_ray.replay.audit import repair, verify
from cosmos_ray.replay.compaction import compact
from tests.test_replay_episode import assert_same, make_episode


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve(port):
    """A moto server, once it answers."""
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return process
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the S3 server did not start")


def client(port):
    return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1", aws_access_key_id="key",
                        aws_secret_access_key="secret")  # fmt: skip


@pytest.fixture(scope="module")
def server():
    port = free_port()
    process = serve(port)
    yield port
    process.kill()
    process.wait()


@pytest.fixture
def uri(server, tmp_path, monkeypatch):
    """A fresh bucket, and a fresh local cache."""
    monkeypatch.setenv("COSMOS_RAY_CACHE", str(tmp_path / "cache"))
    bucket = f"b{uuid.uuid4().hex[:12]}"
    client(server).create_bucket(Bucket=bucket)
    return f"s3://key:secret@{bucket}/runs/replay?scheme=http&endpoint_override=127.0.0.1:{server}&region=us-east-1"


def fill(store, seeds=range(4)):
    for seed in seeds:
        assert store.commit(make_episode(seed)) is True


def test_an_object_store_holds_what_a_directory_holds(uri, tmp_path):
    remote, local = ReplayStore(uri), ReplayStore(tmp_path / "local")
    fill(remote)
    fill(local)
    again = ReplayStore(uri, create=False)
    assert sorted(s.name for s in again.refresh()) == local.keys()
    for seed in range(4):
        assert_same(again.read(make_episode(seed).key.name), make_episode(seed))
    for mine, theirs in zip(sorted(again.summaries(), key=lambda s: s.name), sorted(local.summaries(), key=lambda s: s.name), strict=True):
        assert (mine.key, mine.length, mine.success, mine.frame_ranges, mine.size) == (
            theirs.key, theirs.length, theirs.success, theirs.frame_ranges, theirs.size)  # fmt: skip
    draws = [WindowSampler(store, chunk=5, gamma=0.9, seed=0).draw(20, "demo") for store in (again, local)]
    assert draws[0].episodes == draws[1].episodes and (draws[0].images == draws[1].images).all()


def test_credentials_are_never_shown(uri):
    store = ReplayStore(uri)
    fill(store, [0])
    assert "secret" not in f"{store.root}{store.storage.name}{store.summaries()[0].path}"
    with pytest.raises(StoreError) as error:
        store.read(make_episode(9).key.name)
    assert "secret" not in str(error.value)


def test_a_retry_is_the_same_commit(uri):
    store = ReplayStore(uri)
    fill(store, [0])
    assert store.commit(make_episode(0)) is False
    assert ReplayStore(uri).commit(make_episode(0)) is False
    assert len(ReplayStore(uri).refresh()) == 1


def test_running_readers_see_new_episodes_without_listing_everything(uri, monkeypatch):
    reader, writer = ReplayStore(uri), ReplayStore(uri)
    fill(writer)
    assert len(reader.refresh()) == 4
    listed = []
    plain = type(reader.storage)._list
    monkeypatch.setattr(type(reader.storage), "_list", lambda self, folder: listed.append(folder) or plain(self, folder))
    writer.commit(make_episode(9))
    assert [s.key.seed for s in reader.refresh()] == [9] and reader.refresh() == []
    assert "episodes" not in listed


def test_a_note_without_its_episode_is_looked_up_until_it_is_there(uri):
    """A writer that was killed, or is slow, between the note and the episode."""
    reader, writer = ReplayStore(uri), ReplayStore(uri)
    assert reader.refresh() == []
    put = writer.storage._put
    held = []
    writer.storage._put = lambda path, data: held.append((path, bytes(data))) if path.startswith("episodes/") else put(path, data)
    writer.commit(make_episode(0))
    assert reader.refresh() == [] and reader.refresh() == []
    put(*held[0])
    assert [s.key.seed for s in reader.refresh()] == [0]


def test_writers_in_many_processes_lose_and_double_nothing(uri):
    code = ("import sys; from tests.test_replay_episode import make_episode; from cosmos_ray.replay import ReplayStore\n"
            "store, first, last = ReplayStore(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])\n"
            "print(sum(store.commit(make_episode(seed)) for seed in range(first, last)))")
    ReplayStore(uri)
    spans = [(0, 6), (3, 9), (6, 12)]
    writers = [subprocess.Popen([sys.executable, "-c", code, uri, str(a), str(b)], stdout=subprocess.PIPE, text=True) for a, b in spans]
    counts = [int(writer.communicate(timeout=200)[0]) for writer in writers]
    store = ReplayStore(uri, create=False)
    assert sorted(s.key.seed for s in store.refresh()) == list(range(12)) and 12 <= sum(counts) <= 18
    for seed in range(12):
        assert_same(store.read(make_episode(seed).key.name), make_episode(seed))


def test_a_torn_object_is_quarantined(uri, server):
    store = ReplayStore(uri)
    fill(store)
    name = make_episode(1).key.name
    store.storage._put(store.path(name), b"torn")
    again = ReplayStore(uri, create=False)
    assert {s.key.seed for s in again.refresh()} == {0, 2, 3}
    (entry,) = again.quarantine.entries()
    assert entry["file"] == store.path(name) and again.storage.exists(f"quarantine/{entry['moved_to']}")
    assert again.commit(make_episode(1)) is True


def test_eviction_compaction_audit_and_manifest(uri):
    store = ReplayStore(uri)
    fill(store)
    store.refresh()
    assert store.evict([make_episode(0).key.name], "test") == 1
    assert compact(store).packed == 3
    again = ReplayStore(uri, create=False)
    assert {s.key.seed for s in again.refresh()} == {1, 2, 3} and again.commit(make_episode(0)) is False
    for seed in (1, 2, 3):
        assert_same(again.read(make_episode(seed).key.name), make_episode(seed))
    audit = verify(again, decode=True)
    assert audit.episodes == 3 and not audit.problems
    assert not repair(uri).quarantined
    assert sorted(path.split("/")[0] for path in again.storage._list("")).count("packs") == 1


def test_a_server_that_is_gone_is_one_clear_line_and_the_store_goes_on_when_it_is_back(tmp_path, monkeypatch):
    monkeypatch.setenv("COSMOS_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    port = free_port()
    process = serve(port)
    client(port).create_bucket(Bucket="bucket")
    store = ReplayStore(f"s3://key:secret@bucket/s?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1")
    process.kill()
    process.wait()
    with pytest.raises(StoreUnavailable) as error:
        store.commit(make_episode(0))
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    process = serve(port)
    try:
        client(port).create_bucket(Bucket="bucket")
        assert store.commit(make_episode(0)) is True
    finally:
        process.kill()
        process.wait()


def test_the_local_cache_is_bounded_and_damage_in_it_is_not_blamed_on_the_object(uri):
    store = ReplayStore(uri)
    fill(store, range(6))
    size = os.path.getsize(next(path for path in store_files(store, 0)))
    reader = ReplayStore(uri, create=False)
    reader.storage.cache_bytes = 3 * size
    reader.refresh()
    for seed in range(6):
        reader.read(make_episode(seed).key.name)
    held = [path for path in reader.storage.cache.rglob("*.arrow")]
    assert 1 <= len(held) <= 4
    os.truncate(held[0], 100)
    held[0].write_bytes(held[0].read_bytes().ljust(reader.storage._size(str(held[0].relative_to(reader.storage.cache))), b"x"))
    name = held[0].name.removesuffix(".arrow")
    assert_same(ReplayStore(uri, create=False).read(name), make_episode(int(name.split("-")[2])))


def store_files(store, seed):
    store.read(make_episode(seed).key.name)
    return store.storage.cache.rglob("*.arrow")


@pytest.mark.parametrize("uri, message", [
    ("s3://key:secret@bucket/x?no_such_option=1", "cannot be used as a store"),
    ("nonsense://bucket/x", "cannot be used as a store"),
])  # fmt: skip
def test_a_wrong_uri_is_one_clear_error(uri, message):
    with pytest.raises(StoreError, match=message) as error:
        ReplayStore(uri)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
