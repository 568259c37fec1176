"""Initial states that broke every simulator they ran in: kept in the run's folder, with the reason, and not handed out again."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cosmos_ray.folder import RunFolder
from cosmos_ray.replay.files.durable import append_line
from cosmos_ray.replay.format.episode import EpisodeKey

logger = logging.getLogger(__name__)

FILE = "quarantined.jsonl"


@dataclass(frozen=True)
class Quarantined:
    """An initial state, and the first episode of it that could not be run."""

    name: str  #: of the episode
    task: str
    seed: int
    reason: str


class Quarantine:
    """The quarantined initial states of a run, one line of JSON each. Whoever deletes a line has its state tried again."""

    def __init__(self, folder: RunFolder):
        self.path: Path = folder.path / FILE
        self.entries = _read(self.path)

    def __contains__(self, key: EpisodeKey) -> bool:
        """Whether the initial state of an episode is quarantined."""
        return any((entry.task, entry.seed) == (key.task, key.seed) for entry in self.entries)

    def take(self, found: Mapping[str, str], keys: Iterable[EpisodeKey]) -> None:
        """Add what a fleet gave up: ``found`` has the reason by the name of an episode, which is one of ``keys``."""
        known = {entry.name for entry in self.entries}
        for key in keys if len(found) else ():
            if key.name in found and key.name not in known:
                entry = Quarantined(key.name, key.task, key.seed, found[key.name])
                append_line(self.path, json.dumps(asdict(entry)))
                self.entries.append(entry)
                logger.warning("initial state %d of %s is quarantined, and %s names it: %s", key.seed, key.task, self.path, entry.reason)


def _read(path: Path) -> list[Quarantined]:
    """The entries of the file; a line torn by a crash is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            entries.append(Quarantined(str(row["name"]), str(row["task"]), int(row["seed"]), str(row["reason"])))
        except (ValueError, KeyError, TypeError):
            continue
    return entries
