"""Policies for the episodes that a store keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.format.episode import CLASSES, EpisodeClass, EpisodeSummary
from cosmos_ray.replay.store import ReplayStore


@dataclass(frozen=True)
class Retention:
    """A policy. Episodes of the classes in ``keep`` stay for ever. Any other episode goes if one of these bounds holds:

    * it is not among the ``newest`` of these others by time of commit,
    * its policy version is more than ``max_staleness`` behind the newest rollout's (demonstrations have no version),
    * it does not fit into ``max_bytes`` together with the episodes kept for ever and the newer ones that stay.

    None sets no such bound. StoreError for unknown classes, impossible numbers and a policy without any bound.
    """

    keep: tuple[EpisodeClass, ...] = ("demo", "evaluation")
    newest: int | None = None
    max_staleness: int | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        unknown = set(self.keep) - set(CLASSES)
        if unknown:
            raise StoreError(f"cannot keep {', '.join(sorted(unknown))}: classes of episodes are {', '.join(CLASSES)}")
        bounds = (self.newest, self.max_staleness, self.max_bytes)
        if all(bound is None for bound in bounds):
            raise StoreError("a retention policy needs a bound: the newest M (--newest), a maximum staleness (--max-staleness) or a size "
                             "(--max-gb)")
        if any(bound is not None and bound < 0 for bound in bounds):
            raise StoreError(f"the bounds of a retention policy must not be negative: {bounds}")

    def expired(self, summaries: Iterable[EpisodeSummary]) -> list[str]:
        """Names of the episodes that do not stay, oldest first."""
        episodes = list(summaries)
        used = sum(s.size for s in episodes if s.episode_class in self.keep)
        rest = sorted((s for s in episodes if s.episode_class not in self.keep), key=lambda s: (s.created, s.name), reverse=True)
        latest = max((s.policy_version for s in episodes if s.source == "rollout"), default=-1)
        out = []
        for rank, summary in enumerate(rest):
            versioned = summary.source != "demo"
            stale = versioned and self.max_staleness is not None and summary.policy_version < latest - self.max_staleness
            beyond = self.newest is not None and rank >= self.newest
            too_much = self.max_bytes is not None and used + summary.size > self.max_bytes
            if stale or beyond or too_much:
                out.append(summary.name)
            else:
                used += summary.size
        return out[::-1]


def keep_newest(store: ReplayStore, rollouts: Iterable[EpisodeSummary], newest: int, keep_failures: bool) -> int:
    """Evict the ``rollouts`` that are not among the ``newest`` by time of commit, with ``keep_failures`` no failure; returns how many.

    StoreError if the store cannot be written.
    """
    older = sorted(rollouts, key=lambda s: (s.created, s.name), reverse=True)[newest:]
    names = [s.name for s in reversed(older) if not (keep_failures and s.episode_class == "failure")]
    return store.evict(names, f"retention: the newest {newest}{' and all failures' * keep_failures} stay")
