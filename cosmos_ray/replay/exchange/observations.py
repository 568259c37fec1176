"""The observations of one demonstration in an HDF5 file: its cameras, its proprioception, and what of it is not read."""

from __future__ import annotations

import re
from collections.abc import Sequence

import h5py
import numpy as np

from cosmos_ray.embodiment import third_person
from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange import hdf5

_CAMERA = re.compile(r"(?P<camera>.+?)_(rgb|image)(_jpeg)?")
_NO_COLOUR = re.compile(r"depth|seg(mentation)?(_|$)|mask|normal")
#: LIBERO's name of a camera of robosuite.
_RENAMED = {"eye_in_hand": "robot0_eye_in_hand"}


class Observations:
    """A group of observations, such as ``data/demo_0/obs``; :attr:`read` has the names of the datasets that were asked for."""

    def __init__(self, group: h5py.Group) -> None:
        self.group, self.read = group, set[str]()
        self.datasets = dict(sorted(_cameras(group).items(), key=lambda pair: (third_person(pair[0]), pair[0])))

    @property
    def cameras(self) -> tuple[str, ...]:
        """Wrist cameras first, under robosuite's names."""
        return tuple(self.datasets)

    @property
    def uncoloured(self) -> tuple[str, ...]:
        """Datasets of depth, masks and the like."""
        return tuple(name for name in self.group if _NO_COLOUR.search(name))

    def frames(self, flip: bool, rows: int, at: Sequence[int] | None = None) -> list[list[bytes]]:
        """The JPEGs ``[step][camera]`` at the steps ``at`` (None: all) of ``rows``. StoreError."""
        columns = []
        for camera, name in self.datasets.items():
            jpegs = hdf5.images(self.group, name, flip, rows, at)
            if jpegs is None:
                raise StoreError(f"{self.group.name} has no pictures of {camera}")
            self.read |= {name, f"{name}_jpeg"}
            columns.append(jpegs)
        return [list(images) for images in zip(*columns, strict=True)]

    def proprio(self) -> np.ndarray:
        """(T, p) float32 as in our simulation: of each arm the gripper joints, hand position in metres, hand quaternion (x, y, z, w).

        An arm without a gripper has none. LIBERO's axis-angle is converted. StoreError where there is no hand.
        """
        parts = []
        for prefix in self._arms():
            gripper = ("gripper_qpos",) if self._has(f"{prefix}gripper_qpos") else ()
            parts += [self._vector(f"{prefix}{name}") for name in (*gripper, "eef_pos", "eef_quat")]
        if parts:
            return np.hstack(parts).astype(np.float32)
        if self._has("gripper_states"):
            parts.append(self._vector("gripper_states"))
        if self._has("ee_pos") and self._has("ee_ori"):
            return np.hstack([*parts, self._vector("ee_pos"), quaternions(self._vector("ee_ori"))]).astype(np.float32)
        if self._has("ee_states"):
            pose = self._vector("ee_states")
            return np.hstack([*parts, pose[:, :3], quaternions(pose[:, 3:])]).astype(np.float32)
        raise StoreError(f"{self.group.name} does not say where the hand is (robot0_eef_pos and robot0_eef_quat, or ee_pos and ee_ori)")

    def joints(self) -> np.ndarray:
        """(T, n) float64 joint angles of the arm, (0, 0) where they are not recorded."""
        name = next((name for name in ("joint_states", "robot0_joint_pos") if self._has(name)), None)
        return self._vector(name) if name else np.empty((0, 0))

    def _arms(self) -> list[str]:
        """Beginnings of the names of each arm: a robot of one arm has no name for the arm."""
        robots = sorted({match[1] for name in self.group if (match := re.match(r"(robot\d+_)", name))})
        arms = [arm for robot in robots for arm in (robot, f"{robot}right_", f"{robot}left_")]
        return [arm for arm in arms if self._has(f"{arm}eef_pos")]

    def _has(self, name: str) -> bool:
        return hdf5.has(self.group, name)

    def _vector(self, name: str) -> np.ndarray:
        self.read.add(name)
        return hdf5.array(self.group, name, np.float64, 2)


def quaternions(rotations: np.ndarray) -> np.ndarray:
    """(n, 4) float32 quaternions (x, y, z, w) of (n, 3) axis-angle vectors in radians. StoreError for another shape."""
    if rotations.ndim != 2 or rotations.shape[1] != 3:
        raise StoreError(f"orientations of shape {rotations.shape} are no axis-angle vectors")
    angle = np.linalg.norm(rotations, axis=1, keepdims=True)
    axis = np.divide(rotations, angle, out=np.zeros_like(rotations), where=angle > 0)
    return np.hstack([axis * np.sin(angle / 2), np.cos(angle / 2)]).astype(np.float32)


def rotation_vectors(rotations: np.ndarray) -> np.ndarray:
    """(n, 3) axis-angle vectors in radians of (n, 4) quaternions (x, y, z, w), angles within 0 to 2 pi as robosuite's: a quaternion whose
    ``w`` is negative has an angle above pi, and its vector does not jump while the hand turns."""
    sine = np.linalg.norm(rotations[:, :3], axis=1, keepdims=True)
    angle = 2 * np.arctan2(sine, rotations[:, 3:])
    axis = np.divide(rotations[:, :3], sine, out=np.zeros_like(rotations[:, :3]), where=sine > 0)
    return axis * angle


def _cameras(group: h5py.Group) -> dict[str, str]:
    """Camera -> its dataset, without ``_jpeg``: by the endings of LIBERO and robomimic, else whatever holds colour pictures."""
    found: dict[str, str] = {}
    for name in sorted(group):
        match = _CAMERA.fullmatch(name)
        if _NO_COLOUR.search(name) or not (match or hdf5.is_picture(group, name)):
            continue
        short = match["camera"] if match else name.removesuffix("_jpeg")
        found[_RENAMED.get(short, short)] = name.removesuffix("_jpeg")
    return found
