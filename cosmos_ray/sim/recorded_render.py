"""Renders the states of other projects' robosuite recordings, which have no pictures."""

from __future__ import annotations

import hashlib
import os
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np

from cosmos_ray.config import SimConfig
from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.replay.exchange.recorded_states import RecordedStates, RenderedStates
from cosmos_ray.replay.format.codec import encode_cameras
from cosmos_ray.sim import gl
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.renderer import Renderer
from cosmos_ray.sim.shared_renderer import shared_renderer
from cosmos_ray.sim.slimming import full_xml


class RecordedStateRenderer:
    """Draws recorded states as this package's simulation shows them: cameras and picture size of ``config``, task and robots of the file.

    A file that has the model of its episode is drawn with that model (the sizes of objects and the places of fixed ones are in it),
    another one with the simulator's own. Call it as ``renderer(recorded)``, on one thread: OpenGL belongs to the first.
    """

    def __init__(self, config: SimConfig):
        self.config = config
        self._environment: Environment | None = None

    def __call__(self, recorded: RecordedStates) -> RenderedStates:
        """Pictures and proprioception of every state. StoreError in one line where the states do not fit."""
        try:
            env = self._made(recorded)
        except ConfigError as error:
            raise StoreError(f"{recorded.where} cannot be rendered: {error}") from error
        renderer, note = self._of_file(env, recorded), ""
        if renderer is None:
            renderer, note = self._of_simulator(env, recorded), "drawn with the simulator's own model: sizes of objects may differ"
        cameras = [_named(renderer.model.cam, name, recorded.where) for name in env.cameras]
        frames, proprio = [], []
        for state in recorded.states:
            renderer.data.qpos[:], renderer.data.qvel[:] = np.split(state[1:], [renderer.model.nq])
            frames.append(encode_cameras(renderer.draw(cameras)))  # this brings the bodies to the joints, too
            proprio.append(_proprio(env, renderer))
        return RenderedStates(env.cameras, frames, np.array(proprio, np.float32), note)

    def close(self) -> None:
        """Release the simulator."""
        if self._environment is not None:
            self._environment.close()
            self._environment = None

    def _made(self, recorded: RecordedStates) -> Environment:
        """The environment of the recorded task and robots. ConfigError where there is none."""
        sim = self.config
        config = SimConfig(
            task=recorded.task or sim.task, robots=recorded.robots or sim.robots, controller=sim.controller,
            wrist_cameras=sim.wrist_cameras, third_cameras=sim.third_cameras, image_size=sim.image_size,
            control_freq=sim.control_freq, quality=sim.quality, mesh_cell=sim.mesh_cell,
        )  # fmt: skip
        if self._environment is None or self._environment.config != config:
            self.close()
            self._environment = Environment(config)
        return self._environment

    def _of_file(self, env: Environment, recorded: RecordedStates) -> Renderer | None:
        """A renderer of the model in the file; None where the file has none that can be used."""
        xml = _usable(env, recorded.model)
        if xml is None:
            return None
        try:
            renderer = shared_renderer(hashlib.sha256(xml.encode()).hexdigest(), lambda: xml, self.config).get()
        except ValueError:  # MuJoCo does not compile it
            return None
        if not _fits(renderer.model, recorded):
            return None
        for site in map(renderer.model.site, range(renderer.model.nsite)):  # robosuite hides markers after it has compiled the model
            site.rgba[3] = 0.0
        return renderer

    def _of_simulator(self, env: Environment, recorded: RecordedStates) -> Renderer:
        if not _fits(env.model, recorded):
            raise StoreError(
                f"{recorded.where} has {recorded.states.shape[1]} numbers per state, {env.task} with {', '.join(env.config.robots)} has "
                f"{1 + env.model.nq + env.model.nv} here: it was recorded with another task, robot or version, so make its pictures there"
            )
        if _moved_by_resets(env):
            raise StoreError(
                f"{recorded.where} has no usable model_file, and its states do not say where {env.task} put its fixed objects: "
                "make its pictures where it was recorded"
            )
        renderer = shared_renderer(env.fingerprint["model"], lambda: full_xml(env.sim_env), self.config).get()
        renderer.model.site_rgba[:] = env.model.site_rgba
        return renderer


def _fits(model: Any, recorded: RecordedStates) -> bool:
    return bool(1 + model.nq + model.nv == recorded.states.shape[1])


def _usable(env: Environment, text: str) -> str | None:
    """The model with the asset paths of this machine; None unless it is whole and reads no file but robosuite's assets."""
    _, robosuite = gl.load()
    assets = os.path.realpath(os.path.join(robosuite.__path__[0], "models", "assets")) + os.sep
    try:
        root = ElementTree.fromstring(text)
        if root.find("asset") is None or root.find("worldbody") is None or root.find("compiler") is None:
            return None
        xml = env.sim_env.edit_model_xml(text)
        root = ElementTree.fromstring(xml)
    except (ElementTree.ParseError, ValueError, KeyError, AttributeError):
        return None
    foreign = [e for e in root.iter() if e.tag in ("include", "plugin", "extension", "model")]
    files = [os.path.realpath(e.attrib[name]) for e in root.iter() for name in e.attrib if name.startswith("file")]
    return xml if not foreign and all(file.startswith(assets) for file in files) else None


def _moved_by_resets(env: Environment) -> bool:
    """Whether resets move bodies that are fixed to the world, such as a door: the states of MuJoCo do not have their places."""
    places = []
    for seed in (0, 1):
        env.reset(seed)
        places.append(np.hstack([env.model.body_pos, env.model.body_quat])[env.model.body_weldid == 0])
    return not np.array_equal(*places)


def _proprio(env: Environment, renderer: Renderer) -> np.ndarray:
    """Proprioception of the pose in ``renderer``: as :meth:`Environment.proprio`, from the model of the file by the names of the robots."""
    data, parts = renderer.data, []
    for robot in env.sim_env.robots:
        for arm in robot.arms:
            if robot.has_gripper[arm]:
                parts.append(np.array([data.joint(name).qpos[0] for name in robot.gripper_joints[arm]]))
            parts.append(data.site(env.sim_env.sim.model.site_id2name(robot.eef_site_id[arm])).xpos)
            parts.append(np.roll(data.body(robot.robot_model.eef_name[arm]).xquat, -1))
    return np.concatenate(parts)


def _named(access: Any, name: str, where: str) -> int:
    try:
        return int(access(name).id)
    except KeyError as error:
        raise StoreError(f"{where} has a model without camera {name!r}, which the run's simulation has (sim.wrist_cameras, "
                         "sim.third_cameras): import into a run whose cameras it has") from error
