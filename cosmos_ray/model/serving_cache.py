"""What a serving policy computes once and keeps from call to call."""

from __future__ import annotations

from dataclasses import dataclass, field

from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.transformer import Modulation

PROMPTS_KEPT = 128  #: different instructions whose keys and values are kept (some 5 MB each at 2B)


@dataclass
class ServingCache:
    """Results that depend on the weights, the prompts and the sigmas alone. New weights need a new cache."""

    instructions: dict[str, int] = field(default_factory=dict)  #: instruction -> its row in ``prompts``
    prompts: Prompts | None = None  #: with keys and values
    modulations: dict[tuple[SampleType | None, float], Modulation] = field(default_factory=dict)  #: (sample type, sigma) -> AdaLN
