"""The folder of a run: what lies where, who may write, and which settings it was made with."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cosmos_ray.bucket_run import BucketRun
from cosmos_ray.caches import local_root
from cosmos_ray.config import RunConfig
from cosmos_ray.config.settings import SETTINGS, value_of
from cosmos_ray.config.stored import config_tree, read_object
from cosmos_ray.config.upgrade import BEFORE, is_before, read_config
from cosmos_ray.errors import ConfigError, RunInUse
from cosmos_ray.identity import RunIdentity
from cosmos_ray.replay.files.durable import append_line, replace
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.resume import RunManifest
from cosmos_ray.uri import below, is_uri

logger = logging.getLogger(__name__)


class RunFolder:
    """Paths of one run under ``root/name``; opening it takes the run's lock.

    Raises ConfigError when another process works in it, or when it was made with another simulator or model setting (such
    data cannot be mixed). With ``fresh`` an existing run is moved aside first, never deleted. ``check`` may refuse ``config`` before it
    becomes the run's. A folder that cannot be written opens for who ``only_reads``. Who reads ``beside`` another command leaves a folder on
    this machine as it is, and takes no lock.
    """

    def __init__(self, config: RunConfig, fresh: bool = False, create: bool = True, only_reads: bool = False, beside: bool = False,
                 check: Callable[[RunFolder], None] | None = None):
        self.path = local_root(config.root).resolve() / config.name  #: on this machine
        self.results = self.path  #: where the report goes
        self.uri = below(config.root, config.name) if is_uri(config.root) else ""  #: of a run in a bucket
        self._bucket: BucketRun | None = None
        if self.uri and fresh:
            raise ConfigError(f"--fresh cannot move a run in a bucket aside: give another --name than {config.name}")
        if not self.uri and not create and not (self.path / "config.json").exists():
            raise ConfigError(f"there is no run {config.name!r} in {self.path.parent}: run `collect` or `replay import` first, or "
                             "give --root and --name")
        self._elsewhere = config.replay.store
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot create the run folder {self.path}: {error.strerror}") from error
        self.writable = os.access(self.path, os.W_OK) and (not beside or bool(self.uri))
        if not self.writable and not only_reads:
            raise ConfigError(f"the run folder {self.path} cannot be written: mount it writable or copy the run; `replay`, `export` and "
                              "`report --to FOLDER` only read it")
        self._lock = self._take_lock() if self.writable else None
        try:
            if self.uri:
                self._bucket = BucketRun(self.uri, self.path, create)
            if fresh and (self.path / "config.json").exists():
                self._check_store_moves_too()
                self._move_aside()
            self.identity = self._identify()
            self._check_config(config)
            if check is not None:
                check(self)
            self._store_config(config)
            self.manifest = RunManifest(self.path, config)
        except BaseException:
            self.close()
            raise

    @property
    def replay(self) -> Path | str:
        """The replay store: a folder, or the URI of an object store."""
        if is_uri(self._elsewhere):
            return self._elsewhere
        if self._elsewhere:
            return Path(self._elsewhere).expanduser().resolve()
        return below(self.uri, "replay") if self.uri else self.path / "replay"

    @property
    def report(self) -> Path:
        return self.results / "report.html"

    def checkpoint(self, name: str) -> Path:
        """Policy checkpoint ``initial``, ``base`` or ``refined``."""
        return self.path / "checkpoints" / name

    def has_policy(self, name: str) -> bool:
        """Whether checkpoint ``name`` is there."""
        return (self.checkpoint(name) / "policy.json").exists()

    def learner_state(self, name: str) -> Path:
        """Resumable learner state of a training stage."""
        return self.path / "learner" / name

    def learner_states(self) -> set[str]:
        """Names of the learners that have states, on this machine or in the run's bucket."""
        here = self.path / "learner"
        names = {state.name for state in here.iterdir()} if here.is_dir() else set()
        return names | (self._bucket.learner_states() if self._bucket is not None else set())

    def remove_learner_state(self, name: str) -> None:
        """Delete the states of a learner: they are large, and no longer needed."""
        shutil.rmtree(self.learner_state(name), ignore_errors=True)
        if self._bucket is not None:
            self._bucket.remove(f"learner/{name}")

    @property
    def latents(self) -> Path:
        """The latent cache; may be deleted at any time."""
        return self.path / "latents"

    def shown(self, path: Path) -> str:
        """``path`` in the run as a user finds it: in the bucket, for a run that lies there."""
        inside = self.uri and path.is_relative_to(self.path)
        return f"{self.uri.partition('?')[0]}/{path.relative_to(self.path)}" if inside else str(path)

    def publish(self) -> None:
        """Let other machines see all that was written so far, now; they do so anyway a few seconds later. Nothing to do for a run in a
        folder. StoreError when the bucket cannot be written, or another process has taken the run over."""
        if self._bucket is not None:
            self._bucket.publish()

    def fetch(self, path: Path) -> None:
        """Bring what another machine wrote to ``path`` of the run. Nothing to do for a run in a folder."""
        if self._bucket is not None:
            self._bucket.fetch(str(path.relative_to(self.path)))

    def store(self) -> ReplayStore:
        """Open the replay store, with everything committed so far known."""
        store = ReplayStore(self.replay, create=self.writable)
        store.update()
        return store

    def record(self, stage: str, **values: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        if self._bucket is not None:
            self._bucket.check()
        row = json.dumps({"stage": stage, "time": round(time.time(), 2), **values})
        append_line(self.path / "metrics.jsonl", row)

    def metrics(self, *stages: str) -> list[dict]:
        """The recorded lines of one or several stages, oldest first; a line torn by a crash is left out."""
        out = []
        file = self.path / "metrics.jsonl"
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and row.get("stage") in stages:
                out.append(row)
        return out

    def write_json(self, name: str, data: Any) -> None:
        """Replace a JSON file of the run, whole or not at all."""
        replace(json.dumps(data, indent=1).encode(), self.path / name)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file of the run, or None when there is no such file. ConfigError when the file is damaged."""
        return read_object(self.path / name)

    def next_version(self) -> int:
        """A policy version that this run never used before and that is above its checkpoints', for they may come from another run; 1 for
        the first. Recorded before it is returned."""
        used = [_version(file) for places in ("", "rounds*/*/") for file in self.path.glob(f"checkpoints/{places}[!.]*/policy.json")]
        last = self.manifest.read().get("version")
        version = max([self._last_version() if last is None else last, *used]) + 1
        self.manifest.write(version=version)
        return version

    def write_results_to(self, folder: str | None) -> None:
        """Choose the folder of the report and of planned episodes, by default the run's own. ConfigError when it cannot be written."""
        if folder is not None:
            self.results = Path(folder).expanduser().resolve()
        try:
            self.results.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot create {self.results}: {error.strerror}") from error
        if not os.access(self.results, os.W_OK):
            raise ConfigError(f"{self.results} cannot be written: give --to FOLDER")

    def unmake(self) -> None:
        """Take back a new run in which nothing was made but an empty store, so that its settings bind nobody: with any other file, all of
        it stays."""
        made = (".lock", "config.json", "identity.json")
        store = self.path / "replay"
        if self._bucket is None and store.is_dir() and [part.name for part in store.iterdir()] == ["store.json"]:
            (store / "store.json").unlink()
            store.rmdir()
        if all(part.name in made or (self._bucket and part.name.startswith(".")) for part in self.path.iterdir()):
            for name in made:
                (self.path / name).unlink(missing_ok=True)
            if self._bucket is None:
                self.path.rmdir()

    def close(self) -> None:
        """Publish what is left of a run in a bucket, and give the lock back."""
        if self._bucket is not None:
            self._bucket.close()
        if self._lock is not None:
            self._lock.close()

    def _identify(self) -> RunIdentity:
        """The run's identity: the stored one, a new one, or for a run from before identities the one that its episodes carry."""
        file, before = self.path / "identity.json", self.read_json("config.json")
        try:
            stored = self.read_json(file.name)
            if stored is not None:
                return RunIdentity(**stored)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"{file} is damaged or of a newer version ({error}): without it the run's episodes cannot be told from "
                              "others; bring it back from a copy of the run, or give --fresh to move the run aside") from error
        if before is not None and not is_before(before):
            raise ConfigError(f"{file} is missing: without it the run's episodes cannot be told from others; bring it back from where the "
                              "run was copied from, or give --fresh to move the run aside")
        identity = RunIdentity(self.path.name) if before is None else RunIdentity.of_before(before)
        if self.writable:
            self.write_json(file.name, identity.to_json())
        return identity

    def _last_version(self) -> int:
        """The last version used, without a manifest: what an earlier version of this package noted, what was logged, what acted."""
        try:
            noted = (self.read_json("version.json") or {}).get("version")
        except ConfigError as error:
            logger.warning("%s; the last policy version is that of the metrics and the store", error)
            noted = 0
        own = self.identity.key
        known = [noted, *(row.get("version") for row in self.metrics("refine", "refine_episode")),
                 *(s.policy_version for s in self.store().summaries() if s.key.run == own)]
        return max([0, *(version for version in known if isinstance(version, int))])

    def _take_lock(self):
        lock = open(self.path / ".lock", "a+")  # noqa: SIM115 - held until close()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip() or "?"
            lock.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise ConfigError(f"the file system of {self.path} cannot lock files ({error.strerror}), so two commands could work on one "
                                  "run: mount it with locks (NFS without `nolock`, Lustre with `flock`), or give another --root") from error
            raise RunInUse(f"run {self.path} is in use by process {owner}: wait for it, or give another --name") from error
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}")
        lock.flush()
        os.fsync(lock.fileno())  # over NFS, other machines read it
        return lock

    def _check_store_moves_too(self) -> None:
        before = ((self.read_json("config.json") or {}).get("replay") or {}).get("store")
        if before and before == self._elsewhere:
            raise ConfigError(f"--fresh cannot move the replay store {before} aside, and the new run would go on "
                              "with its episodes: give another --replay.store")

    def _move_aside(self) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self._lock.close()
        self.path.rename(aside)
        self.path.mkdir()
        self._lock = self._take_lock()

    def _check_config(self, config: RunConfig) -> None:
        """Refuse other settings of simulator and model than the run was made with."""
        before = self.read_json("config.json")
        run = read_config(self.path / "config.json", before) if before else config
        for name in SETTINGS:
            if (name.startswith(("sim.", "model.")) and (theirs := value_of(run, name)) != (ours := value_of(config, name))
                    and not self._open_to_change(name)):
                raise ConfigError(f"run {self.path} was made with {name} = {theirs!r}, not {ours!r}: "
                                  "give another --name, or `collect --fresh` to move the run aside")

    def _store_config(self, config: RunConfig) -> None:
        """Write ``config``, where the folder can be written. A file that an earlier version wrote is kept as ``config.before.json``."""
        if not self.writable:
            return
        before = self.read_json("config.json")
        if before and is_before(before) and not (self.path / BEFORE).exists():
            unfinished = self.path / f".{BEFORE}.tmp"
            shutil.copy2(self.path / "config.json", unfinished)  # with its permissions: a store's URI held credentials then
            os.replace(unfinished, self.path / BEFORE)
        self.write_json("config.json", config_tree(config))

    def _open_to_change(self, name: str) -> bool:
        """Whether nothing was made with the run's value of a setting of simulator or model yet.

        A run of imported demonstrations has simulated nothing until it adds an episode of its own. The tokenizer acts when the first policy
        is made; text embeddings go into the checkpoint, which keeps them when more are added from elsewhere.
        """
        if name.startswith("sim."):
            summaries, own = self.store().summaries(), self.identity.key
            return bool(summaries) and not any(s.key.run == own or s.key.run.startswith(f"{own}:") for s in summaries)
        return name == "model.text_path" or (name == "model.tokenizer_path" and not self.checkpoint("initial").exists())


def _version(description: Path) -> int:
    """The version that a checkpoint's description names; 0 of one that cannot be read, which nobody acts with or trains from."""
    try:
        return int(json.loads(description.read_text())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
