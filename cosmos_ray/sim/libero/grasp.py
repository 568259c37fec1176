"""Ways to take an object from above, read from the points of the object's surface."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cosmos_ray.sim.servo import nearest

DIRECTIONS = 24  #: of the finger axis, of which the expert takes the best
APART = 0.04  #: metres from the grip site to each open finger
TIP = 0.013  #: metres that the fingers reach below the grip site
PALM = 0.035  #: metres from the grip site up to the palm, which must stay above the object
RIM = 0.015  #: metres from an object's rim down to the grip site


class Grasp(NamedTuple):
    """One way to take an object."""

    position: np.ndarray  #: of the grip site, (3,) metres
    yaw: float  #: of the finger axis, radians
    cost: float  #: of the grasp by itself, radians of turning that it is worth to avoid the grasp


def by_rim(points: np.ndarray) -> list[Grasp]:
    """Pinch the upper edge of an object that is too wide to take whole, one finger inside. ``points`` (n, 3) are on its surface."""
    top = float(points[:, 2].max())
    rim = points[points[:, 2] > top - 0.01, :2]
    middle = (rim.min(axis=0) + rim.max(axis=0)) / 2
    radius = float(np.linalg.norm(rim - middle, axis=1).max()) - 0.004
    angles = np.arange(DIRECTIONS) * 2 * np.pi / DIRECTIONS
    return [Grasp(np.array([*(middle + radius * np.array([np.cos(angle), np.sin(angle)])), top - RIM]), angle, 0.0) for angle in angles]


def across(points: np.ndarray) -> list[Grasp]:
    """Both fingers outside, across the object. ``points`` (n, 3) are on the object's surface. Wide directions cost more, and those that
    the open hand does not fit over are left out."""
    low, high = float(points[:, 2].min()), float(points[:, 2].max())
    height = max((low + high) / 2, high - PALM + 0.01, low + 0.005)  # lower, and a carton sticks to a finger
    held = points[np.abs(points[:, 2] - height) < 0.012]
    found = []
    for angle in np.arange(DIRECTIONS) * np.pi / DIRECTIONS:
        fingers = np.array([np.cos(angle), np.sin(angle)])
        along, aside = held[:, :2] @ fingers, held[:, :2] @ np.array([-fingers[1], fingers[0]])
        width = float(np.ptp(along))
        if width < 2 * APART - 0.004:
            middle = np.array([(along.min() + along.max()) / 2, (aside.min() + aside.max()) / 2])
            place = middle[0] * fingers + middle[1] * np.array([-fingers[1], fingers[0]])
            found.append(Grasp(np.array([*place, height]), angle, 40 * width))
    return found


def choose(grasps: list[Grasp], obstacles: np.ndarray, yaw: float) -> Grasp:
    """The grasp that touches the fewest points of ``obstacles`` (n, 3); among equals the cheapest, with the turn from ``yaw``."""
    def score(grasp: Grasp) -> tuple[int, float]:
        relative = obstacles - grasp.position
        along = np.abs(relative[:, :2] @ np.array([np.cos(grasp.yaw), np.sin(grasp.yaw)]))
        aside = np.abs(relative[:, :2] @ np.array([-np.sin(grasp.yaw), np.cos(grasp.yaw)]))
        height = relative[:, 2]
        fingers = (np.abs(along - APART - 0.008) < 0.018) & (aside < 0.017) & (height > 0.003 - TIP) & (height <= PALM)
        palm = (along < 0.11) & (aside < 0.04) & (height > PALM) & (height < 0.2)
        return int((fingers | palm).sum()), grasp.cost + abs(nearest(grasp.yaw, yaw, np.pi) - yaw)

    return min(grasps, key=score)
