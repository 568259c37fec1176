"""HDF5 files that users brought, as public reports describe them, and what their writers say is in them."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.errors import StoreError
from cosmos_ray.replay import ReplayStore
from cosmos_ray.replay.exchange.cosmos_demos import export_demonstrations
from cosmos_ray.replay.exchange.importing import ImportOptions, import_episodes
from cosmos_ray.replay.exchange.robomimic import read_demonstrations
from cosmos_ray.replay.format.codec import decode_jpeg
from cosmos_ray.sim.recorded_render import RecordedStateRenderer
from tests.test_replay_last_action import assert_windows_are_the_public_ones

CASES = Path(__file__).parent / "data" / "cases"
TEXTS = {f"pick the {thing} from the counter and place it in the sink" for thing in ("apple", "kettle")}


def case(name):
    (file,) = (CASES / name).rglob("*.hdf5")
    return file


def imported(tmp_path, file, **options):
    store = ReplayStore(tmp_path / "store")
    done = import_episodes(read_demonstrations, file, store, ImportOptions(**options))
    return done, [store.read(s.name) for s in sorted(store.summaries(), key=lambda s: s.key.seed)], store


def said(done, text):
    return any(text in note for note in done.notes)


def test_libero_of_openvla_is_taken_as_it_is_and_the_orientation_is_said(tmp_path):
    file = case("libero_openvla_regenerated")
    done, (episode,), store = imported(tmp_path, file)
    assert said(done, "taken as upright: the file does not say") and said(done, "openvla are not: --flip yes")
    assert episode.instruction == "pick up the black bowl between the plate and the ramekin and place it on the plate"
    assert said(done, "instruction taken from the file's name") and episode.cameras == ("robot0_eye_in_hand", "agentview")
    turned_done, (turned,), _ = imported(tmp_path / "turned", file, flip=True)
    assert said(turned_done, "turned upside down: --flip yes")
    with h5py.File(file) as source:
        demo = source["data/demo_0"]
        picture = demo["obs/agentview_rgb"][3].astype(int)
        for mine, wanted in ((episode, picture), (turned, picture[::-1])):
            assert np.abs(decode_jpeg(mine.frames[3][1]) - wanted).mean() < 4
        frames = [[decode_jpeg(jpeg) for jpeg in episode.frames[t]] for t in range(episode.length)]
        assert_windows_are_the_public_ones(store, episode.key.name, demo["actions"][:].astype(np.float32),
                                           demo["robot_states"][:].astype(np.float32), frames)


def test_robocasa_as_cosmos_policy_releases_it(tmp_path):
    file = case("robocasa_cosmos_release")
    done, episodes, store = imported(tmp_path, file)
    assert {e.instruction for e in episodes} == TEXTS and said(done, "the demonstration's attribute task_description")
    assert said(done, "of 12 numbers per action the first 7") and [e.key.seed for e in episodes] == [1, 3]
    for episode in episodes:
        assert episode.cameras == ("robot0_eye_in_hand", "robot0_agentview_left", "robot0_agentview_right")
        with h5py.File(file) as source:
            demo = source[f"data/demo_{episode.key.seed}"]
            jpegs = [demo[f"obs/{camera}_rgb_jpeg"][:] for camera in episode.cameras]
            assert all(episode.frames[t] == [column[t].tobytes() for column in jpegs] for t in range(8))
            frames = [[decode_jpeg(column[t]) for column in jpegs] for t in range(8)]
            assert_windows_are_the_public_ones(store, episode.key.name, demo["actions"][:, :7].astype(np.float32),
                                               demo["robot_states"][:].astype(np.float32), frames)


def test_robocasa_goes_out_as_the_public_loader_reads_it_and_comes_back(tmp_path):
    file = case("robocasa_cosmos_release")
    _, episodes, store = imported(tmp_path, file)
    export_demonstrations(store, store.summaries(), tmp_path / "out", suite="robocasa")
    again = {}
    for written in (tmp_path / "out").rglob("*.hdf5"):
        with h5py.File(written) as out, h5py.File(file) as source:  # the same file, but for the numbers of the base
            (demo,) = out["data"].values()
            text = demo.attrs["task_description"]
            (old,) = [other for other in source["data"].values() if other.attrs["task_description"] == text]
            assert np.array_equal(demo["actions"], old["actions"][:, :7].astype("f4")) and len(demo["states"]) == 8
            assert np.array_equal(demo["robot_states"], old["robot_states"][:].astype("f4"))
            for camera in episodes[0].cameras:
                column = f"obs/{camera}_rgb_jpeg"
                assert all(np.array_equal(demo[column][t], old[column][t]) for t in range(8))
        again |= {e.instruction: e for e in imported(tmp_path / "again", written)[1]}
    for episode in episodes:
        back = again[episode.instruction]
        assert back.cameras == episode.cameras and back.frames == episode.frames and np.array_equal(back.actions, episode.actions)


def test_robocasa_as_its_authors_write_it(tmp_path):
    done, episodes, _ = imported(tmp_path, case("robocasa_original"))
    assert {e.instruction for e in episodes} == TEXTS and said(done, 'ep_meta["lang"]') and set(done.tasks) == {"PnPCounterToSink"}
    assert all(e.actions.shape == (8, 7) and e.proprio.shape == (9, 9) for e in episodes) and said(done, "filters: 30_demos, train")
    assert said(done, "taken as upright: the file does not say, and robomimic and RoboCasa write them")
    assert said(done, "not read: obs/object")


def test_robomimic_of_a_known_task_has_its_instruction_not_the_files_name(tmp_path):
    file = case("robomimic_image")
    done, episodes, _ = imported(tmp_path, file)
    assert done.instructions == {"put the can into its bin": 2} and said(done, "the task PickPlaceCan")
    copy = Path(shutil.copy(file, tmp_path / "image.hdf5"))
    with h5py.File(copy, "r+") as source:
        source["data"].attrs["env_args"] = json.dumps({"env_name": "ToolHang", "env_kwargs": {"control_freq": 20}})
    nothing, left, _ = imported(tmp_path / "unknown", copy)
    assert not left and all("give --instruction TEXT" in why for _, why in nothing.skipped)
    done, (episode, _), _ = imported(tmp_path / "said", copy, instruction="hang the tool")
    assert episode.instruction == "hang the tool" and episode.key.task == "ToolHang" and episode.embodiment.control_freq == 20


@pytest.mark.parametrize("name, wanted", [("train", None), ("valid", None), ("", {0, 1})])
def test_a_filter_of_the_file_chooses_the_demonstrations(tmp_path, name, wanted):
    file = case("robomimic_image")
    with h5py.File(file) as source:
        wanted = wanted or {int(text.decode()[5:]) for text in source[f"mask/{name}"][:]}
    assert {e.key.seed for e in imported(tmp_path, file, filter=name)[1]} == wanted
    with pytest.raises(StoreError, match="no filter 'test'.*it has 20_percent, train, valid"):
        imported(tmp_path / "none", file, filter="test")


def test_robosuite_without_observations_says_how_and_renders_on_request(tmp_path):
    file = case("robosuite_raw")
    done, episodes, _ = imported(tmp_path, file)
    assert not episodes and {why.split(" has ")[1] for _, why in done.skipped} == {
        "simulator states and no pictures: --render makes them with the simulator of this package"}
    renderer = RecordedStateRenderer(SimConfig(image_size=64))
    done, episodes, _ = imported(tmp_path / "rendered", file, render=renderer)
    renderer.close()
    assert len(episodes) == 3 and said(done, "rendered from the simulator states") and done.instructions == {"lift the red cube": 3}
    for episode in episodes:
        assert episode.length == 20 and episode.proprio.shape == (21, 9) and set(episode.frames) == set(range(21))
        assert decode_jpeg(episode.frames[0][1]).shape == (64, 64, 3) and episode.info["last_state_repeated"]
        assert episode.success and episode.key.task == "Lift"
