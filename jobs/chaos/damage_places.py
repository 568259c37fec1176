"""Something else where an episode, the marker, the manifest or the quarantine belongs."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pyarrow as pa

from jobs.chaos.case import Case, fault
from jobs.chaos.damage_bytes import flip

# ---------------------------------------------------------------- something else where an episode belongs


def put_something(case: Case, path: Path) -> None:
    """Anything but an episode under ``path``."""
    files = ("text", "arrow", "pickle", "empty", "sparse", "fifo", "socket", "directory", "full directory")
    links = ("dangling", "loop", "device", "symlink to a directory", "symlink to text")
    what = case.rng.choice((*files, *links))
    outside = case.root.with_name(case.root.name + ".outside")
    if what == "text":
        path.write_text("notes about the robot\n" * 50)
    elif what == "arrow":
        table = pa.table({"action": [1.0], "step": [0]}).replace_schema_metadata({b"made by": b"somebody else"})
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    elif what == "pickle":
        path.write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    elif "directory" in what and "symlink" not in what:
        path.mkdir()
        if what != "directory":
            (path / "inside.arrow").write_text("x")
    elif what == "dangling":
        path.symlink_to(case.root / "nowhere")
    elif what == "loop":
        path.symlink_to(path)
    elif what == "device":
        path.symlink_to(case.rng.choice(("/dev/zero", "/dev/null")))
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path must be short
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path.name)
        finally:
            os.chdir(here)
    elif what == "empty":
        path.touch()
    elif what == "sparse":
        path.touch()
        os.truncate(path, case.rng.choice((2**31, 2**43)))
    elif what == "symlink to a directory":
        path.symlink_to(case.root)
    else:
        outside.write_text("not yours")
        path.symlink_to(outside)


@fault
def something_else(case: Case) -> None:
    """A text, a directory, a link, a FIFO, a socket, a device, a huge or empty file under the name of an episode."""
    case.path.unlink()
    put_something(case, case.path)


@fault
def another_episode(case: Case) -> None:
    """The file of another episode under this name: a copy or a link."""
    other = case.rng.choice(sorted(path for path in (case.root / "episodes").rglob("*.arrow") if path != case.path))
    case.path.unlink()
    case.rng.choice((shutil.copy, os.link, os.symlink))(other, case.path)


@fault
def in_another_folder(case: Case) -> None:
    """A copy of an episode in a folder where it does not belong."""
    folder = case.root / "episodes" / case.rng.choice(("demo-Lift/zz", "other/00", case.path.parent.parent.name + "/0"))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(case.path, folder)
    case.foreign.append(f"{folder.relative_to(case.root)}/{case.path.name}")


@fault
def foreign_file(case: Case) -> None:
    """Something that is no episode among the episodes, at any level."""
    folder = case.rng.choice((case.path.parent, case.path.parent, case.path.parent.parent, case.root / "episodes"))
    names = ("notes.txt", "demo-Lift-00000099-a0-12345678.arrow", "x.arrow", ".hidden", "a b\nc.arrow", "ünï.arrow", "-rf", "*")
    name = case.rng.choice(names)
    put_something(case, folder / name)
    # Links and directories above the shards can be folders of a store, or are harmless.
    if (folder / name).is_dir() and folder != case.path.parent:
        return
    case.foreign.append(name)


@fault
def foreign_name(case: Case) -> None:
    """A file whose name is too long to be moved elsewhere under a longer one, or is not text."""
    names = (b"n" * 249 + b".arrow", b"a" * 255, b"\xff\xfe.arrow", b"\xe2\x80\xae.arrow", b"demo-\xff-00000001-a0-00000000.arrow")
    name = case.rng.choice(names)
    with open(os.fsencode(case.path.parent) + b"/" + name, "wb") as file:
        file.write(b"foreign")
    case.foreign.append(os.fsdecode(name))


@fault
def damage_and_full_quarantine(case: Case) -> None:
    """A torn file, and a file where the quarantine directory belongs: the warning in the log has to name it."""
    os.truncate(case.path, 1000)
    shutil.rmtree(case.root / "quarantine", ignore_errors=True)
    (case.root / "quarantine").write_text("in the way")
    case.log_counts = True


# ---------------------------------------------------------------- what is not an episode


@fault
def quarantine_log(case: Case) -> None:
    """A quarantine log that is not what it should be, and a torn episode to be added to it."""
    folder = case.root / "quarantine"
    folder.mkdir(exist_ok=True)
    texts = (b"\xff\xfe\n", b"3\n", b"null\n[]\n", b'{"time"', b"[" * 100_000 + b"\n", b"\n\n", b'{"file": 3}\n')
    (folder / "log.jsonl").write_bytes(case.rng.choice(texts))
    os.truncate(case.path, 1000)


@fault
def marker(case: Case) -> None:
    """The store's marker is torn, foreign, of another version, or no file."""
    case.about = "marker"
    path = case.path = case.root / "store.json"
    path.unlink()
    texts = (b"", b"{", b"null", b"[]", b"3", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"version": 2, "id": {}}')
    versions = (b'"abc"', b"1e999", b"NaN", b"99", b"-1", b"[1]", b"null", b"9" * 5000)
    texts += tuple(b'{"version": ' + version + b"}" for version in versions)
    if case.rng.random() < 0.7:
        path.write_bytes(case.rng.choice(texts))
    else:
        put_something(case, path)


def auxiliary(case: Case) -> list[Path]:
    """Files of the store that are neither episodes nor marker nor quarantine: manifest, records of removals."""
    found = []
    for path in sorted(case.root.rglob("*")):
        top = path.relative_to(case.root).parts[0]
        if path.is_file() and top not in ("episodes", "quarantine", "store.json"):
            found.append(path)
    return found


@fault
def manifest_bytes(case: Case) -> None:
    """A bit of a file that is not an episode (manifest, removals), or its end, is gone."""
    case.about = "cache"
    for path in case.rng.sample(auxiliary(case), min(1, len(auxiliary(case)))):
        if case.rng.random() < 0.6 and path.stat().st_size:
            case.path = path
            flip(case, [(0, path.stat().st_size)], case.rng.choice((1, 30)))
        else:
            os.truncate(path, case.rng.randrange(path.stat().st_size + 1))
        case.path = path


@fault
def manifest_replaced(case: Case) -> None:
    """Something else where a file that is not an episode (manifest, removals) belongs."""
    case.about = "cache"
    for path in case.rng.sample(auxiliary(case), min(1, len(auxiliary(case)))):
        path.unlink()
        put_something(case, path)
        case.path = path


@fault
def manifest_lies(case: Case) -> None:
    """The manifest of another store, or of this one before some of its episodes were there or gone."""
    case.about = "cache"
    path = case.root / "manifest.arrow"
    if path.exists():
        table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()
        metadata = table.schema.metadata
        fewer, twice = table.slice(0, case.rng.randrange(table.num_rows)), pa.concat_tables([table, table])
        table = case.rng.choice((fewer, twice))
        batch = table.replace_schema_metadata(metadata).combine_chunks().to_batches()
        with pa.ipc.new_file(str(path), table.schema.with_metadata(metadata)) as writer:
            for part in batch:
                writer.write_batch(part)
        case.path = path


@fault
def removals_hostile(case: Case) -> None:
    """A record of removals with lines that are none."""
    case.about = "cache"
    folder = case.root / "removed"
    if folder.is_dir():
        texts = (b"3", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"name": 3}', b'{"name": "x", "kind": "evicted"}', b'{"kind": []}')
        others = (b'{"name": ["a"], "kind": "evicted", "success": {}}', b'{"name": "x-1-2-3", "kind": "damaged", "length": []}')
        line = case.rng.choice((*texts, *others))
        case.path = folder / f"{case.rng.randrange(10**18)}-x.jsonl"
        case.path.write_bytes(line + b"\n")
