"""Recordings of robosuite's own recorder, without pictures, are drawn by our simulation."""

import json

import h5py
import numpy as np
import pytest
import robosuite
from robosuite.scripts.collect_human_demonstrations import gather_demonstrations_as_hdf5
from robosuite.wrappers import DataCollectionWrapper

from cosmos_ray.config import SimConfig
from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange.recorded_states import RecordedStates
from cosmos_ray.replay.format.codec import decode_jpeg
from cosmos_ray.sim.recorded_render import RecordedStateRenderer
from cosmos_ray.sim.recorded_simulation import recorded_simulation

STEPS = 5


def record(folder, task, solve):
    """A file of two episodes by robosuite's recorder and its script; ``solve`` changes the simulation so that the recorder keeps them."""
    config = {"env_name": task, "robots": ["Panda"]}
    env = robosuite.make(**config, has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False, ignore_done=True,
                         seed=3)
    env = DataCollectionWrapper(env, str(folder / "raw"))
    rng, seen = np.random.default_rng(0), []
    for _ in range(2):
        env.reset()
        seen.append([])
        for step in range(STEPS):
            seen[-1].append(env.env._get_observations(force_update=True))
            if step >= STEPS - 3:
                solve(env.sim.data)
            env.step(rng.uniform(-1, 1, env.action_dim))
    env.close()
    gather_demonstrations_as_hdf5(str(folder / "raw"), str(folder), json.dumps(config))
    return folder / "demo.hdf5", seen


def lift(data):
    place = data.get_joint_qpos("cube_joint0")
    place[2] = 1.0
    data.set_joint_qpos("cube_joint0", place)


@pytest.fixture(scope="module")
def renderer():
    made = RecordedStateRenderer(SimConfig(image_size=64))
    yield made
    made.close()


def recorded_of(path, number):
    with h5py.File(path) as file:
        demo = file[f"data/demo_{number}"]
        return RecordedStates(f"demo_{number}", file["data"].attrs["env"], ("Panda",), demo.attrs["model_file"], demo["states"][()])


def test_states_of_the_recorder_are_drawn_with_the_model_of_their_episode(tmp_path, renderer):
    path, seen = record(tmp_path, "Lift", lift)
    shown = [renderer(recorded_of(path, number)) for number in (1, 2)]
    known = {tuple(np.round(o[0]["cube_pos"], 6)): o for o in seen}  # the script's order of episodes is that of the folder
    for number, pictures in zip((1, 2), shown, strict=True):
        assert pictures.cameras == ("robot0_eye_in_hand", "agentview") and len(pictures.frames) == STEPS and not pictures.note
        state = recorded_of(path, number).states[0]
        observed = known[tuple(np.round(state[10:13], 6))]
        for t in range(STEPS):
            wanted = np.hstack([observed[t][f"robot0_{name}"] for name in ("gripper_qpos", "eef_pos", "eef_quat")])
            assert np.array_equal(pictures.proprio[t][:2], wanted[:2].astype(np.float32))
            assert np.allclose(pictures.proprio[t], wanted, atol=5e-3)  # robosuite observes bodies a substep behind the joints
    cubes = [_red(decode_jpeg(pictures.frames[0][1])) for pictures in shown]
    assert all(len(cube) > 3 for cube in cubes) and np.abs(cubes[0].mean(0) - cubes[1].mean(0)).max() > 0.4  # each where it was


def _red(picture):
    """(n, 2): the pixels of the cube."""
    picture = picture.astype(int)
    return np.argwhere((picture[..., 0] > 100) & (picture[..., 1] < 60))


def test_a_fixed_body_is_where_the_model_of_the_file_has_it(tmp_path, renderer):
    """The states of MuJoCo do not have the place of a door: without the model it cannot be drawn, and one line says so."""
    path, _ = record(tmp_path, "Door", lambda data: data.set_joint_qpos("Door_hinge", 0.4))
    one, two = (renderer(recorded_of(path, number)) for number in (1, 2))
    views = [decode_jpeg(shown.frames[0][1]).astype(int) for shown in (one, two)]
    assert np.abs(views[0] - views[1]).mean() > 3
    with h5py.File(path, "r+") as file:
        file["data/demo_1"].attrs["model_file"] = "<mujoco/>"
    with pytest.raises(StoreError, match="no usable model_file.*fixed objects"):
        renderer(recorded_of(path, 1))


def test_without_a_model_the_simulators_own_is_drawn_and_said(renderer):
    states = np.zeros((2, 32))
    states[:, 13] = 1  # the cube's quaternion
    shown = renderer(RecordedStates("x", "Lift", ("Panda",), "", states))
    assert "own model" in shown.note and shown.proprio.shape == (2, 9)


@pytest.mark.parametrize("model", [
    "<mujoco><include file='/etc/passwd'/><asset/><compiler/><worldbody/></mujoco>",
    "<mujoco><asset><mesh name='a' file='/etc/hostname'/></asset><compiler/><worldbody/></mujoco>", "no xml", "<mujoco/>",
])  # fmt: skip
def test_a_model_that_reads_other_files_or_is_none_is_not_used(renderer, model):
    assert "own model" in renderer(RecordedStates("x", "Lift", ("Panda",), model, np.zeros((1, 32)))).note


def test_states_that_do_not_fit_are_one_line(renderer):
    with pytest.raises(StoreError, match="has 40 numbers per state, Lift with Panda has 32 here"):
        renderer(RecordedStates("demo_1", "Lift", ("Panda",), "", np.zeros((2, 40))))
    with pytest.raises(StoreError, match="demo_1 cannot be rendered: unknown task"):
        renderer(RecordedStates("demo_1", "PnPCounterToSink", ("Panda",), "", np.zeros((2, 40))))


def test_a_recording_that_names_no_controller_has_robosuites_own():
    """It moves and turns the hand: 7 numbers per action, also where our own task takes 4."""
    values = recorded_simulation({"env_args": {"env_name": "Lift", "env_kwargs": {"robots": ["Panda"]}}})
    assert (values["sim.task"], values["sim.robots"], values["sim.actions"]) == ("Lift", ("Panda",), "pose")
