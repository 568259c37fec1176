"""What a command does with a run, so that all it needs is checked before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cosmos_ray.config import RunConfig


def never(config: RunConfig) -> bool:
    return False


def always(config: RunConfig) -> bool:
    return True


@dataclass(frozen=True)
class Use:
    """By default that of a program which opens a run, or begins one, and starts Ray."""

    creates: bool = True  #: may begin a new run, which needs a plain name
    needs_ray: bool = True
    only_reads: bool = False  #: takes a folder that cannot be written
    beside: bool = False  #: only reads, for long: takes no lock, keeps no settings; another command may work on the run meanwhile
    demonstrates: bool = False  #: a scripted expert records demonstrations
    simulates: Callable[[RunConfig], bool] = never  #: acts in the run's simulation, which the run's policies must fit
    acts: bool = False  #: policies answer requests, on the GPUs of inference
    learns: bool = False  #: learner ranks train, on their GPUs
