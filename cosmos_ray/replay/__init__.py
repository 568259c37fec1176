"""The replay store: durable episodes, and the windows and targets a learner draws from them. Needs neither Ray nor torch."""

from cosmos_ray.replay.episode import Episode, EpisodeKey, EpisodeSummary
from cosmos_ray.replay.latents import LatentCache
from cosmos_ray.replay.limiter import SamplesPerInsert
from cosmos_ray.replay.loader import PrefetchLoader
from cosmos_ray.replay.returns import value_targets
from cosmos_ray.replay.sampler import WindowBatch, WindowSampler, WindowStream
from cosmos_ray.replay.statistics import DatasetStatistics, dataset_statistics
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.replay.view import EpisodeView
from cosmos_ray.replay.windows import Selection

__all__ = [
    "DatasetStatistics",
    "Episode",
    "EpisodeKey",
    "EpisodeSummary",
    "EpisodeView",
    "LatentCache",
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
