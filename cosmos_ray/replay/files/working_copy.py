"""A folder of a run in a bucket, and the copy of it that this machine works with.

Files lie in the bucket under their own names. A checkpoint is replaced as a whole: its files lie below ``checkpoints/base/<digest>/``, and
``checkpoints/base/files.json``, which is put last, names the digest, the sizes and the checksums. Everything else is single files, put in
the order in which they were written.

The copy remembers below ``.published/`` what it has in common with the bucket. So several processes of one machine share a copy: the driver
of a run, and actors that only know a path in it (:func:`fetched`, :func:`published`).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import obstore

from cosmos_ray.caches import working_copy_at
from cosmos_ray.errors import StoreError, StoreUnavailable
from cosmos_ray.replay.files.bucket import answers, open_bucket
from cosmos_ray.replay.files.durable import explained, make_directory, replace
from cosmos_ray.uri import below

logger = logging.getLogger(__name__)

POINTER = "files.json"  #: of a checkpoint in the bucket
RECORDS = ".published"
LEFT_OUT = ("replay", "latents", "wandb")  #: the store has its own objects; the others can be made again, or lie elsewhere
BY_ACTORS = ("learner",)  #: fetched and published by the processes that read and write it, not by the driver
LARGE = 8 << 20  #: bytes of what is put at once, from memory, and as often as it changes
TRIES = 5  #: to fetch a checkpoint while others replace it


class Part(NamedTuple):
    """A file, or a whole checkpoint, of a copy."""

    path: str  #: relative to the run
    whole: bool  #: a checkpoint
    signature: list[list[Any]]  #: [name, size, time of the last change in ns] of its files

    @property
    def changed(self) -> int:
        return max((int(file[2]) for file in self.signature), default=0)


class WorkingCopy:
    """The copy in ``local`` of the run at ``uri``. Errors are StoreErrors; StoreUnavailable where trying again may help."""

    def __init__(self, uri: str, local: Path):
        self.name, self.local = uri.partition("?")[0], local
        self.client = open_bucket(uri)
        self._gone: set[str] = set()

    def exists(self, path: str) -> bool:
        """Whether the bucket has the file ``path``."""
        with explained("look into", self.name):
            return self._head(path) is not None

    def publish(self, path: str = "", rest_s: float = 0.0, settled: bool = False) -> None:
        """Put what changed in the file, checkpoint or folder ``path``, "" for all but learner states, since it was published or fetched.

        Leaves out what is large and was put within the last ``rest_s`` seconds: metrics that grow. What is gone here goes there too, once
        two calls have missed it: a checkpoint that is being replaced is gone for an instant. ``settled``: nobody
        writes any more, and what is gone goes at once.
        """
        with explained("publish the run to", self.name):
            parts = sorted(self._parts(path), key=lambda part: part.changed)
            for part in parts:
                known = self._record(part.path)
                if known.get("signature") == part.signature:
                    continue
                if sum(file[1] for file in part.signature) > LARGE and time.time() - known.get("put", 0.0) < rest_s:
                    continue
                try:
                    state = self._put_whole(part) if part.whole else self._put(part.path, self.local / part.path)
                except FileNotFoundError:
                    continue  # replaced or removed meanwhile: the next call sees what came of it
                self._remember(part.path, state, part.signature)
            gone = {name for name in self._recorded(path) if not (self.local / name).exists()}
            for lost in gone if settled else gone & self._gone:
                self._remove(lost)
            self._gone = (self._gone | gone) if path else gone

    def fetch(self, path: str = "") -> None:
        """Bring what differs in the bucket since it was published or fetched, below ``path``, or of all but learner states."""
        with explained("fetch the run from", self.name), self._alone():
            listed = {name: state for name, state in self._listed(path).items() if _plain(name)}
            wholes = {name.removesuffix(f"/{POINTER}") for name in listed if name.endswith(f"/{POINTER}")}
            for name, state in listed.items():
                folder = name.removesuffix(f"/{POINTER}")
                if folder in wholes and folder != name:
                    if self._record(folder).get("state") != state or not (self.local / folder).is_dir():
                        self._fetch_whole(folder)
                elif not any(name.startswith(f"{whole}/") for whole in wholes):
                    if self._record(name).get("state") != state or not (self.local / name).exists():
                        self._get(name, self.local / name)
                        self._remember(name, state, [_signature(self.local / name)])

    def folders(self, path: str) -> set[str]:
        """Names of the folders in the folder ``path`` of the bucket."""
        with explained("look into", self.name), answers():
            listed = obstore.list_with_delimiter(self.client, prefix=f"{path}/")
        return {folder.rstrip("/").rpartition("/")[2] for folder in listed["common_prefixes"]}

    def remove(self, path: str) -> None:
        """Delete the folder ``path`` here and there."""
        shutil.rmtree(self.local / path, ignore_errors=True)
        with explained("delete in", self.name):
            self._remove(path)
            for known in self._recorded(path):
                (self.local / RECORDS / quote(known, safe="")).unlink(missing_ok=True)

    def forget(self) -> None:
        """Delete the copy: another machine has worked on the run since."""
        for part in self.local.iterdir():
            if part.name == ".lock":
                continue
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)
            else:
                part.unlink()

    # ---------------------------------------------------------------- what is here

    def _parts(self, path: str) -> Iterator[Part]:
        start = self.local / path
        if start.is_file():
            yield Part(path, False, [_signature(start)])
        elif start.is_dir():
            yield from self._walk(start, path)

    def _walk(self, folder: Path, path: str) -> Iterator[Part]:
        if path and (folder / "policy.json").exists():
            yield Part(path, True, [_signature(file) for file in sorted(folder.iterdir())])
            return
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith(".") or (not path and entry.name in LEFT_OUT + BY_ACTORS):
                continue
            inner = f"{path}/{entry.name}" if path else entry.name
            try:
                if entry.is_dir():
                    yield from self._walk(entry, inner)
                else:
                    yield Part(inner, False, [_signature(entry)])
            except FileNotFoundError:
                continue  # gone between listing and looking

    def _record(self, path: str) -> dict[str, Any]:
        try:
            held = json.loads((self.local / RECORDS / quote(path, safe="")).read_text())
            return held if isinstance(held, dict) else {}
        except (OSError, ValueError):
            return {}

    def _recorded(self, path: str) -> list[str]:
        folder = self.local / RECORDS
        names = [unquote(file.name) for file in folder.iterdir() if not file.name.startswith(".")] if folder.is_dir() else []
        return [name for name in names if not path or name == path or name.startswith(f"{path}/")]

    def _remember(self, path: str, state: str, signature: list[list[Any]]) -> None:
        make_directory(self.local / RECORDS)
        known = json.dumps({"state": state, "signature": signature, "put": time.time()})
        replace(known.encode(), self.local / RECORDS / quote(path, safe=""))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process of this machine fetches at a time; the others find everything there."""
        make_directory(self.local / RECORDS)
        with open(self.local / RECORDS / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    # ---------------------------------------------------------------- what is there

    def _listed(self, path: str) -> dict[str, str]:
        """name -> state of the objects below ``path``, or of all that the driver fetches."""
        if path:
            single = self._head(path)
            return {path: single} if single is not None else self._below(path)
        with answers():
            top = obstore.list_with_delimiter(self.client)
        listed = {meta["path"]: str(meta["e_tag"]) for meta in top["objects"]}
        for folder in top["common_prefixes"]:
            if folder.rstrip("/") not in LEFT_OUT + BY_ACTORS:
                listed |= self._below(folder.rstrip("/"))
        return listed

    def _below(self, path: str) -> dict[str, str]:
        with answers():
            return {meta["path"]: str(meta["e_tag"]) for page in obstore.list(self.client, prefix=path) for meta in page}

    def _head(self, path: str) -> str | None:
        try:
            with answers():
                return str(obstore.head(self.client, path)["e_tag"])
        except FileNotFoundError:
            return None

    def _put(self, path: str, file: Path) -> str:
        """Put ``file`` as the object ``path``; its new state."""
        content = file if file.stat().st_size > LARGE else file.read_bytes()  # read at once: it may grow
        with answers():
            return str(obstore.put(self.client, path, content)["e_tag"])

    def _get(self, path: str, target: Path) -> None:
        make_directory(target.parent)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with answers(), open(unfinished, "wb") as file:
                for chunk in obstore.get(self.client, path).stream(min_chunk_size=8 << 20):
                    file.write(chunk)
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)

    def _put_whole(self, part: Part) -> str:
        files = {name: [size, _checksum(self.local / part.path / name)] for name, size, _ in part.signature}
        digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
        for name in files:
            self._put(f"{part.path}/{digest}/{name}", self.local / part.path / name)
        with answers():
            told = json.dumps({"digest": digest, "files": files}).encode()
            state = str(obstore.put(self.client, f"{part.path}/{POINTER}", told)["e_tag"])
        self._delete([name for name in self._below(part.path) if not name.startswith(f"{part.path}/{digest}/")
                      and name != f"{part.path}/{POINTER}"])
        return state

    def _fetch_whole(self, path: str) -> None:
        target = self.local / path
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        for attempt in range(TRIES):
            shutil.rmtree(unfinished, ignore_errors=True)
            try:
                with answers():
                    got = obstore.get(self.client, f"{path}/{POINTER}")
                    state, told = str(got.meta["e_tag"]), json.loads(bytes(got.bytes()))
                for name, (size, checksum) in told["files"].items():
                    if not _plain(name):
                        raise StoreError(f"{self.name}/{path}/{POINTER} is damaged: it has a file {name!r}")
                    self._get(f"{path}/{told['digest']}/{name}", unfinished / name)
                    if (unfinished / name).stat().st_size != size or _checksum(unfinished / name) != checksum:
                        raise StoreError(f"{self.name}/{path}/{told['digest']}/{name} is damaged: bring it back from a copy of the run")
                break
            except FileNotFoundError:
                if attempt == TRIES - 1:  # else it was replaced meanwhile
                    raise
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
        self._remember(path, state, [_signature(file) for file in sorted(target.iterdir())])

    def _remove(self, path: str) -> None:
        self._delete([path, *self._below(path)])
        (self.local / RECORDS / quote(path, safe="")).unlink(missing_ok=True)

    def _delete(self, names: list[str]) -> None:
        with answers():
            for first in range(0, len(names), 1000):
                obstore.delete(self.client, names[first : first + 1000])


@functools.lru_cache(maxsize=8)
def _copy(uri: str, local: Path) -> WorkingCopy:
    return WorkingCopy(uri, local)


def fetched(path: str | Path) -> Path:
    """``path``, brought up to date first where it lies in a working copy of a run in a bucket (:func:`cosmos_ray.caches.local_root`).
    Where the bucket cannot be reached, the copy that is there has to do."""
    if held := _held(path):
        try:
            held[0].fetch(held[1])
        except StoreUnavailable as error:
            if not Path(path).exists():
                raise
            logger.warning("%s; going on with the copy that is there", error)
    return Path(path)


def published(path: str | Path) -> None:
    """Publish what this process wrote to ``path``, where that lies in a working copy of a run in a bucket."""
    if held := _held(path):
        held[0].publish(held[1])


def _held(path: str | Path) -> tuple[WorkingCopy, str] | None:
    """The working copy that ``path`` lies in, and the path in it."""
    parts, at = Path(path).parts, working_copy_at(path)
    if at is None:
        return None
    return _copy(below(unquote(parts[at]), parts[at + 1]), Path(*parts[: at + 2])), "/".join(parts[at + 2 :])


def _plain(name: str) -> bool:
    """Whether the name of an object is a path inside the copy, of files that are not hidden."""
    return all(part and not part.startswith(".") for part in name.split("/"))


def _signature(file: Path) -> list[Any]:
    status = file.stat()
    return [file.name, status.st_size, status.st_mtime_ns]


def _checksum(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
