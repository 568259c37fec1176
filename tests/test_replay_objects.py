"""A store in an object store, with a real S3 server on this machine: commits, notes, writers, damage."""

import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import obstore
import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import ReplayStore, WindowSampler
from cosmos_ray.replay.files import objects
from cosmos_ray.replay.upkeep.repair import repair, verify
from tests.s3_server import NAMES, episode_objects, fill, fresh_uri, opened, running_server
from tests.test_replay_episode import assert_same, make_episode

server = pytest.fixture(running_server, scope="module")
uri = pytest.fixture(fresh_uri)


# ---------------------------------------------------------------- the same store


def test_an_object_store_holds_what_a_directory_holds(uri, tmp_path):
    remote, local = ReplayStore(uri), ReplayStore(tmp_path / "local")
    noted = opened(uri)  # will know them from their notes
    fill(remote)
    fill(local)
    listed = ReplayStore(uri, create=False)
    assert sorted(s.name for s in listed.refresh()) == sorted(s.name for s in noted.refresh()) == local.keys()
    for seed in range(4):
        assert_same(listed.read(NAMES[seed]), make_episode(seed))
    wanted = {s.name: s for s in local.summaries()}
    for summary in (*listed.summaries(), *noted.summaries(), *remote.summaries()):
        other = wanted[summary.name]
        assert (summary.key, summary.length, summary.success, summary.frame_ranges, summary.size) == (
            other.key, other.length, other.success, other.frame_ranges, other.size)  # fmt: skip
    draws = [WindowSampler(store, chunk=5, gamma=0.9, seed=0).draw(20, "demo") for store in (listed, local)]
    assert draws[0].episodes == draws[1].episodes
    for name, value in vars(draws[0]).items():
        if isinstance(value, np.ndarray):
            assert value.tobytes() == getattr(draws[1], name).tobytes(), name


def test_a_retry_is_the_same_commit(uri):
    store = ReplayStore(uri)
    fill(store, [0])
    assert store.commit(make_episode(0)) is False and ReplayStore(uri).commit(make_episode(0)) is False
    assert len(ReplayStore(uri).refresh()) == 1 and len(episode_objects(store)) == 1


def test_a_commit_takes_three_requests_and_a_look_without_news_two(uri, server):
    writer, reader = ReplayStore(uri), ReplayStore(uri)
    fill(writer, range(3))
    reader.refresh()
    server.requests.clear()
    writer.commit(make_episode(3))
    assert [request.split()[0] for request in server.requests] == ["PUT", "PUT", "GET"]
    server.requests.clear()
    assert [s.key.seed for s in reader.refresh()] == [3]
    assert len(server.requests) == 2 + 2  # is it there, what the note says of it
    assert not any("prefix=runs%2Freplay%2Fepisodes" in request for request in server.requests)
    server.requests.clear()
    assert reader.refresh() == [] and len(server.requests) == 2
    server.requests.clear()
    reader.read(NAMES[3])
    assert [request.split()[0] for request in server.requests] == ["HEAD", "GET"]
    server.requests.clear()
    ReplayStore(uri, create=False).read(NAMES[3])
    assert not [request for request in server.requests if request.startswith("GET") and NAMES[3] in request]


def test_who_starts_anew_does_not_read_the_notes_of_what_it_has_listed(uri, server):
    fill(ReplayStore(uri))
    store = opened(uri)
    server.requests.clear()
    assert store.refresh() == [] and len(server.requests) == 2


def test_a_manifest_spares_opening_every_object(uri, server):
    fill(ReplayStore(uri))
    opened(uri).save_manifest()
    ReplayStore(uri).commit(make_episode(7))
    server.requests.clear()
    store = ReplayStore(uri, create=False)
    assert sorted(s.key.seed for s in store.refresh()) == [0, 1, 2, 3, 7]
    assert not any(NAMES[seed] + ".arrow" in request and "/episodes/" in request and request.startswith("GET")
                   for request in server.requests for seed in range(4))  # fmt: skip


@pytest.mark.parametrize("hour", ["20200101T00", "99990101T00", "nonsense", 7])
def test_a_manifest_whose_last_look_is_too_old_or_no_time_lists_everything(uri, hour):
    fill(ReplayStore(uri), [0])
    store = opened(uri)
    store.catalog._state("episodes")["hour"] = hour
    store.save_manifest()
    assert store.storage.exists("manifest.arrow")
    ReplayStore(uri).commit(make_episode(1))
    obstore.delete(store.storage.client, store.storage._list("log"))  # as if these were swept long ago
    assert {s.key.seed for s in ReplayStore(uri, create=False).refresh()} == {0, 1}


# ---------------------------------------------------------------- many writers


def test_a_note_without_its_episode_is_looked_up_until_it_is_there(uri, tmp_path):
    """A writer that is killed between the note and the episode, and one that does it again."""
    reader = ReplayStore(uri)
    assert reader.refresh() == []
    code = ("import os, signal, sys; from tests.test_replay_episode import make_episode; from cosmos_ray.replay import ReplayStore\n"
            "store = ReplayStore(sys.argv[1], create=False)\n"
            "store.storage._create = lambda path, data: os.kill(os.getpid(), signal.SIGKILL)\n"
            "store.commit(make_episode(0))")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code, uri]).returncode == -signal.SIGKILL
    assert len(reader.storage._list("log")) == 1 and episode_objects(reader) == []
    assert reader.refresh() == [] and reader.refresh() == [] and NAMES[0] not in reader
    fill(ReplayStore(uri), [0])
    assert [s.key.seed for s in reader.refresh()] == [0] and reader.refresh() == []


def test_writers_in_many_processes_lose_and_double_nothing(uri):
    code = ("import sys; from tests.test_replay_episode import make_episode; from cosmos_ray.replay import ReplayStore\n"
            "store, first, last = ReplayStore(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])\n"
            "print(sum(store.commit(make_episode(seed)) for seed in range(first, last)))")  # fmt: skip
    reader = opened_new(uri)
    writers = [subprocess.Popen([sys.executable, "-c", code, uri, *span], stdout=subprocess.PIPE, text=True)
               for span in (("0", "6"), ("3", "9"))]  # fmt: skip
    counts = [int(writer.communicate(timeout=400)[0]) for writer in writers]
    assert sorted(s.key.seed for s in reader.refresh()) == list(range(9)) and sum(counts) == 9
    assert sorted(s.key.seed for s in ReplayStore(uri, create=False).refresh()) == list(range(9))
    for seed in range(9):
        assert_same(reader.read(NAMES[seed]), make_episode(seed))


def opened_new(uri):
    store = ReplayStore(uri)
    assert store.refresh() == []
    return store


def test_sixteen_commits_of_one_key_at_once_are_new_once(uri):
    """The server decides which of them created the object; threads of stores of their own, as other machines have."""
    stores = [ReplayStore(uri) for _ in range(16)]
    for seed in range(3):
        start = threading.Barrier(16)

        def commit(store, start=start, seed=seed):
            start.wait()
            return store.commit(make_episode(seed))

        with ThreadPoolExecutor(16) as pool:
            assert sorted(pool.map(commit, stores)) == [False] * 15 + [True]
    assert sorted(s.key.seed for s in ReplayStore(uri, create=False).refresh()) == [0, 1, 2]
    assert len({store.marker.id for store in stores}) == 1


def test_stores_that_are_made_at_once_are_one_store(uri):
    with ThreadPoolExecutor(16) as pool:
        assert len({store.marker.id for store in pool.map(lambda _: ReplayStore(uri), range(16))}) == 1


def test_a_slow_upload_is_noted_again(uri, monkeypatch):
    """Who waits for the object of a note stops after an hour."""
    reader, writer = opened_new(uri), ReplayStore(uri)
    clock = iter([time.time() - 2 * 3600])
    monkeypatch.setattr(objects, "time", types.SimpleNamespace(**{**vars(time), "time": lambda: next(clock, None) or time.time()}))
    assert writer.storage.publish("episodes/a/bb/demo-Lift-0-a0-bb.arrow", lambda file: file.write(b"torn"), b"{}")
    assert len(writer.storage._list("log")) == 2
    reader.refresh()
    assert len(reader.quarantine.entries()) == 1  # it was seen, and is no episode


# ---------------------------------------------------------------- damage, eviction


def test_a_torn_object_is_quarantined_and_its_key_is_free_again(uri):
    store = ReplayStore(uri)
    fill(store)
    other = opened(uri)
    store.storage._put(store.path(NAMES[1]), b"torn")
    again = ReplayStore(uri, create=False)
    assert {s.key.seed for s in again.refresh()} == {0, 2, 3}
    (entry,) = again.quarantine.entries()
    assert entry["file"] == store.path(NAMES[1]) and again.storage.read(f"quarantine/{entry['moved_to']}") == b"torn"
    with pytest.raises(StoreError):
        other.read(NAMES[1])
    assert again.commit(make_episode(1)) is True
    assert_same(opened(uri).read(NAMES[1]), make_episode(1))


def test_a_damaged_object_is_blamed_once_it_was_fetched_twice(uri):
    store = ReplayStore(uri)
    fill(store)
    flipped = bytearray(store.storage.read(store.path(NAMES[2])))
    flipped[len(flipped) // 2] ^= 0xFF
    store.storage._put(store.path(NAMES[2]), bytes(flipped))
    reader = opened(uri)
    with pytest.raises(StoreError):
        reader.read(NAMES[2])
    assert len(reader.quarantine.entries()) == 1 and NAMES[2] not in reader.index
    done = repair(uri)
    assert done.restored + list(done.salvaged) in ([NAMES[2]], [])  # a frame or a column was hit


def test_eviction_verification_and_repair(uri):
    store = ReplayStore(uri)
    fill(store)
    reader = opened(uri)
    assert store.evict([NAMES[0]], "test") == 1
    assert reader.refresh() == [] and NAMES[0] not in reader.index and len(episode_objects(store)) == 3
    assert reader.commit(make_episode(0)) is False and ReplayStore(uri).commit(make_episode(0)) is False
    again = opened(uri)
    assert sorted(again.keys()) == sorted(NAMES[1:4]) and again.commit(make_episode(1)) is False
    for seed in (1, 2, 3):
        assert_same(again.read(NAMES[seed]), make_episode(seed))
    found = verify(again, decode=True)
    assert found.episodes == 3 and not found.problems
    assert not repair(uri).quarantined
    assert store.evict(NAMES[1:3], "test") == 2 and reader.refresh() == [] and reader.keys() == [NAMES[3]]
    assert_same(reader.read(NAMES[3]), make_episode(3))


def test_repair_sweeps_notes_that_nobody_reads_any_more(uri):
    store = ReplayStore(uri)
    fill(store, [0])
    store.storage._put("log/20200101T00/old", b"{}")
    repair(uri)
    assert len(store.storage._list("log")) == 1


def test_a_removed_episode_is_forgotten_by_who_lists_everything(uri):
    store = ReplayStore(uri)
    fill(store, range(2))
    opened(uri).save_manifest()
    store.storage.remove(store.path(NAMES[0]))
    reader = opened(uri)
    assert len(reader) == 2  # the manifest says so
    reader.catalog.doubt()
    reader.refresh()
    assert reader.keys() == [NAMES[1]]
