"""The replay store: durable episodes, and the windows and targets a learner draws from them. Needs neither Ray nor torch."""

from cosmos_ray.replay.format.episode import Episode, EpisodeKey, EpisodeSummary
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.sampling.limiter import SamplesPerInsert
from cosmos_ray.replay.sampling.loader import PrefetchLoader
from cosmos_ray.replay.sampling.ranges import DatasetStatistics, dataset_statistics
from cosmos_ray.replay.sampling.returns import value_targets
from cosmos_ray.replay.sampling.sampler import WindowBatch, WindowSampler, WindowStream
from cosmos_ray.replay.sampling.windows import Selection
from cosmos_ray.replay.store import ReplayStore

__all__ = [
    "DatasetStatistics",
    "Episode",
    "EpisodeKey",
    "EpisodeSummary",
    "EpisodeView",
    "PrefetchLoader",
    "ReplayStore",
    "SamplesPerInsert",
    "Selection",
    "WindowBatch",
    "WindowSampler",
    "WindowStream",
    "dataset_statistics",
    "value_targets",
]
