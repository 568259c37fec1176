"""A run whose root is a bucket: the lease, the working copy on this machine, and the thread that publishes what changes."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

from cosmos_ray.caches import local_root
from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.replay.files.durable import make_directory, replace
from cosmos_ray.replay.files.lease import Lease
from cosmos_ray.replay.files.working_copy import WorkingCopy
from cosmos_ray.supervision import Supervisor
from cosmos_ray.uri import below, is_uri, uri_problem

logger = logging.getLogger(__name__)

PUBLISH_S = 5.0  #: between two looks for what changed in the working copy
REST_S = 60.0  #: between two times that a large file is published
TOKEN = ".token"  #: in the copy: the lease under which the copy was last worked with, and of those who tried to since


def fetch_settings(root: str, name: str) -> None:
    """Have the working copy know the present ``config.json`` of run ``name``, where ``root`` is a bucket. Takes no lock."""
    if problem := uri_problem(root):
        raise ConfigError(f"root: {problem}")
    if is_uri(root):
        local = local_root(root) / name
        copy = WorkingCopy(below(root, name), local)
        if copy.exists("config.json"):
            copy.fetch("config.json")
        else:
            (local / "config.json").unlink(missing_ok=True)


class BucketRun:
    """The run at ``uri`` with its working copy in ``local``. ConfigError when another process works with the run, or when there is none
    and ``create`` is off.

    What was last worked with on this machine, and on no other since, goes on from the copy, which may be ahead of the bucket. Else the
    copy is deleted and fetched anew: the bucket counts.
    """

    def __init__(self, uri: str, local: Path, create: bool):
        self.copy, self._lease, self._local = WorkingCopy(uri, local), Lease(uri), local
        self._found = self.copy.exists("config.json")
        if not self._found and not create:
            raise ConfigError(f"there is no run {self.copy.name}: run `collect` or `replay import` first, or give --root and --name")
        token = local / TOKEN
        held = token.read_text().split() if token.exists() else []
        if held:  # the copy stays this machine's, should this process be killed as soon as it has the lease
            replace(" ".join([*held, self._lease.token]).encode(), token)
        before = self._lease.take()
        try:
            if before not in held:
                token.unlink(missing_ok=True)  # first: what is left of a copy that is being deleted counts no more
                self.copy.forget()
            self.copy.fetch()
            make_directory(local)
            replace(self._lease.token.encode(), token)
        except BaseException:
            self._lease.give_back(forget=not self._found)
            raise
        self._stop, self._busy = threading.Event(), threading.Lock()
        self._supervisor = Supervisor()
        self._thread = threading.Thread(target=self._publish_on, daemon=True, name="publisher")
        self._thread.start()

    def check(self) -> None:
        """StoreError when another process has taken the run over."""
        if self._lease.taken_by:
            raise StoreError(f"run {self.copy.name} was taken over by {self._lease.taken_by}, because this process could not renew its "
                             "lock: what this process did since stays in its working copy only")

    def publish(self) -> None:
        """Publish all that changed, now: other machines will read it."""
        self.check()
        with self._busy:
            self.copy.publish()

    def fetch(self, path: str) -> None:
        """Bring what another process wrote to ``path`` of the run."""
        self.copy.fetch(path)

    def learner_states(self) -> set[str]:
        """Names of the learners whose states the bucket has."""
        return self.copy.folders("learner")

    def remove(self, path: str) -> None:
        """Delete the folder ``path`` of the run."""
        self.copy.remove(path)

    def close(self) -> None:
        """Publish what is left, and give the lease back. What cannot be published is kept, and the next command on this machine publishes
        it."""
        self._stop.set()
        self._thread.join()
        empty = not any(not part.name.startswith(".") for part in self._local.iterdir())
        try:
            if not self._lease.taken_by:
                self.copy.publish(settled=True)
            self._lease.give_back(forget=empty)
            if empty:
                shutil.rmtree(self._local)
        except StoreError as error:
            logger.warning("%s; the last changes are kept in %s: the next command on this machine publishes them", error, self._local)

    def _publish_on(self) -> None:
        while not self._stop.wait(PUBLISH_S):
            if self._lease.taken_by:
                return
            try:
                with self._busy:
                    self.copy.publish(rest_s=REST_S)
                self._supervisor.goes_on("the run")
            except StoreError as error:
                self._supervisor.waits("the run", f"its bucket ({error}); work goes on in {self._local}")
