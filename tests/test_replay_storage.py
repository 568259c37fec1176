"""Files that appear whole or not at all, the marker of a store, and the scan of a directory. Also the helpers of the other tests."""

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import traceback
from pathlib import Path

import pytest

from cosmos_ray.errors import StoreError, StoreUnavailable
from cosmos_ray.replay.files import durable as files
from cosmos_ray.replay.files import storage
from cosmos_ray.replay.store import ReplayStore
from jobs.chaos.corruptions import scratch_directory
from tests.test_replay_episode import assert_same, make_episode


@functools.cache
def tiny(seed, **trajectory):
    """A very small episode, always the same one: do not change it."""
    return make_episode(seed, **{"length": 2, "size": 32, **trajectory})


def fill(root, seeds, **trajectory):
    """A store with the episodes of ``seeds``; returns it."""
    store = ReplayStore(root)
    assert all(store.commit(tiny(seed, **trajectory)) for seed in seeds)
    return store


def opened(root, **options):
    """The store, with everything known."""
    store = ReplayStore(root, create=False, **options)
    store.update()
    return store


def in_child(action):
    """Run ``action`` in a process of its own; 0, or minus the signal that killed it. What it raises fails it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(number):
    """Have this process killed before its change ``number`` (from 0) of a store."""
    left = [number]

    def counted(original):
        def change(self, *arguments):
            if left[0] == 0:
                die()
            left[0] -= 1
            return original(self, *arguments)

        return change

    for name in ("publish", "replace", "remove", "move", "append"):
        setattr(storage.LocalStorage, name, counted(getattr(storage.LocalStorage, name)))


def snapshot(root):
    """Every path with what makes it what it is."""
    def content(path):
        stat = path.lstat()
        return stat.st_mtime_ns, stat.st_ino, stat.st_mode, path.read_bytes() if path.is_file() and not path.is_symlink() else None

    return {path: content(path) for path in [root, *root.rglob("*")]}


def settle(root):
    """Every directory as if it had last changed long ago."""
    for path in [root, *root.rglob("*")]:
        if path.is_dir():
            os.utime(path, (1_000_000, 1_000_000))


@pytest.fixture
def no_unnamed_files(monkeypatch):
    """A file system without O_TMPFILE."""
    refuse_unnamed(monkeypatch.setattr)


def refuse_unnamed(setattr):
    def refuse(path, flags, *arguments, original=os.open, **options):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return original(path, flags, *arguments, **options)

    setattr(os, "open", refuse)


def half_then_die(file):
    file.write(b"half")
    file.flush()
    die()


def scratch_folder():
    """In memory where there is such a file system: nothing here depends on the disk, and its syncs would take most of the time."""
    with tempfile.TemporaryDirectory(dir=scratch_directory()) as folder:
        yield Path(folder)


in_memory = pytest.fixture(scratch_folder, name="tmp_path")


# ---------------------------------------------------------------- files


def test_killed_writer_leaves_nothing_where_files_can_be_unnamed(tmp_path):
    assert in_child(lambda: files.publish_with(half_then_die, tmp_path / "file")) == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_killed_writer_leaves_a_temporary_and_no_file_where_files_cannot_be_unnamed(tmp_path, no_unnamed_files):
    assert in_child(lambda: files.publish_with(half_then_die, tmp_path / "file")) == -signal.SIGKILL
    (stray,) = os.listdir(tmp_path)
    assert stray.startswith(".file.") and stray.endswith(files.TEMPORARY)


@pytest.mark.parametrize("unnamed", [True, False])
def test_failed_write_leaves_nothing(tmp_path, monkeypatch, unnamed):
    if not unnamed:
        refuse_unnamed(monkeypatch.setattr)

    def fail(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.publish_with(fail, tmp_path / "file")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("unnamed", [True, False])
def test_one_of_several_writers_of_a_name_is_first(tmp_path, monkeypatch, unnamed):
    if not unnamed:
        refuse_unnamed(monkeypatch.setattr)
    written = [files.publish(text, tmp_path / "file") for text in (b"first", b"second", b"third")]
    assert written == [True, False, False] and (tmp_path / "file").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("unnamed", [True, False])
def test_link_that_was_made_although_the_server_says_it_exists_is_our_own(tmp_path, monkeypatch, unnamed):
    """As a client of a file server sees it that asked again because the first answer was lost."""
    def link(*arguments, original=os.link, **options):
        original(*arguments, **options)
        raise FileExistsError(errno.EEXIST, "File exists")

    if not unnamed:
        refuse_unnamed(monkeypatch.setattr)
    monkeypatch.setattr(os, "link", link)
    assert files.publish(b"content", tmp_path / "file") is True
    assert files.publish(b"other", tmp_path / "file") is False  # here it is the truth
    assert (tmp_path / "file").read_bytes() == b"content" and os.listdir(tmp_path) == ["file"]


def test_commits_without_unnamed_files_are_as_safe(tmp_path, no_unnamed_files):
    store = fill(tmp_path / "store", range(3))
    assert store.commit(tiny(0)) is False
    again = opened(store.root)
    assert len(again) == 3
    assert_same(again.read(tiny(1).key.name), tiny(1))
    assert not [path for path in store.root.rglob("*") if path.name.endswith(files.TEMPORARY)]


def test_replace_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.replace(b"old", path)
    with pytest.raises(TypeError):
        files.replace("no bytes", path)

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(OSError, match="Input/output"):
            files.replace(b"new", path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]

    def killed():
        os.rename = die
        files.replace(b"new", path)

    assert in_child(killed) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    files.replace(b"new", path)
    assert path.read_bytes() == b"new"


def test_replacements_that_were_killed_are_cleared_away_by_a_later_one(tmp_path):
    store = fill(tmp_path / "store", range(1))

    def killed():
        os.rename = die
        store.save_manifest()

    assert in_child(killed) == in_child(killed) == -signal.SIGKILL
    first, second = (store.root / name for name in os.listdir(store.root) if name.endswith(files.TEMPORARY))
    os.utime(first, (1_000_000, 1_000_000))
    store.save_manifest()
    assert not first.exists() and second.exists()  # that one may still be written to


# ---------------------------------------------------------------- marker


@pytest.fixture
def mount(tmp_path):
    """A directory on which ``mount(another)`` mounts one and ``mount(None)`` leaves an empty one."""
    point = tmp_path / "mounted"
    point.mkdir()
    mounted = []

    def change(source):
        if mounted:
            subprocess.run(["umount", "--lazy", mounted.pop()], check=True)
        if source is not None:
            source.mkdir(exist_ok=True)
            if os.geteuid() or subprocess.run(["mount", "--bind", source, point], capture_output=True).returncode:
                pytest.skip("needs the right to mount")
            mounted.append(point)

    change.point = point
    yield change
    change(None)


def test_vanished_mount_is_one_clear_error_and_nothing_is_written_below_it(mount, tmp_path):
    mount(tmp_path / "disk")
    store = fill(mount.point, range(2))
    held = store.view(tiny(0).key.name)
    mount(None)
    for attempt in (
        lambda: store.commit(tiny(2)), store.update, store.refresh, store.save_manifest, lambda: store.evict([tiny(0).key.name], "x"),
        lambda: store.read(tiny(1).key.name), lambda: store.view(tiny(1).key.name), lambda: tiny(2).key.name in store,
    ):  # fmt: skip
        with pytest.raises(StoreUnavailable, match="has vanished .*: mount it again") as error:
            attempt()
        assert "\n" not in str(error.value)
    assert os.listdir(mount.point) == [] and len(store) == 2
    assert_same(held.episode(), tiny(0))  # what was mapped is
    mount(tmp_path / "disk")
    assert store.refresh() and store.commit(tiny(2)) and store.commit(tiny(1)) is False
    assert_same(store.read(tiny(1).key.name), tiny(1))
    assert len(opened(tmp_path / "disk")) == 3


def test_another_store_in_the_place_of_a_vanished_one_is_noticed(mount, tmp_path):
    fill(tmp_path / "other", [7])
    before = snapshot(tmp_path / "other")
    mount(tmp_path / "disk")
    store = fill(mount.point, range(2))
    mount(tmp_path / "other")
    for attempt in (lambda: store.commit(tiny(2)), store.update, store.save_manifest):
        with pytest.raises(StoreUnavailable, match="is gone or another one"):
            attempt()
    mount(None)
    assert snapshot(tmp_path / "other") == before


def mark(root, content):
    root.mkdir(exist_ok=True)
    (root / "store.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_store_with_packs_of_earlier_code_is_refused(tmp_path):
    """Their episodes must not go missing unsaid."""
    store = fill(tmp_path / "store", range(2))
    (store.root / "packs" / "demo-Lift").mkdir(parents=True)
    assert len(opened(store.root)) == 2
    (store.root / "packs" / "demo-Lift" / "1-1-ab.arrow").write_bytes(b"x")
    with pytest.raises(StoreError, match="packs holds packed episodes, which this version of cosmos_ray does not read: write them out"):
        ReplayStore(store.root)


@pytest.mark.parametrize("content, message", [
    ({"version": 3}, "newer than 2: upgrade"), ({"version": 1}, "of version 1: this package reads version 2"),
    ({"version": 0}, "does not describe"), ({"version": 1e999}, "does not describe"),
    ({"version": "2"}, "does not describe"), ({"version": 2, "id": 5}, "does not describe"), ([], "does not describe"),
    ("[" * 100_000, "does not describe"), ("", "does not describe"),
])  # fmt: skip
def test_store_of_another_version_is_refused(tmp_path, content, message):
    mark(tmp_path / "store", content)
    before = snapshot(tmp_path / "store")
    for create in (True, False):
        with pytest.raises(StoreError, match=message) as error:
            ReplayStore(tmp_path / "store", create=create)
        assert "\n" not in str(error.value)
    assert snapshot(tmp_path / "store") == before


# ---------------------------------------------------------------- scan


def test_state_of_a_scan_is_not_followed_out_of_the_store(tmp_path):
    """It is read from a file that anybody may have written."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("mine")
    local = storage.LocalStorage(tmp_path / "store")
    (tmp_path / "store" / "episodes" / "a").mkdir(parents=True)
    settle(tmp_path / "store")
    stamp = os.stat(tmp_path / "store" / "episodes").st_mtime_ns
    for names in (["../../outside"], [".."], ["a/../../../outside"], [5], "a", None, ["a\0"]):
        listings = list(local.scan("episodes", {"episodes": [stamp, names]}, 0.0))
        assert [listing.folder for listing in listings] == ["episodes", "episodes/a"] and not any(listing.files for listing in listings)
    assert [listing.folder for listing in local.scan("episodes", {"episodes": [stamp, ["a"]]}, 0.0)] == ["episodes/a"]


def test_directory_that_vanishes_during_a_scan_is_passed_over(tmp_path):
    root = fill(tmp_path / "store", range(3)).root
    scan = storage.LocalStorage(root).scan("episodes", {}, 0.0)
    assert next(scan).folders == ["demo-Lift"]
    shutil.rmtree(root / "episodes")
    assert list(scan) == []
