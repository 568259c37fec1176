"""Which geoms can change a pixel of a camera's picture: those in its view, and those that a mirror in its view shows.

MuJoCo draws every geom, in view or not. It has one mirror: the first opaque box or plane whose material reflects, in the order of the
geoms. The upper side of a box mirrors. For a mirror MuJoCo draws all geoms once more. Where the mirror takes a small part of the picture,
that part is a picture of its own, of the few geoms that are seen there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

OPAQUE = 0.995
"""From this alpha on MuJoCo takes a geom for opaque."""
MARGIN = 2
"""Pixels around a mirror that are drawn with it, for samples between pixels."""
NEAR = 1e-3
"""Metres before the camera; where a mirror reaches nearer, it may take the whole picture."""


@dataclass(frozen=True)
class Pass:
    """One picture to draw, and the part of it that counts."""

    geoms: np.ndarray  #: (ngeom,) bool
    mirror: int = -1  #: material that reflects, -1 for none
    part: tuple[slice, slice] = (slice(None), slice(None))  #: rows, from the lowest one up, and columns


class Culling:
    """Of one compiled ``model``. ``groups`` (ngeom,) bool: of a group that is drawn."""

    def __init__(self, mujoco: Any, model: Any, groups: Any, reflections: bool):
        self.model = model
        self.box, self.plane = int(mujoco.mjtGeom.mjGEOM_BOX), int(mujoco.mjtGeom.mjGEOM_PLANE)
        self.reflectance = model.mat_reflectance.copy()
        reflects = np.append(self.reflectance, 0.0)[model.geom_matid] > 0  # -1 is no material
        flat = (model.geom_type == self.box) | (model.geom_type == self.plane)
        self.endless = model.geom_rbound == 0  # planes
        meshes = np.where(model.geom_type == int(mujoco.mjtGeom.mjGEOM_MESH), model.geom_dataid, -1)
        self.faces = np.append(model.mesh_facenum, 100)[meshes] * groups  # what a geom costs; a box or a sphere hardly anything
        self.mirrors = np.flatnonzero(reflects & flat & groups & reflections)

    def passes(self, data: Any, camera: int, pixels: int) -> list[Pass]:
        """What to draw for the picture of ``camera``, ``pixels`` high and wide; each pass over the one before."""
        eye, view = data.cam_xpos[camera], data.cam_xmat[camera].reshape(3, 3)
        slope = float(np.tan(np.deg2rad(self.model.cam_fovy[camera]) / 2))
        turns = data.geom_xmat.reshape(-1, 3, 3)
        centres = data.geom_xpos + np.einsum("nij,nj->ni", turns, self.model.geom_aabb[:, :3]) - eye
        edges = turns * self.model.geom_aabb[:, None, 3:]  # its columns: half of the box along each side
        picture = np.array([[-slope, -slope], [slope, slope]])
        drawn = _reach(centres @ view, view.T @ edges, picture) | self.endless
        mirror = self._mirror(data, eye)
        if mirror is None:
            return [Pass(drawn)]
        normal, corners = self._face(data, mirror)
        if corners is None:
            part = picture
        else:
            seen = (corners - eye) @ view
            part = picture if (seen[:, 2] > -NEAR).any() else _around(seen, picture, slope * 2 * MARGIN / pixels)
        face = data.geom_xpos[mirror] if corners is None else corners.mean(axis=0)
        if (eye - face) @ normal < 0 or (part[0] >= part[1]).any():
            return [Pass(drawn)]  # nobody sees the reflecting side
        material = int(self.model.geom_matid[mirror])
        heights, depths = (centres + eye - face) @ normal, normal @ edges
        images = centres - 2 * heights[:, None] * normal
        flipped = edges - 2 * normal[:, None] * depths[:, None, :]
        shown = _reach(images @ view, view.T @ flipped, part) & (heights > -np.abs(depths).sum(axis=1)) | self.endless
        shown[mirror] = True
        there = shown | _reach(centres @ view, view.T @ edges, part)
        if self.faces[drawn].sum() + 2 * self.faces[there].sum() >= 2 * self.faces[drawn | shown].sum():
            return [Pass(drawn | shown, material)]
        low, high = (part / slope + 1) / 2 * pixels
        low, high = np.ceil(low - 1e-6).astype(int), np.floor(high + 1e-6).astype(int)  # whole pixels of the part alone
        return [Pass(drawn), Pass(there, material, (slice(low[1], high[1]), slice(low[0], high[0])))]

    def _mirror(self, data: Any, eye: np.ndarray) -> int | None:
        """The geom that MuJoCo takes for the mirror."""
        model = self.model
        for geom in self.mirrors:
            material = model.geom_matid[geom]
            own = not np.array_equal(model.geom_rgba[geom], np.array([0.5, 0.5, 0.5, 1.0], np.float32))  # else the material's
            if (model.geom_rgba[geom] if own else model.mat_rgba[material])[3] < OPAQUE:
                continue
            if model.geom_type[geom] == self.plane and (eye - data.geom_xpos[geom]) @ data.geom_xmat[geom].reshape(3, 3)[:, 2] < 0:
                continue  # from behind a plane is transparent
            return int(geom)
        return None

    def _face(self, data: Any, geom: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Normal and corners (4, 3) of the reflecting side of a mirror; an infinite plane has no corners."""
        axes, size = data.geom_xmat[geom].reshape(3, 3), self.model.geom_size[geom]
        if self.model.geom_type[geom] == self.plane and not (size[0] and size[1]):
            return axes[:, 2], None
        face = data.geom_xpos[geom] + (axes[:, 2] * size[2] if self.model.geom_type[geom] == self.box else 0.0)
        return axes[:, 2], np.array([face + x * size[0] * axes[:, 0] + y * size[1] * axes[:, 1] for x in (-1, 1) for y in (-1, 1)])


def _reach(centres: np.ndarray, edges: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Whether boxes (n, 3), (n, 3, 3) reach into a ``part`` of the view, its lowest and highest x / -z and y / -z: (n,) bool. All as the
    camera sees it, which looks along negative z."""
    (left, low), (right, high) = part
    inward = np.array([[1, 0, left], [-1, 0, -right], [0, 1, low], [0, -1, -high], [0, 0, -1]])  # normals of the part's five sides
    return (centres @ inward.T + np.abs(inward @ edges).sum(axis=2) >= 0).all(axis=1)


def _around(corners: np.ndarray, picture: np.ndarray, margin: float) -> np.ndarray:
    """The part of the ``picture`` around ``corners`` (4, 3), which are before the camera."""
    places = corners[:, :2] / -corners[:, 2:]
    return np.array([np.maximum(places.min(axis=0) - margin, picture[0]), np.minimum(places.max(axis=0) + margin, picture[1])])
