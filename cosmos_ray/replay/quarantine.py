"""Where files go that cannot be trained on: moved aside with a reason, never deleted."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

from cosmos_ray.replay.files import make_directory

logger = logging.getLogger(__name__)


class Quarantine:
    """``<root>/quarantine``: the moved files and ``log.jsonl``, one line per file.

    A line has ``time`` (Unix seconds), ``file`` (path relative to the store), ``reason`` and ``moved_to`` (name in the
    quarantine directory).
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "quarantine"

    def take(self, file: Path, reason: str) -> bool:
        """Move ``file`` out of the store; False (with a warning) if it has to stay, as on a read-only file system."""
        moved_to = f"{time.time_ns()}-{os.getpid()}-{file.name.lstrip('.')}"
        try:
            make_directory(self.path)
            os.rename(file, self.path / moved_to)
        except FileNotFoundError:
            return True  # another process was faster and has logged it
        except OSError as error:
            logger.warning("ignoring %s (%s); it cannot be moved to quarantine: %s", file, reason, error)
            return False
        logger.warning("quarantined %s as %s: %s", file, moved_to, reason)
        line = {
            "time": time.time(),
            "file": str(file.relative_to(self.root)),
            "reason": reason,
            "moved_to": moved_to,
        }
        self._append(json.dumps(line) + "\n")
        return True

    def entries(self) -> list[dict]:
        """Every logged line, oldest first; lines torn by a crash are left out."""
        log = self.path / "log.jsonl"
        if not log.exists():
            return []
        entries = []
        for line in log.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                logger.warning("skipping a torn line of %s", log)
        return entries

    def _append(self, line: str) -> None:
        try:
            # One write to a file opened for appending: lines of several processes do not mix.
            handle = os.open(self.path / "log.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)
        except OSError as error:
            logger.warning("quarantine log %s cannot be written: %s", self.path / "log.jsonl", error)
