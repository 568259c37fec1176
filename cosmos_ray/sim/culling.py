"""Which geoms can change a pixel of a camera's picture: those in its view, and those that a mirror in its view shows.

MuJoCo draws every geom, in view or not. It has one mirror: the first opaque box or plane whose material reflects, in the order of the
geoms. The upper side of a box mirrors. For a mirror MuJoCo draws all geoms once more.
"""

from __future__ import annotations

from typing import Any

import numpy as np

OPAQUE = 0.995
"""From this alpha on MuJoCo takes a geom for opaque."""


class Culling:
    """Of one compiled ``model``, whose reflectances it sets for each picture. ``groups`` (ngeom,) bool: of a group that is drawn."""

    def __init__(self, mujoco: Any, model: Any, groups: Any, reflections: bool):
        self.model = model
        self.box, self.plane = int(mujoco.mjtGeom.mjGEOM_BOX), int(mujoco.mjtGeom.mjGEOM_PLANE)
        self.reflectance = model.mat_reflectance.copy()
        reflects = np.append(self.reflectance, 0.0)[model.geom_matid] > 0  # -1 is no material
        flat = (model.geom_type == self.box) | (model.geom_type == self.plane)
        self.mirrors = np.flatnonzero(reflects & flat & groups & reflections)

    def drawn(self, data: Any, camera: int) -> np.ndarray:
        """The geoms to draw in the picture of ``camera``: (ngeom,) bool. Sets the reflectances in the model for this picture."""
        self.model.mat_reflectance[:] = 0.0
        eye, centres, radii = data.cam_xpos[camera], data.geom_xpos, self.model.geom_rbound
        drawn = self._in_view(data, camera, centres, radii) | (radii == 0)  # planes are infinite and have no radius
        mirror = self._mirror(data, eye)
        if mirror is None:
            return drawn
        face, normal, reach = self._face(data, mirror)
        if (eye - face) @ normal < 0 or not self._in_view(data, camera, face[None], np.array([reach]))[0]:
            return drawn  # nobody sees the reflecting side
        self.model.mat_reflectance[self.model.geom_matid[mirror]] = self.reflectance[self.model.geom_matid[mirror]]
        heights = (centres - face) @ normal
        images = centres - 2 * heights[:, None] * normal
        shown = (heights > -radii) & self._in_view(data, camera, images, radii) & _overlap(images - eye, radii, face - eye, reach)
        drawn |= shown
        drawn[mirror] = True
        return drawn

    def _in_view(self, data: Any, camera: int, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
        """Whether spheres (n, 3), (n,) reach into the camera's view: (n,) bool."""
        axes = data.cam_xmat[camera].reshape(3, 3)
        x, y, z = ((centres - data.cam_xpos[camera]) @ axes).T
        half = np.deg2rad(self.model.cam_fovy[camera]) / 2
        reach = radii - z * np.sin(half)  # the camera looks along its negative z axis
        return (np.abs(x) * np.cos(half) <= reach) & (np.abs(y) * np.cos(half) <= reach) & (-z >= -radii)

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

    def _face(self, data: Any, geom: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Centre, normal and radius of the reflecting side of a mirror; the radius of an infinite plane is infinite."""
        normal, size = data.geom_xmat[geom].reshape(3, 3)[:, 2], self.model.geom_size[geom]
        face = data.geom_xpos[geom] + (normal * size[2] if self.model.geom_type[geom] == self.box else 0.0)
        return face, normal, float(np.hypot(size[0], size[1])) if size[0] and size[1] else np.inf


def _overlap(to_spheres: np.ndarray, radii: np.ndarray, to_other: np.ndarray, reach: float) -> np.ndarray:
    """Whether spheres in the directions ``to_spheres`` (n, 3) overlap another sphere, as the eye sees them: (n,) bool."""
    distances, distance = np.linalg.norm(to_spheres, axis=1), float(np.linalg.norm(to_other))
    cosines = to_spheres @ to_other / np.maximum(distances * distance, 1e-12)
    return np.arccos(np.clip(cosines, -1, 1)) <= _half_angle(radii, distances) + _half_angle(reach, distance)


def _half_angle(radius: Any, distance: Any) -> Any:
    """Half of the angle that a sphere takes; pi for an eye inside of the sphere."""
    inside = np.asarray(radius) >= distance
    return np.where(inside, np.pi, np.arcsin(np.minimum(1.0, np.where(inside, 1.0, radius) / np.maximum(distance, 1e-12))))
