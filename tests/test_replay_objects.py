"""A store in an object store: a real S3 server on this machine."""

import dataclasses
import logging
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from cosmos_ray.commands.stage import run_stage
from cosmos_ray.config import RunConfig, SimConfig, check
from cosmos_ray.config.stored import stored_config
from cosmos_ray.errors import ConfigError, StoreError, StoreUnavailable
from cosmos_ray.folder import RunFolder
from cosmos_ray.replay import ReplayStore, WindowSampler
from cosmos_ray.replay.files import objects
from cosmos_ray.replay.upkeep.compaction import compact
from cosmos_ray.replay.upkeep.repair import repair, verify
from cosmos_ray.report.settings_table import commands, settings_table
from cosmos_ray.rollout.outbox import Outbox
from cosmos_ray.run import open_run
from tests.s3_server import S3Server
from tests.test_replay_episode import assert_same, make_episode

NAMES = [make_episode(seed).key.name for seed in range(10)]


@pytest.fixture(scope="module")
def server():
    made = S3Server()
    yield made
    made.stop()


@pytest.fixture
def uri(server, tmp_path, monkeypatch):
    """A fresh bucket, and a fresh local cache."""
    monkeypatch.setenv("COSMOS_RAY_CACHE", str(tmp_path / "cache"))
    uri = server.uri(f"{server.new_bucket()}/runs/replay")
    server.requests.clear()
    return uri


def fill(store, seeds=range(4)):
    for seed in seeds:
        assert store.commit(make_episode(seed)) is True


def opened(uri):
    store = ReplayStore(uri, create=False)
    store.refresh()
    return store


def episode_objects(store):
    return store.storage._list("episodes")


def copies(store):
    return [path for path in store.storage.cache.rglob("*") if path.is_file()]


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


def test_a_commit_takes_five_requests_and_a_look_without_news_four(uri, server):
    writer, reader = ReplayStore(uri), ReplayStore(uri)
    fill(writer, range(3))
    reader.refresh()
    server.requests.clear()
    writer.commit(make_episode(3))
    assert [request.split()[0] for request in server.requests] == ["HEAD", "PUT", "PUT", "GET", "GET"]
    server.requests.clear()
    assert [s.key.seed for s in reader.refresh()] == [3]
    assert len(server.requests) == 4 + 3  # is it there, what the note says of it
    assert not any("prefix=runs%2Freplay%2Fepisodes" in request for request in server.requests)
    server.requests.clear()
    assert reader.refresh() == [] and len(server.requests) == 4
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
    assert store.refresh() == [] and len(server.requests) == 4


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
    store.storage.fs.delete_dir(store.storage._full("log"))  # as if these were swept long ago
    assert {s.key.seed for s in ReplayStore(uri, create=False).refresh()} == {0, 1}


# ---------------------------------------------------------------- many writers


def test_a_note_without_its_episode_is_looked_up_until_it_is_there(uri, tmp_path):
    """A writer that is killed between the note and the episode, and one that does it again."""
    reader = ReplayStore(uri)
    assert reader.refresh() == []
    code = ("import os, signal, sys; from tests.test_replay_episode import make_episode; from cosmos_ray.replay import ReplayStore\n"
            "store = ReplayStore(sys.argv[1], create=False)\n"
            "store.storage._put_new = lambda path, data: os.kill(os.getpid(), signal.SIGKILL)\n"
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
    assert sorted(s.key.seed for s in reader.refresh()) == list(range(9)) and 9 <= sum(counts) <= 12
    assert sorted(s.key.seed for s in ReplayStore(uri, create=False).refresh()) == list(range(9))
    for seed in range(9):
        assert_same(reader.read(NAMES[seed]), make_episode(seed))


def opened_new(uri):
    store = ReplayStore(uri)
    assert store.refresh() == []
    return store


def test_a_slow_upload_is_noted_again(uri, monkeypatch):
    """Who waits for the object of a note stops after an hour."""
    reader, writer = opened_new(uri), ReplayStore(uri)
    clock = iter([time.time() - 2 * 3600])
    monkeypatch.setattr(objects, "time", types.SimpleNamespace(**{**vars(time), "time": lambda: next(clock, None) or time.time()}))
    assert writer.storage.publish("episodes/a/bb/demo-Lift-0-a0-bb.arrow", lambda file: file.write(b"torn"), b"{}")
    assert len(writer.storage._list("log")) == 2
    reader.refresh()
    assert len(reader.quarantine.entries()) == 1  # it was seen, and is no episode


# ---------------------------------------------------------------- damage, eviction, compaction


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


def test_eviction_compaction_audit_and_repair(uri):
    store = ReplayStore(uri)
    fill(store)
    reader = opened(uri)
    assert store.evict([NAMES[0]], "test") == 1
    assert reader.refresh() == [] and NAMES[0] not in reader.index
    assert reader.commit(make_episode(0)) is False and ReplayStore(uri).commit(make_episode(0)) is False
    assert compact(store).packed == 3 and episode_objects(store) == []
    assert_same(reader.read(NAMES[1]), make_episode(1))  # which has moved
    again = opened(uri)
    assert sorted(again.keys()) == sorted(NAMES[1:4]) and again.commit(make_episode(1)) is False
    for seed in (1, 2, 3):
        assert_same(again.read(NAMES[seed]), make_episode(seed))
    audit = verify(again, decode=True)
    assert audit.episodes == 3 and not audit.problems
    assert not repair(uri).quarantined
    assert store.evict(NAMES[1:3], "test") == 2 and compact(store).packs == 1
    assert reader.refresh() == [] and reader.keys() == [NAMES[3]]
    assert_same(reader.read(NAMES[3]), make_episode(3))
    assert len(reader.storage._list("packs")) == 1


def test_compaction_sweeps_notes_that_nobody_reads_any_more(uri):
    store = ReplayStore(uri)
    fill(store, [0])
    store.storage._put("log/20200101T00/old", b"{}")
    compact(store)
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


# ---------------------------------------------------------------- local copies


def test_the_local_cache_is_bounded(uri):
    store = ReplayStore(uri)
    fill(store, range(6))
    size = max(store.storage._open(path).size() for path in episode_objects(store))
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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["begin", "middle", "end"])
def test_a_damaged_copy_is_fetched_again_and_not_blamed_on_the_object(uri, place, packed, caplog):
    store = ReplayStore(uri)
    fill(store, range(3))
    if packed:
        compact(store)
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
    assert compact(reader).damaged == ()
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
    monkeypatch.setattr(objects.tempfile, "gettempdir", lambda: str(tmp_path))
    ReplayStore(uri)
    folder = tmp_path / f"cosmos_ray-cache-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(StoreError, match="belongs to another user: set"):
        ReplayStore(uri)


# ---------------------------------------------------------------- trouble


def test_a_server_that_is_gone_is_one_clear_line_and_the_store_goes_on_when_it_is_back(uri, server, caplog):
    store = ReplayStore(uri)
    fill(store, [0])
    outbox = Outbox(store, 1e6)
    server.stop()
    try:
        with pytest.raises(StoreUnavailable) as error:
            store.refresh()
        assert "\n" not in str(error.value) and "secret" not in str(error.value)
        outbox.put(make_episode(1), "waiting")
        assert outbox.flush() == [] and len(outbox) == 1
    finally:
        server.start()
    done = []
    for _ in range(100):
        done += outbox.flush()
        if done:
            break
        time.sleep(0.1)
    assert done == [("waiting", True)] and len(episode_objects(store)) == 2
    assert len(caplog.records) == 2 and "secret" not in caplog.text
    assert sorted(s.key.seed for s in ReplayStore(uri, create=False).refresh()) == [0, 1]


def test_a_server_that_refuses_access_is_an_error_that_is_not_tried_again(uri, server):
    store = ReplayStore(uri)
    server.refuse = "AccessDenied"
    try:
        for action in (lambda: store.commit(make_episode(0)), store.refresh, lambda: ReplayStore(uri)):
            with pytest.raises(StoreError, match="refuses this access") as error:
                action()
            assert not isinstance(error.value, StoreUnavailable) and "\n" not in str(error.value)
    finally:
        server.refuse = ""


def test_a_bucket_that_is_not_there_is_one_clear_error(server):
    with pytest.raises(StoreError, match="there is no such bucket"):
        ReplayStore(server.uri("missing/x"))
    with pytest.raises(StoreError, match="is not a replay store"):
        ReplayStore(server.uri("missing/x"), create=False)


def test_credentials_are_never_shown(uri, caplog):
    caplog.set_level(logging.DEBUG, "cosmos_ray")
    store = ReplayStore(uri)
    fill(store, range(2))
    shown = [f"{store.root} {store.storage.name} {store.summaries()[0].path} {store.storage.where('x')}"]
    with pytest.raises(StoreError) as error:
        store.read(NAMES[9])
    shown.append(str(error.value))
    store.storage._put(store.path(NAMES[0]), b"torn")
    opened(uri)
    shown += [caplog.text, str(ReplayStore(uri).quarantine.entries())]
    assert "quarantined s3://" in caplog.text and all("secret" not in text and "key:" not in text for text in shown)


@pytest.mark.parametrize("uri", [
    "s3://mykey:se/cr%et@bucket/x", "s3://mykey:se cr%et@bucket/x", "s3://mykey:se?cr%et@bucket/x", "s3://mykey:secr%et@/x",
    "s3://mykey:se%2Fcr%25et@bucket/x?no_such_option=1", "nonsense://mykey:secr%et@bucket/x",
])  # fmt: skip
def test_a_wrong_uri_is_one_clear_error_without_its_credentials(uri):
    with pytest.raises(StoreError, match="cannot be used as a store") as error:
        ReplayStore(uri)
    message = str(error.value)
    assert "\n" not in message and not re.search("mykey|cr%|%et|2Fcr|secr", message), message
    assert error.value.__cause__ is None and error.value.__suppress_context__  # a traceback shows no more


# ---------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_run_collects_into_a_store_elsewhere_and_keeps_where_it_is(uri, tmp_path):
    """The real command, with real workers."""
    config = RunConfig(root=str(tmp_path), name="run", demos=2, sim=SimConfig(image_size=32))
    config = replaced(config, uri)
    with open_run(config, quiet=True) as run:
        said = run_stage("collect", run)
    assert said.startswith("2 demonstrations in s3://b") and "secret" not in said
    store = opened(uri)
    assert sum(s.stratum == "demo" for s in store.summaries()) == 2 and not (tmp_path / "run" / "replay").exists()
    kept = stored_config(RunConfig(root=str(tmp_path), name="run"))
    assert kept.replay.store == uri and (tmp_path / "run" / "config.json").stat().st_mode & 0o077 == 0
    folder = RunFolder(kept)
    assert len(folder.store()) == len(store)
    folder.close()
    with pytest.raises(ConfigError, match="--fresh cannot move the replay store s3://b[^@]* aside") as error:
        RunFolder(kept, fresh=True)
    assert "secret" not in str(error.value)


def test_credentials_are_not_in_a_report(uri):
    config = replaced(RunConfig(), uri)
    rows, lines = settings_table(config), commands(config)
    assert "secret" not in f"{rows}{lines}" and next(row for row in rows if row["name"] == "replay.store")["changed"]
    assert not any("replay.store" in line["command"] for line in lines)
    plain = replaced(RunConfig(), "s3://bucket/x")
    assert all("--replay.store s3://bucket/x" in line["command"] for line in commands(plain))


def test_a_store_of_another_kind_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match="replay.store = 'ftp://host/x' is neither") as error:
        check(replaced(RunConfig(), "ftp://key:secret@host/x"))
    assert "secret" not in str(error.value)


def test_a_folder_elsewhere_is_a_store_too(tmp_path):
    config = replaced(RunConfig(root=str(tmp_path), name="run"), str(tmp_path / "elsewhere"))
    folder = RunFolder(config)
    folder.store().commit(make_episode(0))
    assert folder.replay == Path(tmp_path / "elsewhere") and len(ReplayStore(tmp_path / "elsewhere", create=False).refresh()) == 1
    folder.close()


def replaced(config, store):
    return dataclasses.replace(config, replay=dataclasses.replace(config.replay, store=store))
