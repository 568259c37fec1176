"""A task of LIBERO: how its environment is made, reset and judged, as the public evaluations do it."""

from __future__ import annotations

import functools
import hashlib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cosmos_ray.config import SimConfig
from cosmos_ray.config.libero import PUBLISHED_STATES, libero_task
from cosmos_ray.errors import ConfigError, SimulationError
from cosmos_ray.seeds import purpose_of
from cosmos_ray.sim import gl
from cosmos_ray.sim.libero import package
from cosmos_ray.sim.libero.states import published_states
from cosmos_ray.sim.robosuite_task import RobosuiteTask, controllers, reseed

FIXES = 1  #: version of what makes robosuite 1.5 behave as 1.4, part of the fingerprint
SETTLE_STEPS = 10  #: steps that do nothing, while objects come to rest, before the policy sees the first frame
DRAWS = 1000  #: placements that are tried in one reset before it fails
STILL = 5.0  #: metres; no object of a published state moves as far while it settles


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
        if self.published is not None and index >= PUBLISHED_STATES:
            raise ConfigError(f"{self.name} has {PUBLISHED_STATES} published initial states, and evaluation state {index} was asked for: "
                              f"evaluate at most {PUBLISHED_STATES} (eval_episodes)")
        if self.published is not None:
            seed = 0  # fixtures are no part of a published state: they are where the public evaluations' seed puts them
        with _global_numpy(seed):
            reseed(self.env, seed)
            self._drawn(self.env.reset)
        if self.published is not None:
            self.env.sim.set_state_from_flattened(self.states[index])
            self.env.sim.forward()
            self.env._check_success()
            self.env._post_process()

    def settle(self, stepper: Any) -> None:
        """Run the steps that do nothing.

        Raises:
            SimulationError: objects of a published state do not stay where they are, as in versions of MuJoCo that LIBERO was not made
                with.
        """
        before = self._places()
        action = np.zeros(self.env.action_dim)
        action[-1] = -1.0  # an open hand
        for _ in range(SETTLE_STEPS):
            stepper.advance(action)
            self.env._post_action(action)
        self.bring_up()
        moved = {name: float(np.linalg.norm(place - before[name])) for name, place in self._places().items()}
        name = max(moved, key=lambda name: moved[name]) if moved else ""
        if self.published is not None and name and not moved[name] < STILL:
            raise SimulationError(f"MuJoCo {self.version} moves {name} of published state {self.published} of {self.name} by "
                                  f"{moved[name]:.3f} m before the episode begins: install the pinned mujoco of requirements.txt")

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

    def _drawn(self, draw: Any) -> Any:
        """What ``draw`` returns, drawn again as long as it finds no place for all objects."""
        from robosuite.utils.errors import RandomizationError

        for _ in range(DRAWS):
            try:
                return draw()
            except RandomizationError:
                continue
        raise SimulationError(f"no placement of the objects of {self.name} was found in {DRAWS} draws")


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
