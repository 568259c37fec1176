"""Simulator states that another project recorded without pictures, and what a simulator makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RecordedStates:
    """One episode as robosuite's own recorder keeps it: the flattened states of MuJoCo, and the model they belong to."""

    where: str  #: file and group, for messages
    task: str  #: robosuite's name
    robots: tuple[str, ...]  #: robosuite's names, empty where the file does not say
    model: str  #: MJCF text, empty where the file has none
    states: np.ndarray  #: (T, 1 + nq + nv) float64: time, positions, velocities


@dataclass(frozen=True)
class RenderedStates:
    """Pictures and proprioception of the ``T`` states."""

    cameras: tuple[str, ...]  #: wrist cameras first
    frames: list[list[bytes]]  #: one JPEG per camera for each state
    proprio: np.ndarray  #: (T, p) float32, as the simulation of this package has it
    note: str = ""  #: one line, where the pictures may differ from what was recorded


#: Draws recorded states. StoreError in one line where they do not fit a simulator here.
RenderRecorded = Callable[[RecordedStates], RenderedStates]
