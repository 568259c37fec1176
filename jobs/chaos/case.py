"""One corruption of a store, and the table of the faults there are.

A fault is a function of a :class:`Case`; its docstring says what it does. It damages the file ``case.path`` unless it sets
``case.foreign`` or ``case.about``. Checksums are valid wherever a hostile writer could make them so.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from jobs.chaos.episode_file import EpisodeFile


@dataclass
class Case:
    """One corruption: a copy of the healthy store, the file to damage, and what has to come of it."""

    rng: random.Random
    root: Path
    path: Path
    about: str = "episode"  # "episode": it is named or reads the same; "cache": no episode may suffer; "marker": refused or works
    foreign: list[str] = field(default_factory=list)  # names of files that were added and must be reported
    valid: str = ""  # a field of the episode that is well-formed as stored, so that only who decodes it can tell
    log_counts: bool = False  # where nothing can be moved, a logged warning is the report

    def file(self) -> EpisodeFile:
        return EpisodeFile(self.path)


FAULTS: dict[str, Callable[[Case], None]] = {}


def fault(work: Callable[[Case], None]) -> Callable[[Case], None]:
    FAULTS[work.__name__] = work
    return work
