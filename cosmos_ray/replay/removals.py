"""What was taken out of a store, and why: episodes that were evicted, and damaged ones inside of packs.

The key of an evicted episode stays taken: it was collected once, and a retried commit or a resumed collection must not bring
it back. The key of a damaged one is free again. Each call of :meth:`Removals.add` writes one file ``removed/<time>-...jsonl``,
whole or not at all, before anything is deleted.
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
EVICTED, DAMAGED = "evicted", "damaged"


class Removals:
    """The records of ``<root>/removed``."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.evicted: dict[str, dict] = {}  # name -> what the record says of the episode
        self.damaged: set[tuple[str, str]] = set()  # pack, name
        self._read: set[str] = set()

    def add(self, summaries: Iterable[EpisodeSummary], kind: str, reason: str, pack: str = "") -> None:
        """Record, durably, that ``summaries`` are gone. OSError, and nothing recorded, where that cannot be written."""
        records = [
            {"name": s.name, "kind": kind, "reason": reason, "time": time.time(), "pack": pack, "success": s.success, "length": s.length,
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
        """Read the files of a listing that were not read before; their records. Lines that are none are left out, with a warning."""
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
        for record in records:
            if record["kind"] == EVICTED:
                self.evicted[record["name"]] = record
            else:
                self.damaged.add((record["pack"], record["name"]))


def read_records(data: bytes) -> tuple[list[dict], int]:
    """The records in a file of removals, and how many of its lines are none."""
    lines = data.decode(errors="replace").split("\n")
    records = [record for line in lines[:-1] if (record := _record(line)) is not None]
    return records, len(lines) - 1 - len(records) + bool(lines[-1])


_FIELDS = {"name": str, "kind": str, "pack": str, "success": bool, "length": int, "invalid": str, "policy_version": int}


def _record(line: str) -> dict | None:
    try:
        record = json.loads(line)
        whole = all(type(record[name]) is kind for name, kind in _FIELDS.items()) and record["kind"] in (EVICTED, DAMAGED)
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return record if whole else None
