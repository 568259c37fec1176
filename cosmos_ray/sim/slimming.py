"""Removes the renderer's data from a physics model: about 3 MiB per environment instead of 70 MiB.

Visual meshes and textures take nearly all memory of a robosuite model and have no part in its physics. The slim model keeps
the index of every body, geom, joint and material, so the same code works on both models.
"""

from __future__ import annotations

import ctypes
import logging
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

PHYSICS = (
    "body_",
    "jnt_",
    "dof_",
    "geom_",
    "site_",
    "actuator_",
    "sensor_",
    "tendon_",
    "eq_",
    "pair_",
    "exclude_",
    "qpos",
)
"""Prefixes of the model arrays that must not change."""


def slim_xml(xml: str) -> str:
    """The MJCF text with a small sphere for every visual mesh geom, without textures and unused meshes."""
    root = ElementTree.fromstring(xml)
    used = set()
    for geom in root.iter("geom"):
        mesh = geom.get("mesh")
        if mesh is None:
            continue
        if geom.get("contype") == "0" and geom.get("conaffinity") == "0":
            del geom.attrib["mesh"]
            geom.set("type", "sphere")
            geom.set("size", "0.001")
        else:
            used.add(mesh)
    asset = root.find("asset")
    if asset is None:
        return ElementTree.tostring(root, encoding="unicode")
    for unused in [mesh for mesh in asset.findall("mesh") if mesh.get("name") not in used]:
        asset.remove(unused)
    for texture in asset.findall("texture"):
        asset.remove(texture)
    for material in asset.findall("material"):
        material.attrib.pop("texture", None)
    return ElementTree.tostring(root, encoding="unicode")


def same_physics(full: Any, slim: Any) -> bool:
    """Whether two compiled models have the same physics, bit for bit.

    Ignores geoms without contacts and the poses of bodies fixed to the world, which tasks move at every reset.
    """
    compared = {"geom": (full.geom_contype != 0) | (full.geom_conaffinity != 0)}
    compared["body_pos"] = compared["body_quat"] = full.body_weldid != 0
    for name in dir(full):
        if not name.startswith(PHYSICS) or name == "geom_dataid":  # mesh indices shift as meshes are dropped
            continue
        before, after = getattr(full, name), getattr(slim, name)
        if not isinstance(before, np.ndarray):
            continue
        if before.shape != after.shape:
            return False
        chosen = compared.get(name, compared["geom"] if name.startswith("geom_") else slice(None))
        if not np.array_equal(before[chosen], after[chosen]):
            return False
    return True


def slim(env: Any) -> None:
    """Replace the model of a robosuite ``env`` by its slim equivalent. Reset the environment afterwards.

    Keeps the full model where slimming would change the physics, for example where a body takes its mass from a visual mesh.
    """
    for robot in env.robots:
        robot.robot_model.mujoco_model = None  # a second full model of the robot alone, for inverse kinematics only
    full = env.sim.model._model
    env._initialize_sim(xml_string=slim_xml(full_xml(env)))
    if not same_physics(full, env.sim.model._model):
        log.info("keeping the full model of %s, because slimming would change its physics", type(env).__name__)
        env._initialize_sim()
    trim_heap()


def trim_heap() -> None:
    """Return the memory that compiling a model freed to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def full_xml(env: Any) -> str:
    """The complete MJCF text of a robosuite ``env``, with asset paths of this machine."""
    return env.edit_model_xml(env.model.get_xml())
