"""A state is the whole state: restoring one brings back every array of the model, whatever the task edits while it runs."""

from __future__ import annotations

import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.config.libero import LIBERO_SUITES
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.tasks import task_names

STOVE = "libero_goal/7"  #: turn on the stove
TWO_ARMS = {"TwoArmLift", "TwoArmPegInHole", "TwoArmHandover", "TwoArmTransport"}
QUICK = ("Wipe", "Door", STOVE)
TASKS = (*(name for name in task_names() if name not in ("Wipe", "Door")), *(f"{suite}/0" for suite in LIBERO_SUITES))

#: What tasks edit after the reset, beside the places of bodies that are fixed to the world.
EDITS = {"Wipe": {"geom_rgba"}, **dict.fromkeys((STOVE, "libero_spatial/0", "libero_goal/0"), {"site_rgba"})}  # these have a stove


def arrays(model) -> dict[str, np.ndarray]:
    """A copy of every array of a compiled model."""
    found = {name: getattr(model, name) for name in dir(model) if not name.startswith("_")}
    return {name: value.copy() for name, value in found.items() if isinstance(value, np.ndarray)}


def differing(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> set[str]:
    return {name for name, value in one.items() if not np.array_equal(value, other[name], equal_nan=value.dtype.kind == "f")}


def disturb(env: Environment) -> None:
    """Let the task do what it can: wipe the dirt, push down, draw at random, and turn the joints of its objects to their limits."""
    model, data, random = env.model, env.data, np.random.default_rng(0)
    hand = next(iter(env.sim_env.robots[0].eef_site_id.values()))
    dirt = env._snapshot.marker_geoms
    for number in range(60):
        action = random.uniform(-1, 1, env.action_dim)
        if number < 40:
            action[:] = 0.0
            if dirt:
                action[:3] = np.clip(10 * (data.geom_xpos[dirt].mean(axis=0) - data.site_xpos[hand]), -1, 1)
            action[2] = action[2] if dirt and number < 20 else -0.5
        env.step(action)
        env.done = False
    own = {joint for robot in env.sim_env.robots for joint in robot._ref_joint_indexes}
    for end in (0, 1):
        for joint in set(np.flatnonzero(model.jnt_type >= 2)) - own:
            data.qpos[model.jnt_qposadr[joint]] = model.jnt_range[joint, end]
        env.mujoco.mj_forward(model, data)
        env.step(np.zeros(env.action_dim))
        env.done = False


@pytest.mark.parametrize("task", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in TASKS)])
def test_restoring_brings_back_every_array_of_the_model(task):
    env = Environment(SimConfig(task=task, robots=("Panda", "Panda") if task in TWO_ARMS else ("Panda",), horizon=1000))
    env.reset(1)
    before, saved = arrays(env.model), env.state()
    disturb(env)
    assert differing(before, arrays(env.model)) == EDITS.get(task, set())
    env.reset(2)
    env.restore(saved)
    assert not differing(before, arrays(env.model))
    assert np.array_equal(env.state(), saved)
    env.close()


def test_a_burner_that_is_off_in_a_state_does_not_burn_in_its_picture():
    env = Environment(SimConfig(task=STOVE, image_size=128, quality="fast"))
    env.reset(1)
    off, dark = env.state(), env.render()
    disturb(env)
    knob = [name for name in map(env.sim_env.sim.model.joint_id2name, range(env.model.njnt)) if "stove" in name]
    env.restore(off)
    env.data.qpos[env.model.joint(knob[0]).qposadr[0]] = 1.5
    env.mujoco.mj_forward(env.model, env.data)
    env.step(np.zeros(env.action_dim))
    on = env.state()
    assert env.success
    burning = env.render()
    assert np.array_equal(env.render_state(off), dark)
    env.restore(off)
    assert np.array_equal(env.render(), dark)
    assert np.array_equal(env.render_state(on), burning)
    again = off.copy()  # the knob alone, without what it lit
    again[: 1 + env.model.nq] = on[: 1 + env.model.nq]
    assert np.abs(env.render_state(again).astype(int) - burning).max() > 30
    env.close()
