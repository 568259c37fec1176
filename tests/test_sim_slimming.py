"""The slim physics model against the full one."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.sim import environment
from cosmos_ray.sim.demonstration import CLEAN, demonstrate
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.slimming import same_physics


@pytest.mark.parametrize("task", ["Stack", pytest.param("Door", marks=pytest.mark.slow)])
def test_slim_model_gives_the_same_episode_bit_for_bit(task, monkeypatch):
    """A whole expert episode, rich in contacts."""
    slim = Environment(SimConfig(task=task))
    monkeypatch.setattr(environment, "slim", lambda env: None)
    full = Environment(SimConfig(task=task))
    assert mujoco.mj_sizeModel(slim.model) < mujoco.mj_sizeModel(full.model) / 10
    expected = demonstrate(full, 3, CLEAN, render_every=0)
    ours = demonstrate(slim, 3, CLEAN, render_every=0)
    assert np.array_equal(ours.states, expected.states)
    assert np.array_equal(ours.frames[0], expected.frames[0])
    slim.close()
    full.close()


_BODY = """<mujoco><worldbody><body><freejoint/>
<geom size="0.1" mass="1"/><geom size="0.1" contype="0" conaffinity="0" mass="{mass}" rgba="1 0 {blue} 1"/>
</body></worldbody></mujoco>"""


def test_change_of_mass_is_noticed():
    """A visual geom that gives its body mass must not be replaced."""
    massless, other, heavy = (
        mujoco.MjModel.from_xml_string(_BODY.format(mass=mass, blue=blue)) for mass, blue in ((0, 0), (0, 1), (0.1, 0))
    )
    assert same_physics(massless, other)
    assert not same_physics(massless, heavy)
