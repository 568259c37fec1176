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

from cosmos_ray.replay.episode import EpisodeSummary
from cosmos_ray.replay.storage import Listing, Storage

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
        """Read the files of a listing that were not read before; their records."""
        records = []
        for name in sorted(set(listing.files) - self._read):
            path = f"{listing.folder}/{name}"
            try:
                fresh = [json.loads(line) for line in self.storage.read(path).decode().splitlines()]
                self._take(fresh)
                records += fresh
            except FileNotFoundError:
                continue
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                logger.warning("ignoring %s, it does not list removed episodes: %s", self.storage.where(path), error)
            self._read.add(name)
        return records

    def _take(self, records: list[dict]) -> None:
        for record in records:
            if record["kind"] == EVICTED:
                self.evicted[record["name"]] = record
            else:
                self.damaged.add((record["pack"], record["name"]))
