"""The quarantine of damaged and foreign files: moved aside with a reason, never deleted."""

from __future__ import annotations

import json
import logging
import os
import time

from cosmos_ray.replay.files.durable import explained
from cosmos_ray.replay.files.storage import Storage

logger = logging.getLogger(__name__)

FOLDER = "quarantine"
LOG = f"{FOLDER}/log.jsonl"
LONGEST_NAME = 180  # bytes kept of a file's name: with the time before it, it must not exceed what file systems allow


class Quarantine:
    """``<root>/quarantine``: the moved files and ``log.jsonl``, one line per file.

    A line has ``time`` (Unix seconds), ``file`` (path relative to the store), ``reason`` and ``moved_to`` (name in the
    quarantine directory).
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def take(self, path: str, reason: str) -> bool:
        """Move the file ``path`` out of the store; False (with a warning) if it has to stay, as on a read-only file system."""
        where = self.storage.where(path)
        name = os.fsdecode(os.fsencode(path.rpartition("/")[2])[-LONGEST_NAME:])
        moved_to = f"{time.time_ns()}-{os.getpid()}-{name.lstrip('.')}"
        try:
            self.storage.move(path, f"{FOLDER}/{moved_to}")
        except FileNotFoundError:
            return True  # another process was faster and has logged it
        except OSError as error:
            logger.warning("ignoring %s (%s); it cannot be moved to quarantine: %s", where, reason, error)
            return False
        logger.warning("quarantined %s as %s: %s", where, moved_to, reason)
        line = json.dumps({"time": time.time(), "file": path, "reason": reason, "moved_to": moved_to})
        try:
            self.storage.append(LOG, line)
        except OSError as error:
            logger.warning("quarantine log %s cannot be written: %s", self.storage.where(LOG), error)
        return True

    def entries(self) -> list[dict]:
        """Every logged line, oldest first; lines torn by a crash are left out. StoreError if the log cannot be read."""
        entries = []
        with explained("read", self.storage.where(LOG)):
            lines = self.storage.lines(LOG)
        for line in lines:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if isinstance(entry, dict):
                entries.append(entry)
            else:
                logger.warning("skipping a torn line of %s", self.storage.where(LOG))
        return entries
