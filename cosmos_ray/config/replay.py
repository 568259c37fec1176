"""Settings of the replay store."""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_ray.config.option import option
from cosmos_ray.errors import ConfigError
from cosmos_ray.uri import uri_problem


@dataclass(frozen=True)
class ReplayConfig:
    """Where episodes are stored and how they become training samples."""

    store: str = option("", "the replay store, a folder or an s3:// or gs:// URI; empty = `replay` in the run")
    gamma: float = option(0.98, "discount of the Monte-Carlo return per control step", low=0.5, high=1.0)
    success_share: float = option(0.5, "share of successful episodes among rollout samples", low=0, high=1)
    rollout_frame_stride: int = option(4, "steps between stored frames, 0 = chunk ends only; frames at the ends of a rollout's chunks are "
                                       "always stored", low=0)
    patience_s: float = option(120.0, "seconds a worker waits for a store it cannot write; it keeps finished episodes in memory and tries "
                               "again", low=0, high=86400, rare=True)
    keep_newest: int = option(0, "rollouts of the run to keep, 0 = all; the run deletes older ones after each collection", low=0)
    keep_failures: bool = option(True, "keep all failed rollouts too; acts with keep_newest", rare=True)
    samples_per_insert: float = option(0.0, "windows per collected step, 0 = end together; `refine` trains on so many windows per "
                                       "collected control step, or at the ratio with which training and collecting end together",
                                       low=0, rare=True)

    def check(self) -> None:
        """Raise :class:`ConfigError` for a store that is neither a folder nor an object store."""
        if problem := uri_problem(self.store):
            raise ConfigError(f"replay.store: {problem}")
