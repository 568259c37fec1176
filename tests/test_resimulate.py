"""Stored episodes simulated again: bit for bit the same, or the first step and the fingerprint entries that differ."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.replay import Episode, EpisodeKey, ReplayStore
from cosmos_ray.sim.demonstration import CLEAN, demonstrate
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.resimulate import Divergence, config_from_fingerprint, make_seed_of, resimulate
from cosmos_ray.sim.simulation import start

SEED = 5


@pytest.fixture(scope="module")
def lift():
    env = Environment(SimConfig(placement=0.05), make_seed=3)
    yield env
    env.close()


def episode_of(env: Environment, trajectory, seed: int, source: str = "rollout") -> Episode:
    info = {"horizon": env.horizon, "fingerprint": dict(env.fingerprint)}
    return Episode.from_trajectory(trajectory, EpisodeKey("run", env.task, source, seed), policy_version=0, info=info)


@pytest.fixture(scope="module")
def demo(lift) -> Episode:
    lift.horizon = 96
    return episode_of(lift, demonstrate(lift, SEED, CLEAN, render_every=0), SEED, "demo")


def random_episode(env: Environment, steps: int, horizon: int, broken: bool = False) -> Episode:
    env.horizon = horizon
    chunk = np.random.default_rng(0).uniform(-1.5, 1.5, (steps, env.action_dim)).astype(np.float32)
    if broken:
        chunk[-1] = np.nan
    trajectory = start(env, SEED)
    env.execute(chunk, trajectory)
    return episode_of(env, trajectory, SEED)


def test_an_episode_from_the_store_is_identical_without_the_runs_configuration(demo, tmp_path):
    store = ReplayStore(tmp_path / "store")
    store.commit(demo)
    result = resimulate(store.read(demo.key.name))
    assert result.identical and result.first_divergence is None and result.steps == demo.length
    assert result.reset_checked and result.reset_divergence is None
    assert (result.recorded_success, result.success) == (True, True)
    assert result.fingerprint_differences == {} and result.not_recorded == ()
    assert f"identical, {demo.length + 1} states bit for bit" in result.text()


def test_time_outs_and_invalid_episodes_are_compared_to_their_last_step(lift):
    timed_out = random_episode(lift, 12, horizon=12)
    assert timed_out.timed_out
    assert resimulate(timed_out, lift).identical
    del timed_out.info["horizon"]  # the horizon shows in the last state: it follows from the time-out
    assert resimulate(timed_out, lift).identical
    invalid = random_episode(lift, 9, horizon=50, broken=True)
    assert invalid.length == 8 and invalid.invalid
    result = resimulate(invalid, lift)
    assert result.identical and result.steps == 8 and "not finite" in result.text()


def test_a_changed_action_is_found_at_the_step_after_it(lift, demo):
    changed = copy.deepcopy(demo)
    changed.actions[7, 2] -= np.float32(0.25)
    result = resimulate(changed, lift)
    assert not result.identical and result.steps == demo.length
    assert result.first_divergence.step == 8
    assert 1 < result.first_divergence.entries < lift.state_dim and result.first_divergence.difference > 1e-6
    assert "first at step 8" in result.text()


def test_one_flipped_bit_of_one_state_is_found(lift, demo):
    flipped = copy.deepcopy(demo)
    bits = flipped.states[10].view(np.uint64)
    bits[4] ^= np.uint64(1)
    result = resimulate(flipped, lift)
    assert not result.identical and result.success
    here = demo.states[10, 4]
    expected = abs(here - flipped.states[10, 4])
    assert result.first_divergence == Divergence(10, 1, lift.state_dim, 4, expected) and expected > 0


def test_a_seed_that_does_not_give_the_initial_state_is_reported(lift, demo):
    other = copy.deepcopy(demo)
    other.key = EpisodeKey("run", "Lift", "demo", SEED + 1)
    result = resimulate(other, lift)
    assert result.identical and result.reset_divergence.step == 0 and result.reset_divergence.difference > 1e-3
    assert "another initial state" in result.text()


def test_ending_earlier_than_recorded_is_no_identity(lift, demo):
    late = copy.deepcopy(demo)
    late.info["horizon"] = 6
    result = resimulate(late, lift)
    assert not result.identical and result.steps == 6 and "over after 6 steps" in result.stopped
    assert (result.recorded_success, result.success) == (True, False)


def test_fingerprint_differences_and_entries_that_old_episodes_lack(lift, demo):
    old = copy.deepcopy(demo)
    fingerprint = old.info["fingerprint"]
    for entry in ("cpu", "simd", "platform", "gl", "numba", "robots"):
        del fingerprint[entry]
    fingerprint["mujoco"] = "3.1.0"
    result = resimulate(old)
    assert result.identical
    assert result.fingerprint_differences == {"mujoco": ("3.1.0", lift.fingerprint["mujoco"])}
    assert set(result.not_recorded) == {"cpu", "simd", "platform", "gl", "numba", "robots"}
    assert "mujoco was 3.1.0" in result.text() and "not recorded, so not compared: robots" in result.text()


def test_the_fingerprint_says_which_processor(lift):
    fingerprint = lift.fingerprint
    assert fingerprint["cpu"] and fingerprint["simd"] and fingerprint["platform"]
    if os.path.exists("/proc/cpuinfo"):
        text = open("/proc/cpuinfo").read()
        assert fingerprint["simd"] == "unknown" or all(name in text for name in fingerprint["simd"].split(","))


def test_every_setting_comes_back_from_the_fingerprint():
    config = SimConfig(robots=("UR5e",), controller="JOINT_POSITION", third_cameras=("frontview",), image_size=48, control_freq=10,
                       placement=0.07, mesh_cell=0.0, fast_step=False)
    env = Environment(config, make_seed=9)
    again = Environment(config_from_fingerprint(env.fingerprint), make_seed_of(env.fingerprint))
    assert again.fingerprint == env.fingerprint and again.cameras == env.cameras and again.action_dim == env.action_dim
    two_arms = config_from_fingerprint({**env.fingerprint, "robots": "Panda,Sawyer", "task": "TwoArmLift"})
    assert (two_arms.task, two_arms.robots) == ("TwoArmLift", ("Panda", "Sawyer"))
    env.close()
    again.close()


@pytest.mark.parametrize(
    "entry, value",
    [("task", None), ("render", "64 pixels"), ("actions", "OSC_POSE"), ("control_freq", "fast"), ("cameras", ""), ("placement", "wide"),
     ("placement", "nan"), ("make_seed", None), ("stepping", "quick"), ("render", "90000px cell 0.008"), ("control_freq", "0")],
)  # fmt: skip
def test_a_fingerprint_that_does_not_say_enough_is_refused_in_one_line(lift, demo, entry, value):
    damaged = copy.deepcopy(demo)
    damaged.info["fingerprint"][entry] = value
    if value is None:
        del damaged.info["fingerprint"][entry]
    with pytest.raises(ConfigError) as caught:
        resimulate(damaged)
    assert "\n" not in str(caught.value)
    assert entry in str(caught.value) or entry == "render"


def test_episodes_without_a_fingerprint_are_refused(demo):
    for info in ({}, {"fingerprint": {}}, {"fingerprint": "ab12"}):
        imported = copy.deepcopy(demo)
        imported.info = info
        with pytest.raises(ConfigError, match="no simulator fingerprint"):
            resimulate(imported)


def test_states_or_actions_of_another_size_are_refused(lift, demo):
    for name in ("states", "actions"):
        wrong = copy.deepcopy(demo)
        setattr(wrong, name, getattr(wrong, name)[:, :-1].copy())
        with pytest.raises(StoreError, match="numbers per"):
            resimulate(wrong, lift)


_PROCESS = """
import sys
from cosmos_ray.replay import ReplayStore
from cosmos_ray.sim.resimulate import resimulate
result = resimulate(ReplayStore(sys.argv[1]).read(sys.argv[2]))
assert result.identical, result.text()
"""


@pytest.mark.slow
def test_another_process_finds_it_identical_too(demo, tmp_path):
    ReplayStore(tmp_path / "store").commit(demo)
    subprocess.run([sys.executable, "-c", _PROCESS, str(tmp_path / "store"), demo.key.name], check=True,
                   env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})
