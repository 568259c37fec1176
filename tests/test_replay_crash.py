"""What the store survives: killed and concurrent writers, full, limited and read-only disks."""

import os
import random
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.store import ReplayStore
from tests.conftest import file_system
from tests.test_replay_episode import assert_same, make_episode

TESTS = Path(__file__).resolve().parent

WRITER = """
import sys
from tests.test_replay_episode import make_episode
from cosmos_ray.replay.store import ReplayStore
store = ReplayStore(sys.argv[1])
first, count = int(sys.argv[2]), int(sys.argv[3])
for seed in range(first, first + count):
    new = store.commit(make_episode(seed))
    print(seed, int(new), flush=True)
"""


def start_writer(root, first, count):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    arguments = [sys.executable, "-c", WRITER, str(root), str(first), str(count)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)


def names_on_disk(root):
    return sorted(path.name for path in (root / "episodes").rglob("*") if path.is_file())


def test_sigkill_of_a_writer_loses_no_acknowledged_episode(tmp_path):
    """10 writers are killed at random instants of their work: all they acknowledged is there, and nothing is torn."""
    root = tmp_path / "store"
    rng = random.Random(0)

    def write_and_kill(writer):
        process = start_writer(root, 10_000 * writer, 10_000)
        acknowledged = []
        # Killed after a random number of commits, and at a random point of the next: the pause is within one commit.
        for line in process.stdout:
            acknowledged.append(int(line.split()[0]))
            if len(acknowledged) == stop_after[writer]:
                break
        try:
            process.wait(timeout=pauses[writer])
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        acknowledged += [int(line.split()[0]) for line in process.stdout if line.endswith("\n")]
        assert process.wait() == -signal.SIGKILL
        return acknowledged

    stop_after = [rng.randint(1, 30) for _ in range(10)]
    pauses = [rng.uniform(0, 0.004) for _ in range(10)]
    with ThreadPoolExecutor(2) as pool:
        acknowledged = [seed for seeds in pool.map(write_and_kill, range(10)) for seed in seeds]

    store = ReplayStore(root, create=False, stray_seconds=0.0)
    found = {summary.key.seed for summary in store.refresh()}
    assert set(acknowledged) <= found
    assert len(found) - len(acknowledged) <= 10  # at most the one in flight of each writer
    for seed in found:
        assert_same(store.read(make_episode(seed).key.name), make_episode(seed))
    assert all("temporary file left behind" in entry["reason"] for entry in store.quarantine.entries())
    # Who collects again after the crash commits the same keys: none of them is counted twice.
    assert not any(store.commit(make_episode(seed)) for seed in acknowledged)


def test_concurrent_commits_of_the_same_keys_are_one_commit_each(tmp_path):
    root = tmp_path / "store"
    writers = [start_writer(root, 0, 25) for _ in range(4)]
    lines = [line.split() for writer in writers for line in writer.communicate()[0].splitlines()]
    assert [writer.returncode for writer in writers] == [0] * 4
    assert len(lines) == 100
    for seed in range(25):
        assert sum(int(new) for number, new in lines if int(number) == seed) == 1
    assert names_on_disk(root) == sorted(make_episode(seed).key.name + ".arrow" for seed in range(25))


def test_damaged_file_of_a_key_is_replaced_by_its_next_commit(tmp_path):
    store = ReplayStore(tmp_path / "store")
    store.commit(make_episode(0))
    path = Path(store.summaries()[0].path)
    os.truncate(path, 1000)
    again = ReplayStore(tmp_path / "store")
    assert again.commit(make_episode(0)) is True
    assert_same(again.read(make_episode(0).key.name), make_episode(0))
    assert len(again.quarantine.entries()) == 1


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 192 KiB."""
    with file_system(tmp_path / "disk", "192k") as mounted:
        yield mounted


def test_full_disk_is_one_clear_error_and_leaves_nothing_behind(tiny_disk):
    store = ReplayStore(tiny_disk / "store")
    committed = []
    with pytest.raises(StoreError, match="the disk is full: free space") as error:
        for seed in range(100):
            store.commit(make_episode(seed, length=30))
            committed.append(seed)
    assert committed and "\n" not in str(error.value)
    assert len(names_on_disk(store.root)) == len(committed)
    store.refresh()
    assert sorted(summary.key.seed for summary in store.summaries()) == committed
    # Once there is space again, the same store goes on.
    Path(store.summaries()[0].path).unlink()
    assert store.commit(make_episode(len(committed), length=30))


def test_read_only_disk_can_be_read_and_refuses_commits_in_one_line(tiny_disk, caplog):
    root = tiny_disk / "store"
    store = ReplayStore(root)
    store.commit(make_episode(0))
    store.commit(make_episode(1))
    os.truncate(store.summaries()[1].path, 1000)
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    store = ReplayStore(root)
    assert [summary.key.seed for summary in store.refresh()] == [0]
    assert store.refresh() == []
    assert_same(store.read(make_episode(0).key.name), make_episode(0))
    assert sum("cannot be moved to quarantine" in record.message for record in caplog.records) == 1
    with pytest.raises(StoreError, match="file system is read-only: choose a writable directory"):
        store.commit(make_episode(2))
    with pytest.raises(StoreError, match="cannot create a replay store in .* read-only"):
        ReplayStore(tiny_disk / "another")


def test_file_size_limit_is_one_clear_error_and_leaves_nothing_behind(tmp_path):
    store = ReplayStore(tmp_path / "store")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(StoreError, match="file size limit"):
            store.commit(make_episode(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert names_on_disk(store.root) == [] and make_episode(0).key.name not in store
    assert store.commit(make_episode(0)) is True


def test_path_that_leads_through_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="a part of the path is a file"):
        ReplayStore(tmp_path / "file" / "store")
