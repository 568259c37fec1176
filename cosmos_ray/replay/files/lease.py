"""The lock of a run in a bucket: an object that one process creates, renews, and gives back.

A holder that stops renewing, because it was killed or lost its network, loses the lease after :data:`LEASE_S`. Nobody compares clocks: who
wants the lease watches whether the object changes.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from typing import Any

import obstore
import psutil
from obstore.exceptions import AlreadyExistsError, PreconditionError

from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.replay.files.bucket import answers, open_bucket
from cosmos_ray.replay.files.durable import explained

logger = logging.getLogger(__name__)

FILE = ".lease"  #: in the bucket; hidden, so that it is no file of the run
LEASE_S = 30.0  #: without a renewal after which a lease may be taken over
RENEW_S = 8.0  #: between two renewals
LOOK_S = 2.0  #: between two looks at a lease that another process holds


class Lease:
    """The lease of the run at ``uri``."""

    def __init__(self, uri: str):
        self.name, self.client = uri.partition("?")[0], open_bucket(uri)
        self.token = secrets.token_hex(8)
        self.taken_by = ""  #: who took the lease over from this process
        self._version: Any = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> str:
        """Take the lease and keep it until :meth:`give_back`; the token of the holder before, "" if there was none.

        ConfigError when another process renews it. A lease that nobody renews is taken over, which is said: at once when its holder was a
        process of this machine that is gone, else after :data:`LEASE_S`.
        """
        with explained("lock", self.name):
            before = self._take()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()
        return before

    def give_back(self, forget: bool = False) -> None:
        """Let others take the lease; with ``forget`` as if there never was one."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.taken_by:
            return
        with explained("unlock", self.name):
            try:
                if forget:
                    with answers():
                        obstore.delete(self.client, FILE)
                else:
                    self._put(self._version, free=True)
            except PreconditionError:
                pass  # taken over: it is no longer ours to give

    def _take(self) -> str:
        watched, since, said = None, 0.0, False
        while True:
            found = self._look()
            if found is None:
                try:
                    self._put(None)
                    return ""
                except AlreadyExistsError:
                    continue
            version, held = found
            free, owner = bool(held.get("free")), f"process {held.get('pid', '?')} on {held.get('host', '?')}"
            if watched is not None and version != watched and not free:
                raise ConfigError(f"run {self.name} is in use by {owner}: wait for it, or give another --name")
            if watched is None:
                watched, since = version, time.monotonic()
            if free or _gone(held) or time.monotonic() - since > LEASE_S:
                try:
                    self._put(version)
                except PreconditionError:
                    continue  # somebody was faster, or it was renewed just now
                if not free:
                    logger.warning("run %s is taken over from %s, which is gone without closing it", self.name, owner)
                return str(held.get("token", ""))
            if not said:
                logger.warning("run %s: %s holds it; waiting up to %.0f s for a sign of life", self.name, owner, LEASE_S)
                said = True
            time.sleep(LOOK_S)

    def _look(self) -> tuple[Any, dict[str, Any]] | None:
        """(version, content) of the lease object, None when there is none."""
        try:
            with answers():
                got = obstore.get(self.client, FILE)
                version = _version(got.meta)
                content = json.loads(bytes(got.bytes()))
        except FileNotFoundError:
            return None
        except ValueError:
            content = {}
        return version, content if isinstance(content, dict) else {}

    def _put(self, version: Any, free: bool = False) -> None:
        """Write the lease where it is at ``version``, None for a new one. PreconditionError or AlreadyExistsError when it is not."""
        me = {"token": self.token, "host": socket.gethostname(), "pid": os.getpid(), "begun": psutil.Process().create_time(),
              "processes": _processes(), "free": free, "renewal": secrets.token_hex(4)}  # the last changes the object's state
        with answers():
            try:
                done = obstore.put(self.client, FILE, json.dumps(me).encode(), mode=version or "create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError) as error:
                refused = error
            else:
                self._version = _version(done)
                return
        raise refused

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                self._put(self._version)
            except PreconditionError:
                found = self._look()
                if found is not None and found[1].get("token") == self.token:
                    self._version = found[0]  # our own renewal, whose answer was lost
                    continue
                held = found[1] if found is not None else {}
                self.taken_by = f"process {held.get('pid', '?')} on {held.get('host', '?')}"
                return
            except (OSError, StoreError) as error:
                logger.warning("the lock of run %s cannot be renewed: %s", self.name, error)


def _version(told: Any) -> dict[str, str]:
    """What a later write names the state of an object by: servers tell its ETag, or a version, or both."""
    return {name: told[name] for name in ("e_tag", "version") if told[name] is not None}


def _processes() -> str:
    """What tells the process ids of this container from those of another on the same host."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _gone(held: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that runs no more."""
    if (held.get("host"), held.get("processes")) != (socket.gethostname(), _processes()) or not isinstance(held.get("pid"), int):
        return False
    try:
        return abs(psutil.Process(held["pid"]).create_time() - float(held.get("begun", 0.0))) > 1.0
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, TypeError, ValueError):
        return False
