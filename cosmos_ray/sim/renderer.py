"""Renders camera pictures without robosuite's renderer. All environments of a process share one OpenGL context.

Quality "full" is robosuite's own renderer, pixel for pixel. On a CPU such a picture costs vertex work, not pixels. So quality "fast" draws
its own copy of the model with fewer vertices (vertex clustering). It skips geoms outside of the camera's view, and it has no shadows,
reflections or multisampling.
"""

from __future__ import annotations

import atexit
import threading
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from cosmos_ray.config import SimConfig
from cosmos_ray.config.tasks import Quality
from cosmos_ray.errors import SimulationError
from cosmos_ray.sim import gl
from cosmos_ray.sim.slimming import trim_heap

CELLS_PER_MESH = 8
"""A clustering cell is at most this fraction of a mesh's longest side, so small parts such as fingers keep their shape."""
HIDDEN_GROUP = 5
"""Geom group that is never drawn; robosuite leaves it empty."""

_shared: WeakValueDictionary[tuple, Renderer] = WeakValueDictionary()
_process: dict[str, Any] = {}


class Renderer:
    """Draws a MuJoCo scene from named cameras. ``model`` and ``data`` belong to the renderer: write the pose there, then draw.

    The OpenGL context belongs to the thread that first renders, and it does not survive a fork. Render on one thread of a
    freshly started process.
    """

    def __init__(self, xml: str, size: int, mesh_cell: float, quality: Quality = "fast"):
        self.mujoco, _ = gl.load()
        _own_context(size)
        self.size, self.full = size, quality == "full"
        self.model = self.mujoco.MjModel.from_xml_string(xml)
        self.model.vis.global_.offwidth = self.model.vis.global_.offheight = size
        if mesh_cell > 0:
            decimate(self.model, mesh_cell)
        self.data = self.mujoco.MjData(self.model)
        self.scene = self.mujoco.MjvScene(self.model, self.model.ngeom + self.model.nsite + 100)
        if not self.full:
            self.model.vis.quality.offsamples = self.model.vis.quality.shadowsize = 0
            self.scene.flags[self.mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self.scene.flags[self.mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.options = self.mujoco.MjvOption()
        self.options.geomgroup[0] = 0  # collision geoms
        self.options.geomgroup[HIDDEN_GROUP] = 0
        self.groups = self.model.geom_group.copy()
        self.camera = self.mujoco.MjvCamera()
        self.camera.type = self.mujoco.mjtCamera.mjCAMERA_FIXED
        self.viewport = self.mujoco.MjrRect(0, 0, size, size)
        self.context = self.mujoco.MjrContext(self.model, self.mujoco.mjtFontScale.mjFONTSCALE_50)

    def draw(self, cameras: list[int]) -> np.ndarray:
        """Render the pose in ``data``: (n, size, size, 3) uint8, upright, one picture per camera id."""
        _own_context(self.size)
        mujoco, model, data = self.mujoco, self.model, self.data
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_camlight(model, data)
        # Another MjrContext of this process may have been drawn to since; without this its picture would be read.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        pictures = np.empty((len(cameras), self.size, self.size, 3), np.uint8)
        for picture, camera in zip(pictures, cameras, strict=True):
            self.camera.fixedcamid = camera
            if not self.full:
                model.geom_group[:] = np.where(self._in_view(camera), self.groups, HIDDEN_GROUP)
            mujoco.mjv_updateScene(model, data, self.options, None, self.camera, mujoco.mjtCatBit.mjCAT_ALL, self.scene)
            mujoco.mjr_render(self.viewport, self.scene, self.context)
            mujoco.mjr_readPixels(picture, None, self.viewport, self.context)
        return np.ascontiguousarray(pictures[:, ::-1])

    def _in_view(self, camera: int) -> np.ndarray:
        """Whether each geom's bounding sphere reaches into the camera's view: (ngeom,) bool.

        MuJoCo draws every geom, in view or not. Without shadows and reflections, a geom out of view changes no pixel.
        """
        model, data = self.model, self.data
        axes = data.cam_xmat[camera].reshape(3, 3)
        x, y, z = ((data.geom_xpos - data.cam_xpos[camera]) @ axes).T
        half = np.deg2rad(model.cam_fovy[camera]) / 2
        radius = model.geom_rbound
        reach = radius - z * np.sin(half)  # the camera looks along its negative z axis
        inside = (np.abs(x) * np.cos(half) <= reach) & (np.abs(y) * np.cos(half) <= reach) & (-z >= -radius)
        return inside | (radius == 0)  # planes are infinite and have no radius


def shared_renderer(model_hash: str, xml: str, config: SimConfig) -> Renderer:
    """The process's renderer for this model and these settings. It lives as long as an environment holds it."""
    key = (model_hash, config.image_size, config.mesh_cell, config.quality)
    renderer = _shared.get(key)
    if renderer is None:
        renderer = _shared[key] = Renderer(xml, config.image_size, config.mesh_cell, config.quality)
        trim_heap()
    return renderer


def _own_context(size: int) -> None:
    """Make the process's OpenGL context on first use; afterwards check that the caller is on its thread."""
    if not _process:
        _process["context"] = gl.context(size)
        _process["thread"] = threading.get_ident()
        atexit.register(_release)
    elif _process["thread"] != threading.get_ident():
        raise SimulationError(
            "the renderer was called from another thread than the one that made its OpenGL context; "
            "use all environments of a process from one thread"
        )


def _release() -> None:
    """Free OpenGL objects in order, before the interpreter tears modules down."""
    for renderer in list(_shared.values()):
        renderer.context.free()
    _process["context"].free()


def decimate(model: Any, cell: float) -> None:
    """Merge the vertices of every mesh of a compiled ``model`` that share a cube of side ``cell`` metres, in place.

    Only the drawn faces change: collapsed and repeated faces go, the others move to the front of the mesh's range. Do not
    use the model for physics afterwards.
    """
    for mesh in range(model.nmesh):
        vertex_start, face_start = model.mesh_vertadr[mesh], model.mesh_faceadr[mesh]
        vertex_stop = vertex_start + model.mesh_vertnum[mesh]
        face_stop = face_start + model.mesh_facenum[mesh]
        vertices = model.mesh_vert[vertex_start:vertex_stop]
        side = min(cell, float(np.ptp(vertices, axis=0).max()) / CELLS_PER_MESH)
        cubes = np.floor((vertices - vertices.min(axis=0)) / side).astype(np.int64)
        _, first, cluster = np.unique(cubes, axis=0, return_index=True, return_inverse=True)
        sizes = np.bincount(cluster)
        for axis in range(3):
            vertices[first, axis] = np.bincount(cluster, vertices[:, axis]) / sizes

        faces = first[cluster][model.mesh_face[face_start:face_stop]]
        corners = np.sort(faces, axis=1)
        whole = (corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2])
        _, unique = np.unique(corners, axis=0, return_index=True)
        kept = np.intersect1d(np.flatnonzero(whole), unique)
        if not len(kept):
            continue
        stop = face_start + len(kept)
        model.mesh_face[face_start:stop] = faces[kept]
        for attribute in (model.mesh_facenormal, model.mesh_facetexcoord):
            attribute[face_start:stop] = attribute[face_start:face_stop][kept]
        model.mesh_facenum[mesh] = len(kept)
