"""Where the surfaces of a LIBERO scene are, as points of the collision geometry: what the scripted experts see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cosmos_ray.sim.environment import Environment

SPACING = 0.01  #: metres between points of a surface
BOX, MESH = 6, 7  #: MuJoCo's numbers of the two shapes of LIBERO's objects


class Scene:
    """The objects and fixtures of an environment as they are now. Positions are in metres, in the world frame."""

    def __init__(self, env: Environment):
        self.sim_env, self.model, self.data = env.sim_env, env.model, env.data
        robot = self.sim_env.robots[0].robot_model
        arms = {self.model.body_rootid[self.model.body(name).id] for name in (robot.root_body,)}
        collides = (self.model.geom_contype != 0) | (self.model.geom_conaffinity != 0)
        self._roots = np.array(self.model.body_rootid)[self.model.geom_bodyid]
        self._solid = np.flatnonzero(collides & ~np.isin(self._roots, list(arms)))
        self._local = {int(geom): self._surface(int(geom)) for geom in self._solid}

    def body(self, name: str) -> int:
        """The body of an object or fixture."""
        return int(self.sim_env.obj_body_id[name])

    def points(self, body: int) -> np.ndarray:
        """Points on the surface of a body and all that hangs on it, (n, 3)."""
        return self._world(self._solid[self._roots[self._solid] == self.model.body_rootid[body]])

    def part(self, body: int) -> np.ndarray:
        """Points on the surface of one body alone, such as a drawer of a cabinet, (n, 3)."""
        return self._world(self._solid[self.model.geom_bodyid[self._solid] == body])

    def obstacles(self, body: int) -> np.ndarray:
        """Points on the surfaces of all but a body and the robot, (n, 3)."""
        return self._world(self._solid[self._roots[self._solid] != self.model.body_rootid[body]])

    def middle(self, body: int) -> np.ndarray:
        """The middle of a body as seen from above, (2,)."""
        points = self.points(body)[:, :2]
        return (points.min(axis=0) + points.max(axis=0)) / 2

    def tallest(self, start: np.ndarray, end: np.ndarray, body: int) -> float:
        """The highest point of all but a body within a hand's breadth of the straight path between two places (2,)."""
        points = self.obstacles(body)
        along = end - start
        share = np.clip((points[:, :2] - start) @ along / max(float(along @ along), 1e-9), 0, 1)
        near = np.linalg.norm(points[:, :2] - start - share[:, None] * along, axis=1) < 0.11
        return float(points[near, 2].max(initial=0.0))

    def place(self, target: str, into: bool) -> np.ndarray:
        """Where an object's underside is to be released so that it comes to lie on, or falls into, an object or a region of one, (3,)."""
        site = target not in self.sim_env.obj_body_id
        if site:
            position = self.data.site_xpos[self.model.site(target).id]
            body = self.model.site_bodyid[self.model.site(target).id]
        else:
            body = self.body(target)
            position = np.append(self.middle(body), 0.0)
        points = self.points(body)
        near = points if into else points[np.linalg.norm(points[:, :2] - position[:2], axis=1) < 0.03]
        return np.append(position[:2], near[:, 2].max())

    def _world(self, geoms: np.ndarray) -> np.ndarray:
        rotations = self.data.geom_xmat[geoms].reshape(-1, 3, 3)
        return np.concatenate([self._local[int(geom)] @ rotation.T + self.data.geom_xpos[geom]
                               for geom, rotation in zip(geoms, rotations, strict=True)])

    def _surface(self, geom: int) -> np.ndarray:
        """Points on the surface of a geom in its own frame, (n, 3): a mesh's vertices, or a box, which bounds any other shape."""
        if self.model.geom_type[geom] == MESH:
            mesh = self.model.geom_dataid[geom]
            first, count = self.model.mesh_vertadr[mesh], self.model.mesh_vertnum[mesh]
            return np.array(self.model.mesh_vert[first : first + count], float)
        size = self.model.geom_aabb[geom, 3:]
        size = np.where(size < 2.0, size, 0.0)  # a plane has no end
        middle = self.model.geom_aabb[geom, :3]
        steps = [np.linspace(-half, half, min(2 + int(2 * half / SPACING), 40)) for half in size]
        grid = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 3)
        outside = (np.abs(np.abs(grid) - size) < 1e-9).any(axis=1)
        return grid[outside] + middle
