"""The five types of training sample: which latent frames are given clean, and which carry loss (method 2.4)."""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch

from cosmos_ray.model.layout import LatentLayout


class SampleType(enum.IntEnum):
    """What a sample asks of the network."""

    POLICY = 0  #: s given; action, s' and value are targets
    WORLD_MODEL = 1  #: s and action given; s' and value are targets
    VALUE_FULL = 2  #: s, action and s' given; value is the target (base training of the paper)
    VALUE_FUTURE = 3  #: V(s'): only s' given; value is the target, the hidden slots are noised and carry no loss
    VALUE_ACTION = 4  #: Q(s, a): s and action given; value is the only target, s' is noised and carries no loss


def clean_frames(layout: LatentLayout, sample_type: SampleType) -> tuple[int, ...]:
    """Frames given clean (mask 1). The blank frame always is."""
    blank = (0,)
    current = blank + layout.current
    return {
        SampleType.POLICY: current,
        SampleType.WORLD_MODEL: current + (layout.action,),
        SampleType.VALUE_FULL: current + (layout.action,) + layout.future,
        SampleType.VALUE_FUTURE: blank + layout.future,
        SampleType.VALUE_ACTION: current + (layout.action,),
    }[sample_type]


def target_frames(layout: LatentLayout, sample_type: SampleType) -> tuple[int, ...]:
    """Frames that carry loss."""
    if sample_type in (SampleType.VALUE_FULL, SampleType.VALUE_FUTURE, SampleType.VALUE_ACTION):
        return (layout.value,)
    given = clean_frames(layout, sample_type)
    return tuple(i for i in range(layout.frames) if i not in given)


def mask_table(layout: LatentLayout, frames_of: Callable[[LatentLayout, SampleType], tuple[int, ...]]) -> torch.Tensor:
    """(5, T) float32 table of 0/1 for ``clean_frames`` or ``target_frames``, indexed by :class:`SampleType`."""
    table = torch.zeros(len(SampleType), layout.frames)
    for sample_type in SampleType:
        table[sample_type, list(frames_of(layout, sample_type))] = 1
    return table
