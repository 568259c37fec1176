"""What HDF5 demonstrations and rollouts may have beside the usual, and what becomes of each."""

import json

import h5py
import numpy as np
import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import ReplayStore
from cosmos_ray.replay.exchange.cosmos_hdf5 import export_rollouts, read_rollouts
from cosmos_ray.replay.exchange.importing import ImportOptions, import_episodes
from cosmos_ray.replay.exchange.robomimic import read_demonstrations
from cosmos_ray.replay.format.codec import decode_jpeg, encode_jpeg
from tests.test_replay_exchange_hostile import STEPS, picture, write_demo
from tests.test_replay_last_action import assert_windows_are_the_public_ones


def imported(tmp_path, path, read=read_demonstrations, **options):
    store = ReplayStore(tmp_path / "store")
    done = import_episodes(read, path, store, ImportOptions(**options))
    return done, [store.read(s.name) for s in sorted(store.summaries(), key=lambda s: s.key.seed)], store


def said(done, text):
    return any(text in note for note in done.notes)


def changed(tmp_path, change, name="a.hdf5"):
    """A robomimic file of one demonstration, changed by a function of the open file."""
    path = tmp_path / name
    write_demo(path)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


@pytest.mark.parametrize("where, name, value", [
    ("data/demo_0", "task_description", "do it"), ("data/demo_0", "lang", "do it"), ("data/demo_0", "language_instruction", "do it"),
    ("data/demo_0", "ep_meta", {"lang": "do it"}), ("data", "env_args", {"env_name": "X", "env_kwargs": {"env_lang": "do it"}}),
    ("data", "env_args", {"env_name": "X", "env_lang": "do it"}), ("data", "problem_info", {"language_instruction": ["do it"]}),
    ("data", "problem_info", {"language_instruction": '"do it"'}), ("data", "bddl_file_name", "a/b/KITCHEN_SCENE3_do_it.bddl"),
    ("data", "env_args", {"env_name": "Libero_X", "env_kwargs": {"bddl_file_name": "x/do_it.bddl"}}),
])  # fmt: skip
def test_the_text_is_found_wherever_the_writers_keep_it(tmp_path, where, name, value):
    def change(file):
        file["data"].attrs["env_args"] = json.dumps({"env_name": "X"})
        file[where].attrs[name] = json.dumps(value) if isinstance(value, dict) else value

    done, (episode,), _ = imported(tmp_path, changed(tmp_path, change))
    assert episode.instruction == "do it" and said(done, "bddl_file_name" if "bddl" in str(value) else name)


def test_a_text_in_a_dataset_and_a_demonstrations_own_before_the_files(tmp_path):
    def change(file):
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": "the file's"})
        file["data/demo_0/language_instruction"] = "the demonstration's"

    assert imported(tmp_path, changed(tmp_path, change))[1][0].instruction == "the demonstration's"
    assert imported(tmp_path / "asked", tmp_path / "a.hdf5", instruction="asked")[1][0].instruction == "asked"


def test_a_true_last_observation_is_taken_where_the_file_has_it(tmp_path):
    def change(file):
        demo = file["data/demo_0"]
        demo.copy("obs", "next_obs")
        demo["next_obs/agentview_image"][STEPS - 1] = picture(99)
        demo["next_obs/robot0_eef_pos"][STEPS - 1] = 7

    done, (episode,), store = imported(tmp_path, changed(tmp_path, change))
    assert episode.length == STEPS and "last_state_repeated" not in episode.info and not said(done, "not recorded")
    assert episode.proprio[STEPS][2:5].tolist() == [7, 7, 7] and np.isnan(episode.states[STEPS]).all()
    assert np.abs(decode_jpeg(episode.frames[STEPS][0]).astype(int) - picture(99)).mean() < 6
    assert store.view(store.keys()[0]).last_seen == STEPS


def test_what_is_not_read_is_named(tmp_path):
    def change(file):
        demo = file["data/demo_0"]
        demo["obs/agentview_depth"], demo["obs/object"] = np.zeros((STEPS, 16, 16, 1)), np.zeros((STEPS, 3))
        demo["datagen_info/x"] = np.zeros(3)
        file["statistics/x"], file["data/notes"] = np.zeros(3), np.zeros(3)

    done, (episode,), _ = imported(tmp_path, changed(tmp_path, change))
    assert said(done, "left out agentview_depth: the policy sees colour") and episode.cameras == ("agentview",)
    assert said(done, "not read: data/*/datagen_info, data/notes, obs/object, statistics")


@pytest.mark.parametrize("change, text", [
    (lambda file: file["data/demo_0/obs"].pop("robot0_eef_quat"), "no dataset 'robot0_eef_quat'"),  # 5 numbers would be no pose
    (lambda file: file.move("data/demo_0", "data/demo_99999999999999999999"), "has no demonstration"),  # no number of 64 bits
    (lambda file: file.__setitem__("observations/qpos", np.zeros(3)), "another layout: import it with --format aloha"),
])  # fmt: skip
def test_what_cannot_be_read_is_one_line(tmp_path, change, text):
    path = changed(tmp_path, lambda file: change(file) and None)
    try:
        why = imported(tmp_path, path)[0].skipped[0][1]
    except StoreError as error:
        why = str(error)
    assert text in why and "\n" not in why


def test_a_demonstration_that_failed_is_said_to_stay_out_of_training(tmp_path):
    done, (episode,), _ = imported(tmp_path, changed(tmp_path, lambda file: file.__setitem__("data/demo_0/rewards", np.zeros(STEPS))))
    assert not episode.success and said(done, "did not succeed, by their last reward or done, are stored and never trained on")


@pytest.mark.parametrize("name", ["episode_0", "demo0", "traj_12"])
def test_other_names_gaps_and_compressed_pictures(tmp_path, name):
    def change(file):
        file.copy("data/demo_0", "data/demo_7")
        file.move("data/demo_0", f"data/{name}")
        pictures = file["data/demo_7/obs/agentview_image"][:]
        del file["data/demo_7/obs/agentview_image"]
        file["data/demo_7/obs"].create_dataset("agentview_image", data=pictures, chunks=(3, 8, 8, 3), compression="gzip", shuffle=True)
        file["data/demo_7/actions"][:] += 1

    _, episodes, _ = imported(tmp_path, changed(tmp_path, change))
    assert sorted(e.key.seed for e in episodes) == sorted([int(name.strip("episodmtraj_")), 7])
    assert episodes[0].frames == episodes[1].frames


def test_a_camera_whose_dataset_has_no_known_ending(tmp_path):
    _, (episode,), _ = imported(tmp_path, changed(tmp_path, lambda file: file.move(
        "data/demo_0/obs/agentview_image", "data/demo_0/obs/cam_front")))
    assert episode.cameras == ("cam_front",)


@pytest.mark.parametrize("names, size", [
    (("robot0_eef_pos", "robot0_eef_quat"), 7),  # no gripper
    (("robot0_gripper_qpos", "robot0_eef_pos", "robot0_eef_quat", "robot1_gripper_qpos", "robot1_eef_pos", "robot1_eef_quat"), 18),
    (("robot0_right_gripper_qpos", "robot0_right_eef_pos", "robot0_right_eef_quat", "robot0_left_gripper_qpos", "robot0_left_eef_pos",
      "robot0_left_eef_quat"), 18),
    (("gripper_states", "ee_states"), 9),
])  # fmt: skip
def test_proprioception_of_other_robots_in_the_order_of_our_simulation(tmp_path, names, size):
    widths = {"gripper_qpos": 2, "eef_pos": 3, "eef_quat": 4, "gripper_states": 2, "ee_states": 6}
    width = {name: next(n for ending, n in widths.items() if name.endswith(ending)) for name in names}

    def change(file):
        obs = file["data/demo_0/obs"]
        for name in list(obs):
            if "image" not in name:
                del obs[name]
        for number, name in enumerate(names):
            obs[name] = np.full((STEPS, width[name]), number + 1.0)

    _, (episode,), _ = imported(tmp_path, changed(tmp_path, change))
    assert episode.proprio.shape == (STEPS + 1, size)
    if names[-1] != "ee_states":
        assert episode.proprio[0].tolist() == [number + 1.0 for number, name in enumerate(names) for _ in range(width[name])]


def write_robocasa_rollout(path, success=True):
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number, view in enumerate(("primary", "secondary", "wrist")):
            column = file.create_dataset(f"{view}_images_jpeg", (STEPS,), dtype=h5py.vlen_dtype(np.uint8))
            for t in range(STEPS):
                column[t] = np.frombuffer(encode_jpeg(picture(t + 20 * number)), np.uint8)
        file["proprio"], file["actions"] = rng.normal(size=(STEPS, 9)), rng.normal(size=(STEPS, 12))
        file["future_primary_images"] = np.zeros((2, 16, 16, 3), np.uint8)
        file.attrs["task_description"], file.attrs["success"] = "open the drawer", success
    return path


def test_a_rollout_of_robocasa_has_the_cameras_of_its_demonstrations_and_the_public_windows(tmp_path):
    path = write_robocasa_rollout(tmp_path / "episode_data--task=open_the_drawer--ep=3--success=True--regen_demo.hdf5")
    done, (episode,), store = imported(tmp_path, path, read_rollouts)
    assert episode.cameras == ("robot0_eye_in_hand", "robot0_agentview_left", "robot0_agentview_right")
    assert said(done, "of 12 numbers per action the first 7") and said(done, "not read: future_primary_images")
    assert episode.instruction == "open the drawer" and episode.key.task == "open_the_drawer"
    with h5py.File(path) as file:
        columns = [file[f"{view}_images_jpeg"][:] for view in ("wrist", "primary", "secondary")]
        frames = [[decode_jpeg(column[t]) for column in columns] for t in range(STEPS)]
        actions, proprio = file["actions"][:, :7].astype("f4"), file["proprio"][:].astype("f4")
        assert_windows_are_the_public_ones(store, episode.key.name, actions, proprio, frames)
    export_rollouts(store, store.summaries(), tmp_path / "out")
    (written,) = (tmp_path / "out").iterdir()
    with h5py.File(written) as again, h5py.File(path) as file:  # the same file, but for the numbers of the base
        assert all(np.array_equal(again[f"{view}_images_jpeg"][t], file[f"{view}_images_jpeg"][t])
                   for view in ("primary", "secondary", "wrist") for t in range(STEPS))
        assert np.array_equal(again["actions"][:], file["actions"][:, :7].astype("f4")) and len(again["proprio"]) == STEPS
    assert imported(tmp_path / "again", written, read_rollouts)[1][0].cameras == episode.cameras


def test_a_rollout_without_text_asks_for_it(tmp_path):
    path = write_robocasa_rollout(tmp_path / "x.hdf5")
    with h5py.File(path, "r+") as file:
        del file.attrs["task_description"]
    done, episodes, _ = imported(tmp_path, path, read_rollouts)
    assert not episodes and "give --instruction TEXT" in done.skipped[0][1]
    assert imported(tmp_path / "said", path, read_rollouts, instruction="go")[1][0].instruction == "go"
