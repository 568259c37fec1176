"""The environment: determinism, restoring, rendering, success and broken simulations."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.config.tasks import SPECS
from cosmos_ray.errors import SimulationError
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.robosuite_task import SUCCESS_HOLD
from cosmos_ray.sim.simulation import start

TASKS = tuple(SPECS)


@pytest.fixture(scope="module")
def make():
    """Environments by configuration, built once: building is the slow part."""
    built: dict[SimConfig, Environment] = {}

    def get(task: str = "Lift", **settings) -> Environment:
        config = SimConfig(task=task, **settings)
        if config not in built:
            built[config] = Environment(config)
        return built[config]

    yield get
    for environment in built.values():
        environment.close()


def actions(env: Environment, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, env.action_dim)).astype(np.float32)


def run(env: Environment, chunk: np.ndarray) -> np.ndarray:
    for action in chunk:
        env.step(action)
    return env.state()


def test_lift_has_the_shapes_of_the_demo(make):
    env = make()
    assert (env.action_dim, env.proprio_dim, env.horizon) == (4, 9, 96)
    trajectory = start(env, 3)
    assert trajectory.instruction == "lift the red cube"
    assert trajectory.frames[0].shape == (2, 64, 64, 3) and trajectory.frames[0].dtype == np.uint8
    assert trajectory.proprio[0].dtype == np.float32
    assert trajectory.states[0].shape == (env.state_dim,)


def test_proprio_agrees_with_robosuite(make):
    env = make()
    env.reset(2)
    robot = env.sim_env.robots[0]
    sensors, names = robot._create_arm_sensors("right", "proprio")
    values = {name: sensor({}) for name, sensor in zip(names, sensors, strict=True)}
    expected = np.concatenate([values["gripper_qpos"], values["eef_pos"], values["eef_quat"]])
    np.testing.assert_allclose(env.proprio(), expected, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_gives_the_same_state_and_other_seeds_do_not(make, task):
    env = make(task)
    env.reset(11)
    first = env.state()
    run(env, actions(env, 5))
    env.reset(12)
    assert not np.array_equal(env.state(), first)
    env.reset(11)
    assert np.array_equal(env.state(), first)


_EPISODE = """
import hashlib, numpy as np
from cosmos_ray.config import SimConfig
from cosmos_ray.sim.environment import Environment
env = Environment(SimConfig(task="{task}"))
env.reset(7)
chunk = np.random.default_rng(0).uniform(-1, 1, (10, env.action_dim)).astype(np.float32)
for action in chunk:
    env.step(action)
print(env.fingerprint["model"], hashlib.sha256(env.state().tobytes()).hexdigest())
"""


def test_another_process_gives_the_same_episode(make):
    import hashlib

    env = make("Door")
    env.reset(7)
    state = run(env, actions(env, 10))
    done = subprocess.run(
        [sys.executable, "-c", _EPISODE.format(task="Door")], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    assert done.stdout.split() == [env.fingerprint["model"], hashlib.sha256(state.tobytes()).hexdigest()]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("steps", [0, 13])
def test_restored_episode_continues_bit_identically(make, task, steps):
    env = make(task)
    env.reset(5)
    saved = run(env, actions(env, steps))
    rest = actions(env, 12, seed=1)
    expected = run(env, rest)
    env.reset(99)
    run(env, actions(env, 4, seed=2))
    env.restore(saved)
    assert np.array_equal(env.state(), saved)
    assert np.array_equal(run(env, rest), expected)
    assert env.step_index == steps + 12


def test_state_restores_in_another_environment_of_the_process(make):
    env = make("PickPlaceCan")
    env.reset(3)
    saved = run(env, actions(env, 6))
    other = Environment(SimConfig(task="PickPlaceCan"))
    other.restore(saved)
    rest = actions(env, 6, seed=1)
    assert np.array_equal(run(other, rest), run(env, rest))
    other.close()


def test_state_of_another_task_is_refused(make):
    with pytest.raises(SimulationError, match="shape"):
        make("Lift").restore(np.zeros(make("Stack").state_dim))


@pytest.mark.parametrize("task", TASKS)
def test_stored_state_renders_as_it_did_live(make, task):
    env = make(task)
    env.reset(4)
    state = run(env, actions(env, 10))
    live = env.render()
    env.reset(5)
    before = env.state()
    assert np.array_equal(env.render_state(state), live)
    assert np.array_equal(env.state(), before)
    assert not np.array_equal(env.render(), live)


def test_rendering_does_not_change_the_episode(make):
    env = make()
    chunk = actions(env, 8)
    env.reset(1)
    expected = run(env, chunk)
    env.reset(1)
    for action in chunk:
        env.step(action)
        env.render()
    assert np.array_equal(env.state(), expected)


def test_picture_is_upright_and_not_blank(make):
    """The front view looks down on the table before a grey wall; the cube is red."""
    env = make(third_cameras=("frontview",), wrist_cameras=(), image_size=96)
    env.reset(0)
    picture = env.render()[0].astype(int)
    assert picture.std() > 10
    red = np.argwhere(picture[..., 0] - picture[..., 1:].max(axis=2) > 60)
    assert len(red) > 3
    lifted = env.state()
    cube = env.data.qpos[env.model.jnt_qposadr[env.sim_env.sim.model.joint_name2id("cube_joint0")] + 2]
    lifted[1 + env.model.jnt_qposadr[env.sim_env.sim.model.joint_name2id("cube_joint0")] + 2] = cube + 0.1
    higher = env.render_state(lifted)[0].astype(int)
    red_higher = np.argwhere(higher[..., 0] - higher[..., 1:].max(axis=2) > 60)
    assert red_higher[:, 0].mean() < red[:, 0].mean() - 3


@pytest.mark.parametrize("task", TASKS)
def test_leaving_out_what_no_camera_sees_changes_no_pixel(make, task, monkeypatch):
    from cosmos_ray.sim.culling import Culling, Pass

    env = make(task)
    env.reset(6)
    run(env, actions(env, 6))
    culled = env.render()
    monkeypatch.setattr(Culling, "passes", lambda self, data, camera, pixels: [Pass(np.ones(self.model.ngeom, bool))])
    assert np.array_equal(env.render(), culled)


def test_thinned_meshes_look_like_the_full_ones(make):
    thinned, full = make(), make(mesh_cell=0.0)
    thinned.reset(0)
    full.reset(0)
    difference = np.abs(thinned.render().astype(int) - full.render())
    assert difference.mean() < 3


def test_environments_of_a_process_share_one_renderer(make):
    env, other = make(), Environment(SimConfig())
    start(env, 0)
    start(other, 0)
    assert env._shared is other._shared and env._shared.get() is other._shared.get()
    other.close()


def test_two_renderers_of_a_process_do_not_read_each_others_pictures(make):
    """Without selecting the buffer before each picture, the pixels of the other context were read."""
    small, large = make(), make("Stack", image_size=96)
    small.reset(0)
    large.reset(0)
    alone = small.render()
    large.render()
    assert np.array_equal(small.render(), alone)


def test_only_requested_frames_exist(make):
    env = make()
    trajectory = start(env, 0)
    env.execute(actions(env, 8), trajectory, render_at=(2, 5))
    assert sorted(trajectory.frames) == [0, 2, 5, 8]
    env.execute(actions(env, 8), trajectory)
    assert sorted(trajectory.frames) == [0, 2, 5, 8, 16]
    assert np.array_equal(trajectory.frames[5], env.render_state(trajectory.states[5]))
    assert len(trajectory.states) == len(trajectory.proprio) == trajectory.length + 1 == 17


def test_episode_times_out_at_the_horizon(make):
    env = make(horizon=10)
    trajectory = start(env, 0)
    env.execute(np.zeros((8, 4)), trajectory)
    assert not env.done
    env.execute(np.zeros((8, 4)), trajectory)
    assert trajectory.timed_out and trajectory.length == 10 and sum(trajectory.rewards) == 0
    with pytest.raises(SimulationError, match="over"):
        env.step(np.zeros(4))


def test_success_must_hold_for_three_steps(make):
    env = make()
    trajectory = start(env, 0)
    address = env.model.jnt_qposadr[env.sim_env.sim.model.joint_name2id("cube_joint0")]
    raised = trajectory.states[0].copy()
    raised[1 + address + 2] = 1.2  # the state vector begins with the time, then the joint positions
    env.restore(raised)
    env.execute(np.zeros((8, 4)), trajectory)
    assert trajectory.success and trajectory.rewards == [0.0] * (SUCCESS_HOLD - 1) + [1.0]


def test_actions_are_clipped_and_recorded_as_executed(make):
    env = make()
    trajectory = start(env, 0)
    env.execute(np.full((1, 4), 3.0), trajectory)
    env.reset(0)
    assert np.array_equal(run(env, np.ones((1, 4), np.float32)), trajectory.states[-1])
    assert np.array_equal(trajectory.actions[0], np.ones(4)) and trajectory.actions[0].dtype == np.float32


def test_action_that_is_not_finite_ends_the_episode_as_invalid(make):
    env = make()
    trajectory = start(env, 0)
    chunk = actions(env, 8)
    chunk[3, 1] = np.nan
    env.execute(chunk, trajectory)
    assert "not finite" in trajectory.invalid and trajectory.length == 3 and sorted(trajectory.frames) == [0, 3]
    assert trajectory.done and not trajectory.success
    start(env, 0)
    env.step(chunk[0])


def test_unstable_physics_ends_the_episode_as_invalid(make, tmp_path, monkeypatch):
    """MuJoCo itself only counts a warning, resets the state, writes MUJOCO_LOG.TXT and goes on."""
    monkeypatch.chdir(tmp_path)
    env = make()
    trajectory = start(env, 0)
    env.data.qvel[0] = 1e12
    env.execute(actions(env, 8), trajectory)
    assert "unstable physics" in trajectory.invalid and trajectory.length == 0
    assert not list(tmp_path.iterdir())
    env.reset(0)
    run(env, actions(env, 3))


def test_placement_narrows_a_bin_that_all_its_objects_would_not_fit_then(make):
    """PickPlaceCan places four objects before it takes three of them away."""
    narrow = make("PickPlaceCan", placement=0.03)
    can, positions = narrow.sim_env.obj_body_id["Can"], []
    for seed in range(25):
        narrow.reset(seed)
        positions.append(narrow.data.xpos[can][:2] - narrow.sim_env.bin1_pos[:2])
    reach = np.abs(positions).max(axis=0)
    assert (0.015 < reach).all() and (reach <= 0.03 + 1e-3).all()


def test_placement_sets_the_range_of_the_object(make):
    wide = make(placement=0.1)
    positions = []
    for seed in range(25):
        wide.reset(seed)
        positions.append(wide.data.xpos[wide.sim_env.cube_body_id][:2].copy())
    reach = np.abs(positions).max()
    assert 0.05 < reach <= 0.1
