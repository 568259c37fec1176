"""LIBERO's tasks behind Environment: initial states, what is held out, restoring, the package's import."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.config.libero import LIBERO_SUITES, libero_names, libero_task
from cosmos_ray.errors import ConfigError
from cosmos_ray.seeds import purpose_of, state_seed
from cosmos_ray.sim import tasks
from cosmos_ray.sim.demonstration import demonstrate
from cosmos_ray.sim.embodiment import simulated
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.libero.package import states_file
from cosmos_ray.sim.libero.states import published_states
from cosmos_ray.sim.libero.task import _rest
from cosmos_ray.sim.resimulate import config_from_fingerprint

#: One task of each scene: floor, kitchen, living room, study, and the table of Spatial and Goal.
SCENES = ("libero_object/0", "libero_10/3", "libero_10/4", "libero_10/5", "libero_spatial/7")
ALL = tuple(f"{suite}/{number}" for suite, known in LIBERO_SUITES.items() for number in range(known.tasks))


@pytest.fixture(scope="module")
def bowl():
    """A task of Spatial: the bowl stands on the stove, a fixture that every reset places anew."""
    environment = Environment(SimConfig(task="libero_spatial/7"))
    yield environment
    environment.close()


def actions(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 7)).astype(np.float32)


def test_a_config_of_the_task_alone_is_liberos_environment(bowl):
    config = bowl.config
    assert (config.image_size, config.horizon, config.actions, config.control_freq) == (256, 220, "pose", 20)
    assert config.cameras == ("robot0_eye_in_hand", "agentview")
    assert bowl.instruction == "pick up the black bowl on the stove and place it on the plate"
    assert (bowl.action_dim, bowl.proprio_dim, bowl.moving) == (7, 9, (0, 1, 2))
    body = simulated(config)
    assert (body.action_dim, body.proprio_dim, body.moving) == (bowl.action_dim, bowl.proprio_dim, bowl.moving)
    assert bowl._stepper.name == "fused" and bowl.fingerprint["libero"].endswith("fixes 1")


def test_an_episodes_fingerprint_makes_its_environment_again(bowl):
    again = config_from_fingerprint(bowl.fingerprint)
    assert (again.task, again.cameras, again.image_size, again.quality, again.horizon) == (
        bowl.task, bowl.cameras, 256, "full", bowl.horizon)


def test_published_states_are_for_seeds_of_evaluations_and_for_every_run_seed_the_same(bowl):
    bowl.reset(state_seed("eval", 195, 11))
    first = bowl.state()
    assert bowl._task.published == 11
    bowl.reset(state_seed("eval", 196, 11))
    np.testing.assert_array_equal(bowl.state(), first)
    for purpose in ("demo", "rollout"):
        bowl.reset(state_seed(purpose, 195, 11))
        assert bowl._task.published is None
        assert np.abs(bowl.data.qpos[9:] - first[10 : 10 + len(bowl.data.qpos) - 9]).max() > 1e-3  # of other placements


def test_a_state_that_is_not_published_is_refused(bowl):
    with pytest.raises(ConfigError, match="libero_spatial/7 has 50 published initial states, and evaluation state 50 was asked for"):
        bowl.reset(state_seed("eval", 0, 50))


def test_no_demonstration_begins_in_a_state_of_evaluations(bowl):
    with pytest.raises(ConfigError, match="is of an evaluation's initial state, which is held out"):
        demonstrate(bowl, state_seed("eval", 0, 0))


def test_seeds_say_what_they_are_for():
    for purpose in ("demo", "rollout", "eval"):
        assert purpose_of(state_seed(purpose, 7, 12)) == (purpose, 12)


def test_a_reset_depends_on_its_seed_alone_and_leaves_the_global_generator_of_numpy(bowl):
    bowl.reset(5)
    first = bowl.state()
    for action in actions(8):
        bowl.step(action)
    bowl.reset(6)
    assert not np.array_equal(bowl.state(), first)
    np.random.seed(123)
    bowl.reset(5)
    np.testing.assert_array_equal(bowl.state(), first)
    drawn = np.random.rand()
    np.random.seed(123)
    assert drawn == np.random.rand()


def test_a_reset_that_finds_no_place_for_all_objects_draws_again(bowl):
    from robosuite.utils.errors import RandomizationError

    left = iter([RandomizationError, RandomizationError, None])

    def draw():
        if error := next(left):
            raise error("no place")
        return "placed"

    assert bowl._task._drawn(draw) == "placed"


def test_a_mujoco_that_moves_published_states_is_refused_by_its_version(bowl):
    """As MuJoCo 3.5 does with libero_spatial/5: what it does is put into the state here."""
    states, place = bowl._task.states.copy(), 1 + bowl.sim_env.sim.model.get_joint_qpos_addr("plate_1_joint0")[0]
    try:
        bowl._task.rests, bowl._task.states[0, place] = False, states[0, place] + 0.01
        with pytest.raises(ConfigError, match=rf"MuJoCo {bowl.mujoco.__version__} moves plate_1 of libero_spatial/7 by 0.01"):
            bowl.reset(state_seed("eval", 0, 2))
    finally:
        bowl._task.states[:] = states
    bowl.reset(state_seed("eval", 0, 2))
    assert bowl._task.rests and bowl._task.published == 2


def test_the_gripper_ramps_within_a_step_and_fused_steps_agree_with_robosuites(bowl):
    stock = Environment(SimConfig(task="libero_spatial/7", fast_step=False))
    try:
        for env in (bowl, stock):
            env.reset(3)
        for action in actions(12, seed=4):
            bowl.step(action)
            stock.step(action)
            np.testing.assert_allclose(bowl.data.qpos, stock.data.qpos, rtol=0, atol=1e-6)
        closing = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)
        for env in (bowl, stock):
            env.reset(3)
            commands = []
            for _ in range(3):
                env.step(closing)
                commands.append(float(env.sim_env.robots[0].gripper["right"].current_action[1]))
            np.testing.assert_allclose(commands, [-0.75, -0.5, -0.25], atol=1e-9)  # 25 times 0.01 a step, from fully open
        assert stock._stepper.name == "stock"
    finally:
        stock.close()


def test_many_resets_grow_nothing(bowl):
    def sizes():
        env = bowl.sim_env
        return [len(getattr(env, name)) for name in ("object_property_initializers", "objects", "fixtures", "_observables")] + [
            len(env.placement_initializer.samplers)]

    before = sizes()
    for seed in range(5):
        bowl.reset(seed)
    assert sizes() == before


@pytest.mark.parametrize("task", [*SCENES, *(pytest.param(task, marks=pytest.mark.slow) for task in ALL if task not in SCENES)])
def test_a_task_restores_and_repeats_bit_for_bit(task, bowl):
    env = bowl if task == bowl.task else Environment(SimConfig(task=task))
    try:
        assert set(tasks.LIBERO_CAMERAS) <= set(env.sim_env.sim.model.camera_names)
        chunk = actions(10)
        ends = []
        for seed in (state_seed("rollout", 0, 1), state_seed("eval", 0, 49)):
            env.reset(seed)
            begin = env.state()
            for action in chunk[:4]:
                env.step(action)
            middle = env.state()
            for action in chunk[4:]:
                env.step(action)
            ends.append((seed, begin, middle, env.state()))
        for seed, begin, middle, end in ends:
            env.restore(middle)
            for action in chunk[4:]:
                env.step(action)
            np.testing.assert_array_equal(env.state(), end)
            env.reset(seed)
            np.testing.assert_array_equal(env.state(), begin)
            for action in chunk:
                env.step(action)
            np.testing.assert_array_equal(env.state(), end)
    finally:
        if env is not bowl:
            env.close()


@pytest.mark.slow
def test_the_experts_outcomes_are_those_of_the_reference():
    """60 episodes of a scripted expert, recorded where LIBERO's results were made; at least 59 must end as there."""
    agree = 0
    for number in (0, 2, 7):
        env = Environment(SimConfig(task=f"libero_spatial/{number}"))
        with np.load(Path(__file__).parent / "data" / "libero" / f"expert_spatial_{number}.npz") as recorded:
            for index, expected in enumerate(recorded["ok"]):
                env.reset(state_seed("eval", 0, index))
                for action in recorded[f"a{index}"]:
                    if env.step(action).done:
                        break
                env.mujoco.mj_forward(env.model, env.data)  # the recorder looked at the end of the step, LIBERO one substep before
                agree += bool(env.success or env.sim_env._check_success()) == bool(expected)
        env.close()
    assert agree >= 59


def test_only_arrays_are_read_from_a_file_of_states(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harmed'}",)

    def written(content: object) -> Path:
        file = tmp_path / "task.pruned_init"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content))
        return file

    with pytest.raises(ConfigError, match="asks for posix.system while it is unpickled.*: install it again"):
        published_states(written(Harm()))
    assert not (tmp_path / "harmed").exists()
    with pytest.raises(ConfigError, match="does not hold 50 initial states"):
        published_states(written(np.zeros((3, 4))))
    (tmp_path / "task.pruned_init").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="cannot be read"):
        published_states(tmp_path / "task.pruned_init")
    assert published_states(states_file("libero_spatial", 0)).shape == (50, 92)


def test_every_task_has_a_file_and_an_instruction_without_the_name_of_its_place():
    for suite, known in LIBERO_SUITES.items():
        assert len(libero_names(suite)) == known.tasks
    assert SimConfig(task="libero_90/0").instruction == "close the top drawer of the cabinet"
    assert SimConfig(task="libero_10/2").instruction == "turn on the stove and put the moka pot on it"
    assert [SimConfig(task=f"{suite}/0").horizon for suite in LIBERO_SUITES] == [220, 280, 300, 520, 400]


@pytest.mark.parametrize("task, said", [
    ("libero_spatial", "write suite/number, such as libero_spatial/0"), ("libero_spatial/01", "write suite/number"),
    ("libero_kitchen/0", "the suites are libero_spatial, libero_object"), ("libero_goal/10", "are numbered 0 to 9")])
def test_a_name_of_no_task_is_refused(task, said):
    with pytest.raises(ConfigError, match=said):
        libero_task(task)


@pytest.mark.parametrize("settings, said", [
    ({"robots": ("Sawyer",)}, "sim.robots = Sawyer does not go with libero_goal/1: LIBERO's tasks are made for Panda"),
    ({"controller": "JOINT_POSITION"}, "sim.controller = JOINT_POSITION does not go with"),
    ({"placement": 0.1}, "sim.placement = 0.1 does not go with"), ({"control_freq": 10}, "sim.control_freq = 10 does not go with"),
    ({"third_cameras": ("robot0_agentview_left",)}, "has no camera 'robot0_agentview_left'")])
def test_what_liberos_tasks_are_not_made_for_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        tasks.validate(SimConfig(task="libero_goal/1", **settings))


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    libero_names.cache_clear()
    with pytest.raises(ConfigError, match=r"LIBERO is not installed, and its tasks need it: pip install 'cosmos-ray\[libero\]'"):
        SimConfig(task="libero_spatial/3")


def test_the_import_is_silent_and_writes_nothing_at_home(tmp_path):
    program = "from cosmos_ray.sim.libero import package; package.load()"
    environment = {**os.environ, "HOME": str(tmp_path), "COSMOS_RAY_CACHE": str(tmp_path / "cache")}
    environment.pop("LIBERO_CONFIG_PATH", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / ".libero").exists() and (tmp_path / "cache" / "libero").is_dir()


def test_every_task_has_its_places_of_rest():
    assert set(_rest()) == set(ALL)
