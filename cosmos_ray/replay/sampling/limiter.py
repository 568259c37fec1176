"""Keeps the learner and the collectors at a fixed ratio of work, in either direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cosmos_ray.errors import ConfigError
from cosmos_ray.replay.store import ReplayStore


@dataclass
class SamplesPerInsert:
    """Two predicates on two counters, after Reverb's SampleToInsertRatio.

    Units: ``inserted`` counts control steps added to the store, ``sampled`` counts windows drawn from it. With
    ``owed = samples_per_insert * (inserted - min_inserts) - sampled``, measured in windows,

    * sampling ``n`` windows is allowed once ``inserted >= min_inserts`` and while ``owed - n >= -error_buffer``;
    * inserting ``n`` steps is allowed while ``inserted < min_inserts``, and then while
      ``owed + n * samples_per_insert <= error_buffer``.

    It blocks nothing itself: ask, act, then count. If ``2 * error_buffer`` is at least one batch of windows plus
    ``samples_per_insert`` times one episode of steps, one of the two sides may always proceed; see :meth:`check`.
    ``float("inf")`` as ``error_buffer`` leaves only the ``min_inserts`` gate.
    """

    samples_per_insert: float
    min_inserts: int
    error_buffer: float
    inserted: int = 0
    sampled: int = 0

    def __post_init__(self) -> None:
        ratio = self.samples_per_insert
        if ratio <= 0 or self.min_inserts < 1 or self.error_buffer < max(1.0, ratio):
            raise ConfigError(
                f"samples_per_insert {ratio} must be positive, min_inserts {self.min_inserts} at least 1 and "
                f"error_buffer {self.error_buffer} at least max(1, samples_per_insert)"
            )

    def check(self, batch: int, episode: int) -> None:
        """ConfigError if drawing ``batch`` windows and inserting ``episode`` steps at a time can block both sides."""
        need = (batch + self.samples_per_insert * episode) / 2
        if self.error_buffer < need:
            raise ConfigError(
                f"error_buffer {self.error_buffer} can stop learner and collectors at once: use at least {need:g} for "
                f"batches of {batch} windows and episodes of {episode} steps"
            )

    @property
    def owed(self) -> float:
        """Windows the learner is behind (positive) or ahead (negative) of the target ratio."""
        return self.samples_per_insert * (self.inserted - self.min_inserts) - self.sampled

    def can_sample(self, windows: int) -> bool:
        """Whether drawing ``windows`` keeps the learner within the buffer."""
        return self.inserted >= self.min_inserts and self.owed - windows >= -self.error_buffer

    def can_insert(self, steps: int) -> bool:
        """Whether adding ``steps`` control steps keeps the collectors within the buffer."""
        return self.inserted < self.min_inserts or self.owed + steps * self.samples_per_insert <= self.error_buffer

    def count_sample(self, windows: int) -> None:
        """Record that ``windows`` were drawn."""
        self.sampled += windows

    def count_insert(self, steps: int) -> None:
        """Record that ``steps`` control steps were added."""
        self.inserted += steps

    def state_dict(self) -> dict[str, int]:
        """The counters; settings stay with the configuration."""
        return {"inserted": self.inserted, "sampled": self.sampled}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the counters of :meth:`state_dict`."""
        self.inserted = int(state["inserted"])
        self.sampled = int(state["sampled"])


def steps_stored(store: ReplayStore, names: list[str]) -> int:
    """Control steps of the named episodes that were ever committed, evicted ones included."""
    rows = [(store.index.row(name), store.evicted(name)) for name in names]
    return sum(int(store.index["length"][row]) if row is not None else gone["length"] if gone else 0 for row, gone in rows)


def resume_counters(before: Mapping[str, Any] | None, stored: int, step: int, batch: int) -> dict[str, int]:
    """The limiter's account of a refinement that goes on at learner ``step`` with ``stored`` control steps in the store.

    What survives a crash are the store and the learner's states, not what the driver counted: an episode may have been committed unseen,
    steps may have been lost. So ``inserted`` and ``sampled`` follow from these two and from the account ``before``, that of the state or
    of an earlier one; None begins a new account. ``batch`` is the number of windows a step draws from now on.
    """
    known = {"inserted": 0, "sampled": 0, "stored": stored, "step": step, "batch": batch}
    if before is not None:
        known["inserted"] = max(0, before["inserted"] + stored - before["stored"])
        known["sampled"] = before["sampled"] + (step - before["step"]) * before["batch"]
    return known
