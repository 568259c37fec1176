"""A task of LIBERO: how its environment is made, reset and judged, as the public evaluations do it."""

from __future__ import annotations

import functools
import hashlib
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_ray.config import SimConfig
from cosmos_ray.config.libero import check_published, libero_task
from cosmos_ray.errors import ConfigError, SimulationError
from cosmos_ray.seeds import purpose_of, state_seed
from cosmos_ray.sim import gl
from cosmos_ray.sim.libero import package
from cosmos_ray.sim.libero.states import published_states
from cosmos_ray.sim.robosuite_task import RobosuiteTask, controllers, reseed

FIXES = 1  #: version of what makes robosuite 1.5 behave as 1.4, part of the fingerprint
SETTLE_STEPS = 10  #: steps that do nothing, while objects come to rest, before the policy sees the first frame
CHANGED = ("body_pos", "body_quat", "site_rgba")  #: arrays of the model that LIBERO's tasks change: places of fixtures, flames
DRAWS = 1000  #: placements that are tried in one reset before it fails
AT_REST = 0.002  #: metres


class LiberoTask(RobosuiteTask):
    """The environment of ``config.task``. Published initial states belong to seeds of evaluations, and to those alone:
    :func:`cosmos_ray.seeds.state_seed`.

    Raises:
        ConfigError: LIBERO is not installed.
    """

    hold = 1  # the public evaluations end an episode at the first step that succeeds

    def __init__(self, config: SimConfig, make_seed: int):
        found = libero_task(config.task)
        assert found is not None
        self.name, (suite, number) = config.task, found
        package.load()
        from cosmos_ray.sim.libero.robot import GRIPPER

        mujoco, _ = gl.load()
        self.kinematics, self.version = mujoco.mj_kinematics, mujoco.__version__
        self.bddl = package.task_file(suite, number)
        self.states_file = package.states_file(suite, number)
        self.states = published_states(self.states_file)
        problem = package.problem_class(self.bddl)
        with _global_numpy(make_seed):
            self.env = self._drawn(lambda: problem(
                str(self.bddl), robots=list(config.robots), controller_configs=controllers(config), gripper_types=GRIPPER,
                initialization_noise=None, has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False,
                control_freq=config.control_freq, horizon=10**6, ignore_done=True, hard_reset=False, renderer="mujoco", seed=make_seed,
            ))  # fmt: skip
        # A hard reset appends its samplers of drawers and knobs to those that are there, so that each reset draws more numbers than the
        # one before. Ours are soft, and draw what the first hard reset draws.
        self.env.object_property_initializers *= 2
        self.env.edit_model_xml = functools.partial(_linear, self.env.edit_model_xml)
        self.published: int | None = None
        self._built: dict[str, np.ndarray] | None = None  #: of the model, since the first reset
        self.rests = False  #: whether the objects of a published state have been found where they should be

    @property
    def fingerprint(self) -> dict[str, str]:
        digests = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in (self.bddl, self.states_file)]
        return {"libero": f"{package.versions()} fixes {FIXES}", "bddl": digests[0], "published_states": digests[1]}

    def reset(self, seed: int) -> None:
        """A published initial state for the seed of an evaluation, and fresh placements from the task's own sampler for any other seed.

        The state of ``state_seed("eval", any, i)`` is published state ``i``, and is the same for every run seed.

        Raises:
            ConfigError: an evaluation's index is 50 or more.
            SimulationError: no placement was found in which no objects overlap.
        """
        purpose, index = purpose_of(seed)
        self.published = index if purpose == "eval" else None
        if self.published is not None:
            check_published(self.name, index)
            seed = 0  # fixtures are no part of a published state: they are where the public evaluations' seed puts them
        self._as_built()
        with _global_numpy(seed):
            reseed(self.env, seed)
            self._drawn(self.env.reset)
        if self.published is not None:
            self.env.sim.set_state_from_flattened(self.states[index])
            self.env.sim.forward()
            self.env._check_success()
            self.env._post_process()

    def begin(self, seed: int, stepper: Any) -> None:
        """Reset, and run the steps that do nothing. Before the first published state, check where objects come to rest.

        Raises:
            ConfigError: see :meth:`check_rest`.
        """
        if purpose_of(seed)[0] == "eval" and not self.rests:
            self.reset(state_seed("eval", 0, 0))
            self._settle(stepper)
            self.check_rest()
        self.reset(seed)
        self._settle(stepper)

    def check_rest(self) -> None:
        """Compare where the objects of published state 0 have come to rest with where they do in the pinned MuJoCo. MuJoCo 3.5 moves the
        bowl of libero_spatial/5 by 35 mm in all published states, say.

        Raises:
            ConfigError: an object lies elsewhere.
        """
        expected, found = _rest()[self.name], self._places()
        for name, place in expected.items():
            distance = float(np.linalg.norm(found[name] - place))
            if not distance < AT_REST:
                raise ConfigError(f"MuJoCo {self.version} moves {name} of {self.name} by {distance:.3f} m before an episode begins, so "
                                  "its results would not be LIBERO's: install the mujoco of requirements.txt")
        self.rests = True

    def _settle(self, stepper: Any) -> None:
        action = np.zeros(self.env.action_dim)
        action[-1] = -1.0  # an open hand
        for _ in range(SETTLE_STEPS):
            stepper.advance(action)
            self.env._post_action(action)
        self.bring_up()

    def judge(self, action: np.ndarray) -> bool:
        """As :meth:`RobosuiteTask.judge`, on the bodies' positions of one substep before, which LIBERO looks at."""
        self.env._post_action(action)
        holds = bool(self.env._check_success())
        self.bring_up()
        return holds

    def _places(self) -> dict[str, np.ndarray]:
        """Where every object that moves freely is, in metres."""
        qpos = self.env.sim.data._data.qpos
        addresses = {name: self.env.sim.model.get_joint_qpos_addr(body.joints[-1])[0] for name, body in self.env.objects_dict.items()}
        return {name: qpos[address : address + 3].copy() for name, address in addresses.items()}

    def _as_built(self) -> None:
        """Put back what resets and steps change in the model. A hard reset builds the model anew, and LIBERO's samplers then place objects
        on fixtures where these stand in the new model, before they are moved."""
        model = self.env.sim.model._model
        if self._built is None:
            self._built = {name: getattr(model, name).copy() for name in CHANGED}
        for name, values in self._built.items():
            getattr(model, name)[:] = values

    def _drawn(self, draw: Any) -> Any:
        """What ``draw`` returns, drawn again as long as it finds no place for all objects."""
        from robosuite.utils.errors import RandomizationError

        for _ in range(DRAWS):
            try:
                return draw()
            except RandomizationError:
                continue
        raise SimulationError(f"no placement of the objects of {self.name} was found in {DRAWS} draws")


@functools.cache
def _rest() -> dict[str, dict[str, list[float]]]:
    """Where the objects of each task's published state 0 come to rest, in metres, by task and object: measured with the pinned MuJoCo."""
    return json.loads((Path(__file__).parent / "rest.json").read_text(encoding="utf-8"))


@contextmanager
def _global_numpy(seed: int) -> Iterator[None]:
    """numpy's global generator, which LIBERO's samplers draw from, seeded; afterwards as it was."""
    before = np.random.get_state()
    # 0 as a plain number: that is how the public evaluations seed their only run.
    np.random.seed(0 if seed == 0 else np.random.SeedSequence(seed).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(before)


def _linear(edit: Any, xml: str) -> str:
    """The MJCF text with every texture in linear colours, as MuJoCo took them to be until 3.3.2."""
    root = ElementTree.fromstring(edit(xml))
    for texture in root.iter("texture"):
        texture.set("colorspace", "linear")
    return ElementTree.tostring(root, encoding="unicode")
