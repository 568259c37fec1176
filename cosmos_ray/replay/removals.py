"""The record of the episodes that were evicted from a store.

The key of an evicted episode stays taken, so that neither a retried commit nor a resumed collection brings the episode back.
Each call of :meth:`Removals.add` writes one file ``removed/<time>-...jsonl``, whole or not at all, before anything is deleted.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Iterable

from cosmos_ray.replay.files.storage import Listing, Storage
from cosmos_ray.replay.format.episode import EpisodeSummary

logger = logging.getLogger(__name__)

FOLDER = "removed"


class Removals:
    """The records of ``<root>/removed``."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.evicted: dict[str, dict] = {}  # name -> what the record says of the episode
        self._read: set[str] = set()

    def add(self, summaries: Iterable[EpisodeSummary], reason: str) -> None:
        """Record, durably, that ``summaries`` are evicted. OSError, and nothing recorded, where that cannot be written."""
        records = [
            {"name": s.name, "kind": "evicted", "reason": reason, "time": time.time(), "success": s.success, "length": s.length,
             "invalid": s.invalid, "policy_version": s.policy_version, "source": s.source}
            for s in summaries
        ]  # fmt: skip
        if not records:
            return
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        name = f"{time.time_ns()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self.storage.publish(f"{FOLDER}/{name}", lambda file: file.write(data))
        self._read.add(name)
        self._take(records)

    def take_in(self, listing: Listing) -> list[dict]:
        """Read the files of a listing that were not read before; their records. A damaged line is left out, with a warning."""
        records = []
        for name in sorted(set(listing.files) - self._read):
            path = f"{listing.folder}/{name}"
            try:
                fresh, damaged = read_records(self.storage.read(path))
            except FileNotFoundError:
                continue
            if damaged:
                logger.warning("ignoring %d lines of %s that do not say what was removed", damaged, self.storage.where(path))
            self._take(fresh)
            self._read.add(name)
            records += fresh
        return records

    def _take(self, records: list[dict]) -> None:
        self.evicted.update((record["name"], record) for record in records)


def read_records(data: bytes) -> tuple[list[dict], int]:
    """The records in a file of removals, and how many of its lines are none."""
    lines = data.decode(errors="replace").split("\n")
    records = [record for line in lines[:-1] if (record := _record(line)) is not None]
    return records, len(lines) - 1 - len(records) + bool(lines[-1])


_FIELDS = {"name": str, "kind": str, "success": bool, "length": int, "invalid": str, "policy_version": int}


def _record(line: str) -> dict | None:
    try:
        record = json.loads(line)
        whole = all(type(record[name]) is of for name, of in _FIELDS.items()) and record["kind"] == "evicted"
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return record if whole else None
