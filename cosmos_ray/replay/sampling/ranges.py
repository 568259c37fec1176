"""Ranges of actions, labels and proprioception in a store, for normalisation to [-1, 1]."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.format.episode import TRAINED
from cosmos_ray.replay.format.schema import DamagedEpisode
from cosmos_ray.replay.store import ReplayStore


@dataclass(frozen=True)
class DatasetStatistics:
    """Per-dimension minimum and maximum, float32, with ``maximum > minimum`` everywhere.

    ``2 * (x - minimum) / (maximum - minimum) - 1`` maps the data to [-1, 1]; a dimension that never changes gets the
    range of one around its value, so that it maps to 0.
    """

    actions_min: np.ndarray  # (d,)
    actions_max: np.ndarray  # (d,)
    labels_min: np.ndarray  # (d,)
    labels_max: np.ndarray  # (d,)
    proprio_min: np.ndarray  # (p,)
    proprio_max: np.ndarray  # (p,)
    episodes: int
    steps: int  # executed actions counted


def dataset_statistics(store: ReplayStore, sources: Iterable[str] = ("demo",)) -> DatasetStatistics:
    """Ranges over the known episodes of ``sources`` that are trained on (see ``EpisodeSummary.episode_class``).

    Call ``store.refresh()`` first. Damaged episodes go to quarantine and are left out. StoreError if no episode is
    left or if their dimensions differ.
    """
    wanted = set(sources)
    columns = ("action", "label", "proprio")
    low: dict[str, np.ndarray] = {}
    high: dict[str, np.ndarray] = {}
    episodes = steps = 0
    for summary in store.summaries():
        if summary.source not in wanted or summary.episode_class not in TRAINED:
            continue
        try:
            view = store.view(summary.name)
            values = {name: view.column(name) for name in columns}
        except FileNotFoundError:
            continue
        except DamagedEpisode as error:
            store.discard(summary.name, str(error))
            continue
        for name, rows in values.items():
            if name in low and rows.shape[1] != len(low[name]):
                raise StoreError(
                    f"episode {summary.name} has {rows.shape[1]} dimensions of {name}, others {len(low[name])}: "
                    "statistics are of one task and robot"
                )
            low[name] = np.minimum(low[name], rows.min(0)) if name in low else rows.min(0)
            high[name] = np.maximum(high[name], rows.max(0)) if name in high else rows.max(0)
        episodes += 1
        steps += view.length
    if not episodes:
        raise StoreError(f"{store.root} holds no usable episode of {', '.join(sorted(wanted))}: collect some first")
    ranges = {name: _widened(low[name], high[name]) for name in columns}
    return DatasetStatistics(*ranges["action"], *ranges["label"], *ranges["proprio"], episodes=episodes, steps=steps)


def _widened(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The range, with dimensions that do not vary (up to rounding) widened to one on each side."""
    constant = high - low <= 1e-6 * np.maximum(1.0, np.abs(high))
    margin = constant.astype(np.float32)
    return low - margin, high + margin
