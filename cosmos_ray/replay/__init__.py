"""The replay store: durable episodes, and the windows and targets a learner draws from them. Needs neither Ray nor torch."""

from cosmos_ray.replay.episode import Episode, EpisodeKey, EpisodeSummary
from cosmos_ray.replay.latents import LatentCache
from cosmos_ray.replay.limiter import SamplesPerInsert
from cosmos_ray.replay.returns import value_targets
from cosmos_ray.replay.sampler import WindowBatch, WindowSampler
from cosmos_ray.replay.statistics import DatasetStatistics, dataset_statistics
from cosmos_ray.replay.store import ReplayStore

__all__ = [
    "DatasetStatistics",
    "Episode",
    "EpisodeKey",
    "EpisodeSummary",
    "LatentCache",
    "ReplayStore",
    "SamplesPerInsert",
    "WindowBatch",
    "WindowSampler",
    "dataset_statistics",
    "value_targets",
]
