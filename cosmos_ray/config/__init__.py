"""Every setting of a run, as frozen dataclasses; the help text stands at the field.

One :class:`RunConfig` describes every stage. A new run takes its settings from the defaults, then the model preset and suite, then a
recipe (``--recipe``), then a TOML file (``--config``), then flags (``--section.field value``). The run stores them as ``config.json``,
every value resolved, and later stages start from there. This package imports neither torch nor Ray.
"""

from cosmos_ray.config.acting import InferenceConfig, PlannerConfig, RolloutConfig
from cosmos_ray.config.learner import LearnerConfig
from cosmos_ray.config.model import ModelConfig
from cosmos_ray.config.option import check_ranges
from cosmos_ray.config.replay import ReplayConfig
from cosmos_ray.config.run import RunConfig, check
from cosmos_ray.config.sim import SimConfig

__all__ = ["InferenceConfig", "LearnerConfig", "ModelConfig", "PlannerConfig", "ReplayConfig", "RolloutConfig", "RunConfig", "SimConfig",
           "check", "check_ranges"]
