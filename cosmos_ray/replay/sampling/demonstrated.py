"""What the demonstrations of a store are of: the robot, and what it was told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cosmos_ray.embodiment import Embodiment
from cosmos_ray.errors import StoreError
from cosmos_ray.replay.format.episode import TRAINED
from cosmos_ray.replay.format.schema import DamagedEpisode, NewerSchema
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.store import ReplayStore


@dataclass(frozen=True)
class Demonstrated:
    """What the demonstrations of a store have in common, and what the robot is told in all episodes that are trained on."""

    embodiment: Embodiment  #: of every demonstration
    instructions: dict[str, int]  #: {instruction: episodes that have it}, sorted


def demonstrated(store: ReplayStore, progress: Callable[[int, int], None] | None = None) -> Demonstrated:
    """Read the headers of all known episodes that are trained on. Call ``store.update()`` first.

    Raises:
        StoreError: there is no demonstration, or two differ in cameras, dimensions, rate or render quality; the message names both.
    """
    first: EpisodeView | None = None
    rate, quality = 0.0, ""
    instructions: Counter[str] = Counter()
    for view in _views(store, progress):
        instructions.update(view.instructions)
        if view.summary.source != "demo":
            continue
        first = first or view
        rate, quality = rate or view.embodiment.control_freq, quality or view.embodiment.quality
        for what, ours, theirs in replace(first.embodiment, control_freq=rate, quality=quality).misfit(view.embodiment):
            raise StoreError(f"{store.root}: episode {first.summary.name} has {ours} {what}, {view.summary.name} has {theirs}: the "
                             "demonstrations of a store must be of one robot and one render quality; put the others into another store")
    if first is None:
        raise StoreError(f"{store.root} holds no demonstration: run `collect` first, or `replay import` a file of demonstrations")
    return Demonstrated(replace(first.embodiment, control_freq=rate, quality=quality), dict(sorted(instructions.items())))


def _views(store: ReplayStore, progress: Callable[[int, int], None] | None) -> Iterator[EpisodeView]:
    """The episodes that are trained on, oldest first. Passes over what is gone or of a newer schema, and discards what is damaged."""
    summaries = sorted((s for s in store.summaries() if s.episode_class in TRAINED), key=lambda s: (s.created, s.name))
    for number, summary in enumerate(summaries):
        try:
            yield store.view(summary.name)
        except (FileNotFoundError, NewerSchema):
            continue
        except DamagedEpisode as error:
            store.discard(summary.name, str(error))
        finally:
            if progress:
                progress(number + 1, len(summaries))
