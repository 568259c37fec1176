"""Renders camera pictures without robosuite's renderer. All environments of a process share one OpenGL context.

Quality "full" is robosuite's own renderer, pixel for pixel. On a CPU a picture costs vertex work, not pixels: geoms that no pixel
shows are left out (:mod:`cosmos_ray.sim.culling`). Quality "fast" draws the model with fewer vertices (vertex clustering), without
shadows, reflections and multisampling.
"""

from __future__ import annotations

import atexit
import threading
from typing import Any
from weakref import WeakSet

import numpy as np

from cosmos_ray.config.tasks import Quality
from cosmos_ray.errors import SimulationError
from cosmos_ray.sim import gl
from cosmos_ray.sim.culling import Culling

CELLS_PER_MESH = 8
"""A clustering cell is at most this fraction of a mesh's longest side, so small parts such as fingers keep their shape."""
HIDDEN_GROUP = 5
"""Geom group that is never drawn; robosuite leaves it empty."""

_renderers: WeakSet[Renderer] = WeakSet()
_process: dict[str, Any] = {}


class Renderer:
    """Draws a MuJoCo scene from named cameras. ``model`` and ``data`` belong to the renderer: write the pose there, then draw.

    The OpenGL context belongs to the thread that first renders, and it does not survive a fork. Render on one thread of a
    freshly started process.
    """

    def __init__(self, xml: str, size: int, mesh_cell: float, quality: Quality):
        self.mujoco, _ = gl.load()
        _own_context(size)
        self.size, full = size, quality == "full"
        self.model = self.mujoco.MjModel.from_xml_string(xml)
        self.model.vis.global_.offwidth = self.model.vis.global_.offheight = size
        if mesh_cell > 0:
            decimate(self.model, mesh_cell)
        if not (full and self.model.light_castshadow.any()):
            self.model.vis.quality.shadowsize = 0  # else 64 MiB
        if not full:
            self.model.vis.quality.offsamples = 0
        self.data = self.mujoco.MjData(self.model)
        self.scene = self.mujoco.MjvScene(self.model, self.model.ngeom + self.model.nsite + 100)
        self.scene.flags[self.mujoco.mjtRndFlag.mjRND_SHADOW] = full
        self.scene.flags[self.mujoco.mjtRndFlag.mjRND_REFLECTION] = full
        self.options = self.mujoco.MjvOption()
        self.options.geomgroup[0] = 0  # collision geoms
        self.options.geomgroup[HIDDEN_GROUP] = 0
        self.groups = self.model.geom_group.copy()
        self.shadows = full and bool(self.model.light_castshadow.any())
        self.culling = Culling(self.mujoco, self.model, self.options.geomgroup[self.groups] == 1, reflections=full)
        self.camera = self.mujoco.MjvCamera()
        self.camera.type = self.mujoco.mjtCamera.mjCAMERA_FIXED
        self.viewport = self.mujoco.MjrRect(0, 0, size, size)
        self.context = self.mujoco.MjrContext(self.model, self.mujoco.mjtFontScale.mjFONTSCALE_50)
        _renderers.add(self)

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
        canvas = np.empty_like(pictures[0])
        for picture, camera in zip(pictures, cameras, strict=True):
            self.camera.fixedcamid = camera
            for part in self.culling.passes(data, camera, self.size):
                drawn = part.geoms | self.shadows  # what is out of view casts its shadow into it
                model.geom_group[:] = np.where(drawn, self.groups, HIDDEN_GROUP)
                model.mat_reflectance[:] = 0.0
                if part.mirror >= 0:
                    model.mat_reflectance[part.mirror] = self.culling.reflectance[part.mirror]
                mujoco.mjv_updateScene(model, data, self.options, None, self.camera, mujoco.mjtCatBit.mjCAT_ALL, self.scene)
                mujoco.mjr_render(self.viewport, self.scene, self.context)
                mujoco.mjr_readPixels(canvas, None, self.viewport, self.context)
                picture[part.part] = canvas[part.part]
        return np.ascontiguousarray(pictures[:, ::-1])

    @property
    def megabytes(self) -> float:
        """About what the renderer holds: the model, its textures with their smaller copies, as OpenGL has them, and its meshes."""
        return (self.model.nbuffer + self.model.ntexdata * 16 / 9 + self.model.nmeshface * 96) / 2**20


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
    else:
        _process["context"].make_current()  # another library may have drawn in a context of its own since


def _release() -> None:
    """Free OpenGL objects in order, before the interpreter tears modules down."""
    for renderer in list(_renderers):
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
