"""Episodes in other projects' formats, made and read by the real libraries."""

import json
import os

import av
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import ReplayStore, WindowSampler, value_targets
from cosmos_ray.replay.exchange.cosmos_hdf5 import export_rollouts, read_rollouts
from cosmos_ray.replay.exchange.importing import ImportOptions, import_episodes
from cosmos_ray.replay.exchange.lerobot import CODECS, export_lerobot
from cosmos_ray.replay.exchange.observations import quaternions
from cosmos_ray.replay.exchange.parquet import export_parquet
from cosmos_ray.replay.exchange.ray_data import read_episodes
from cosmos_ray.replay.exchange.robomimic import read_demonstrations
from cosmos_ray.replay.exchange.video import open_video
from cosmos_ray.replay.format.codec import decode_jpeg, encode_jpeg
from tests.test_replay_episode import CAMERAS, make_episode

LENGTH = 12


@pytest.fixture
def store(tmp_path):
    """Three demonstrations with all frames, a failed rollout with some."""
    store = ReplayStore(tmp_path / "store")
    for seed in range(3):
        store.commit(make_episode(seed, length=LENGTH + seed, size=32))
    store.commit(make_episode(10, source="rollout", chunk=5, success=False, size=32))
    return store


def pictures(t, seed=0, size=32):
    gradient = np.linspace(0, 255, size * size * 3).reshape(size, size, 3)
    return np.roll(gradient, 5 * t + seed, 0).astype(np.uint8)


def write_libero(path, demos=2, steps=9, *, jpeg=False, convention="opengl", quaternion=False):
    """A file as LIBERO's own script writes it (or, with ``jpeg``, as the regenerated datasets are)."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Libero_Tabletop_Manipulation"})
        data.attrs["problem_info"] = json.dumps({"language_instruction": ["pick up the black bowl"]})
        data.attrs["bddl_file_name"] = "spatial.bddl"
        if convention:
            data.attrs["macros_image_convention"] = convention
        for number in range(demos):
            rng = np.random.default_rng(number)
            demo = data.create_group(f"demo_{number}")
            obs = demo.create_group("obs")
            for index, camera in enumerate(("agentview_rgb", "eye_in_hand_rgb")):
                frames = np.stack([pictures(t, index) for t in range(steps)])
                if jpeg:
                    column = obs.create_dataset(camera + "_jpeg", (steps,), dtype=h5py.vlen_dtype(np.uint8))
                    for t in range(steps):
                        column[t] = np.frombuffer(encode_jpeg(frames[t]), np.uint8)
                else:
                    obs[camera] = frames
            obs["gripper_states"], obs["ee_pos"], obs["ee_ori"] = (rng.normal(size=(steps, n)) for n in (2, 3, 3))
            if quaternion:
                demo["robot_states"] = rng.normal(size=(steps, 9))
            demo["actions"] = rng.uniform(-1, 1, (steps, 7))
            demo["states"] = rng.normal(size=(steps, 20))
            demo["rewards"], demo["dones"] = np.eye(steps)[-1].astype(np.uint8), np.eye(steps)[-1].astype(np.uint8)


def test_libero_demonstrations_come_in_upright_with_every_action(tmp_path):
    path = tmp_path / "pick_up_the_black_bowl_demo.hdf5"
    write_libero(path)
    store = ReplayStore(tmp_path / "store")
    done = import_episodes(read_demonstrations, path, store)
    assert (done.episodes, done.known, done.skipped) == (2, 0, ())
    episode = store.read(next(s.name for s in store.refresh() if s.key.seed == 1))
    with h5py.File(path) as file:
        demo = file["data/demo_1"]
        assert episode.length == 9 and np.array_equal(episode.actions, demo["actions"][:].astype(np.float32))
        assert np.array_equal(episode.states[:9], demo["states"][:]) and np.array_equal(episode.labels, episode.actions)
        assert np.allclose(episode.proprio[:9, :5], np.hstack([demo["obs/gripper_states"], demo["obs/ee_pos"]]))
        assert np.array_equal(episode.proprio[9], episode.proprio[8]) and episode.frames[9] == episode.frames[8]
        shown = decode_jpeg(episode.frames[3][0]).astype(int)
        assert np.abs(shown - demo["obs/eye_in_hand_rgb"][3][::-1]).mean() < 4
    assert episode.cameras == ("robot0_eye_in_hand", "agentview") and episode.instruction == "pick up the black bowl"
    assert episode.success and episode.rewards[-1] == 1 and episode.key.task == "pick_up_the_black_bowl" and episode.key.source == "demo"
    again = import_episodes(read_demonstrations, path, store)
    assert (again.episodes, again.known) == (2, 2) and len(store) == 2
    assert len(WindowSampler(store, chunk=4, gamma=0.9, seed=0).draw(8, "demo")) == 8


def test_stored_jpegs_are_taken_over_byte_for_byte(tmp_path):
    path = tmp_path / "task_demo.hdf5"
    write_libero(path, jpeg=True, convention="", quaternion=True)
    store = ReplayStore(tmp_path / "store")
    import_episodes(read_demonstrations, path, store, ImportOptions(task="bowl", instruction="lift it"))
    episode = store.read(next(iter(store.keys())))
    with h5py.File(path) as file:
        assert episode.frames[2][1] == file["data/demo_0/obs/agentview_rgb_jpeg"][2].tobytes()
        assert np.array_equal(episode.proprio[:-1], file["data/demo_0/robot_states"][:].astype(np.float32))
    assert episode.key.task == "bowl" and episode.instruction == "lift it"


def test_axis_angle_becomes_a_quaternion():
    turned = quaternions(np.array([[0, 0, 0], [np.pi, 0, 0], [0, 0, np.pi / 2]]))
    assert np.allclose(turned, [[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, np.sqrt(0.5), np.sqrt(0.5)]], atol=1e-6)


def test_robomimic_names_are_understood(tmp_path):
    path = tmp_path / "can.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "PickPlaceCan", "type": 1})
        demo, steps = data.create_group("demo_5"), 4
        obs = demo.create_group("obs")
        for name, width in (("robot0_gripper_qpos", 2), ("robot0_eef_pos", 3), ("robot0_eef_quat", 4)):
            obs[name] = np.ones((steps, width))
        obs["robot0_eye_in_hand_image"] = obs["agentview_image"] = np.stack([pictures(t) for t in range(steps)])
        demo["actions"], demo["states"] = np.zeros((steps, 7)), np.zeros((steps, 5))
        demo["dones"] = np.zeros(steps)
    store = ReplayStore(tmp_path / "store")
    assert import_episodes(read_demonstrations, path, store).episodes == 1
    (summary,) = store.refresh()
    assert (summary.task, summary.key.seed, summary.success) == ("PickPlaceCan", 5, False)
    assert store.read(summary.name).cameras == ("robot0_eye_in_hand", "agentview")


def damaged(path, how):
    with h5py.File(path, "r+") as file:
        demo = file["data/demo_0"]
        if how == "no actions":
            del demo["actions"]
        elif how == "lengths":
            del demo["states"]
            demo["states"] = np.zeros((3, 20))
        elif how == "nan":
            demo["actions"][2, 1] = np.nan
        elif how == "text":
            del demo["actions"]
            demo["actions"] = np.array([[b"a"] * 7] * 9)
        elif how == "huge":
            del demo["states"]
            demo.create_dataset("states", (9, 2**34), chunks=(1, 2**20), dtype="f8")
        elif how == "elsewhere":
            del demo["states"]
            demo["states"] = h5py.ExternalLink("/etc/passwd", "/states")
        elif how == "not a picture":
            del demo["obs/agentview_rgb"]
            demo["obs/agentview_rgb"] = np.zeros((9, 32))


@pytest.mark.parametrize("how, message", [
    ("no actions", "no dataset 'actions'"), ("lengths", "has 9 actions and {'states': 3}"), ("nan", "not finite"),
    ("text", "dimensions of numbers"), ("huge", "dimensions of numbers"), ("elsewhere", "links are not followed"),
    ("not a picture", "not of pictures of up to"),
])  # fmt: skip
def test_a_damaged_demonstration_is_named_and_the_others_come_in(tmp_path, how, message):
    path = tmp_path / "task_demo.hdf5"
    write_libero(path)
    damaged(path, how)
    store = ReplayStore(tmp_path / "store")
    done = import_episodes(read_demonstrations, path, store)
    assert done.episodes == 1 and [which for which, _ in done.skipped] == ["demo_0"] and message in done.skipped[0][1]
    assert [s.key.seed for s in store.refresh()] == [1]


@pytest.mark.parametrize("content", [b"", b"not hdf5" * 100])
def test_files_that_are_no_hdf5_are_one_clear_error(tmp_path, content):
    path = tmp_path / "x.hdf5"
    path.write_bytes(content)
    store = ReplayStore(tmp_path / "store")
    with pytest.raises(StoreError, match="cannot be read as HDF5") as error:
        import_episodes(read_demonstrations, path, store)
    assert "\n" not in str(error.value)
    assert import_episodes(read_rollouts, path, store).skipped[0][0] == str(path)


def test_cosmos_policy_files_come_back_as_they_went_out(tmp_path, store):
    done = export_rollouts(store, store.summaries(), tmp_path / "out")
    assert done.episodes == 3 and "frames are stored at 4 of 13 steps" in done.skipped[0][1]
    files = sorted((tmp_path / "out").iterdir())
    assert all("--success=True--" in file.name for file in files)
    with h5py.File(files[0]) as file:
        # What the public loader reads: libero_dataset.py, rollouts.
        assert len(file["primary_images_jpeg"]) == len(file["wrist_images_jpeg"]) == len(file["actions"]) == len(file["proprio"]) == LENGTH
        assert bool(file.attrs.get("success")) and file.attrs["task_description"] == "lift the cube 0"
        assert decode_jpeg(file["wrist_images_jpeg"][0]).shape == (32, 32, 3)
    other = ReplayStore(tmp_path / "other")
    assert import_episodes(read_rollouts, [tmp_path / "out"], other).episodes == 3
    assert import_episodes(read_rollouts, files, other).known == 3
    for summary in other.refresh():
        episode, original = other.read(summary.name), make_episode(summary.key.seed, length=LENGTH + summary.key.seed, size=32)
        steps = original.length
        assert episode.length == steps and np.array_equal(episode.actions, original.actions)
        assert np.array_equal(episode.proprio[:-1], original.proprio[:-1]) and episode.cameras == CAMERAS
        assert [episode.frames[t] for t in range(steps)] == [original.frames[t] for t in range(steps)]
        assert episode.success and summary.episode_class == "success" and episode.instruction == original.instruction


def test_parquet_has_every_step_and_small_row_groups(tmp_path, store):
    done = export_parquet(store, store.summaries(), tmp_path / "out")
    assert done.episodes == 4 and not done.skipped
    steps, episodes = pq.read_table(tmp_path / "out" / "steps.parquet"), pq.read_table(tmp_path / "out" / "episodes.parquet").to_pylist()
    assert [row["length"] for row in episodes] == [12, 13, 14, 12] and json.loads(episodes[0]["info"])["horizon"] == 100
    for row in episodes:
        original, mine = store.read(row["episode"]), steps.filter(np.array(steps["episode"]) == row["episode"])
        assert np.array_equal(np.array(mine["action"].to_pylist()[:-1], np.float32), original.actions)
        assert np.array_equal(np.array(mine["state"].to_pylist()), original.states)
        frames = mine[f"frame/{CAMERAS[1]}"].to_pylist()
        assert {t: jpeg for t, jpeg in enumerate(frames) if jpeg} == {t: images[1] for t, images in original.frames.items()}
    assert pq.ParquetFile(tmp_path / "out" / "steps.parquet").metadata.row_group(0).num_rows <= 64


def lerobot_checks(folder, frames):
    """What LeRobot's reader relies on (its format v3.0), read with the libraries it uses."""
    info, tasks = json.loads((folder / "meta/info.json").read_text()), pd.read_parquet(folder / "meta/tasks.parquet")
    episodes = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    data = pq.read_table(folder / "data/chunk-000/file-000.parquet")
    assert info["codebase_version"] == "v3.0" and info["fps"] == 20 and info["splits"] == {"train": "0:3"}
    assert info["total_frames"] == data.num_rows == 12 + 13 + 14 and info["total_episodes"] == len(episodes) == 3
    assert tasks.index.tolist() == [f"lift the cube {seed}" for seed in range(3)] and tasks.loc["lift the cube 1"].task_index == 1
    assert set(data.column_names) == {name for name, feature in info["features"].items() if feature["dtype"] != "video"}
    assert data["index"].to_pylist() == list(range(data.num_rows))
    for number, episode in enumerate(episodes):
        rows = data.slice(episode["dataset_from_index"], episode["length"])
        assert set(rows["episode_index"].to_pylist()) == {number} and rows["frame_index"].to_pylist() == list(range(episode["length"]))
        assert rows["next.done"].to_pylist() == [False] * (episode["length"] - 1) + [True]
        original = make_episode(number, length=LENGTH + number, size=32)
        assert np.array_equal(np.array(rows["action"].to_pylist(), np.float32), original.actions)
        assert np.array_equal(np.array(rows["observation.state"].to_pylist(), np.float32), original.proprio[:-1])
        assert np.array_equal(rows["value"].to_numpy(), value_targets(original.length, 1.0, 0.99)[:-1])
    stats = json.loads((folder / "meta/stats.json").read_text())
    assert np.allclose(stats["action"]["mean"], np.array(data["action"].to_pylist()).mean(0), atol=1e-6)
    assert np.allclose(stats["action"]["std"], np.array(data["action"].to_pylist()).std(0), atol=1e-6)
    assert np.shape(stats["observation.images.agentview"]["mean"]) == (3, 1, 1)
    return episodes, data


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_lerobot_dataset_with_videos(tmp_path, store, codec):
    done = export_lerobot(store, store.summaries(), tmp_path / "out", frames=codec)
    assert done.episodes == 3 and [which for which, _ in done.skipped] == [make_episode(10, source="rollout").key.name]
    episodes, _ = lerobot_checks(tmp_path / "out", codec)
    for index, camera in enumerate(CAMERAS):
        with av.open(str(tmp_path / "out" / f"videos/observation.images.{camera}/chunk-000/file-000.mp4")) as video:
            decoded = {round(float(frame.pts * frame.time_base) * 20): frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)}
        assert sorted(decoded) == list(range(39))
        for number, episode in enumerate(episodes):
            start = round(episode[f"videos/observation.images.{camera}/from_timestamp"] * 20)
            original = make_episode(number, length=LENGTH + number, size=32)
            shown = [decode_jpeg(original.frames[t][index]).astype(int) for t in range(episode["length"])]
            # A neighbouring frame is off by more: its picture is rolled by seven pixels.
            assert max(np.abs(decoded[start + t] - image).mean() for t, image in enumerate(shown)) < 12


def test_lerobot_dataset_with_the_stored_jpegs(tmp_path, store):
    export_lerobot(store, store.summaries(), tmp_path / "out", frames="image")
    _, data = lerobot_checks(tmp_path / "out", "image")
    original = make_episode(1, length=LENGTH + 1, size=32)
    pictures = data["observation.images.agentview"].to_pylist()[12:25]
    assert [picture["bytes"] for picture in pictures] == [original.frames[t][1] for t in range(13)]


def test_missing_frames_can_be_rendered_on_the_way_out(tmp_path, store):
    whole = make_episode(10, source="rollout", success=False, size=32)

    def render(view, steps):
        return {step: whole.frames[step] for step in steps}

    (summary,) = [s for s in store.summaries() if s.source == "rollout"]
    assert export_lerobot(store, [summary], tmp_path / "out", frames="image", render=render).episodes == 1
    table = pq.read_table(tmp_path / "out/data/chunk-000/file-000.parquet")
    assert [row["bytes"] for row in table["observation.images.agentview"].to_pylist()] == [whole.frames[t][1] for t in range(12)]


@pytest.mark.parametrize("export", [export_lerobot, export_rollouts, export_parquet])
def test_an_export_is_there_whole_or_not_at_all(tmp_path, store, export):
    (tmp_path / "taken").mkdir()
    with pytest.raises(StoreError, match="exists: give another path"):
        export(store, store.summaries(), tmp_path / "taken")
    with pytest.raises(StoreError, match="none of the 0 episodes can be written"):
        export(store, [], tmp_path / "nothing")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(store, store.summaries(), tmp_path / "stopped", progress=stop)
    assert sorted(os.listdir(tmp_path)) == ["store", "taken"]


def test_episodes_that_do_not_fit_the_first_are_named(tmp_path, store):
    store.commit(make_episode(5, size=64))
    done = export_lerobot(store, sorted(store.summaries(), key=lambda s: s.key.seed), tmp_path / "out")
    assert done.episodes == 3 and any("differ from the first" in why for _, why in done.skipped)


@pytest.mark.parametrize(("codec", "options"), CODECS.values(), ids=CODECS)
def test_an_encoder_does_not_take_the_processor_from_everyone_else(tmp_path, codec, options):
    """SVT-AV1 makes every thread of a process of root a real-time one, and whatever is started later inherits that."""
    container, stream = open_video(tmp_path / "video.mp4", codec, 20, (64, 64), options)
    with container:
        assert not real_time()
        for value in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), value, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    assert not real_time()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def real_time() -> list[str]:
    """Threads of this process that others have to wait for."""
    return [t for t in os.listdir("/proc/self/task") if os.sched_getscheduler(int(t)) in (os.SCHED_FIFO, os.SCHED_RR)]


def test_ray_data_reads_the_store(local_ray, store):
    rows = sorted(read_episodes(store.root, per_task=2).take_all(), key=lambda row: row["episode"])
    assert [row["episode"] for row in rows] == store.keys() and {row["success"] for row in rows} == {True, False}
    demos = [s for s in store.summaries() if s.source == "demo"]
    steps = read_episodes(store.root, demos, rows="step", per_task=2)
    assert steps.count() == sum(s.length + 1 for s in demos)
    first = steps.filter(lambda row: row["episode"] == demos[0].name and row["step"] == 3).take_all()[0]
    assert first[f"frame/{CAMERAS[0]}"] == make_episode(0, size=32).frames[3][0]
    assert np.allclose(first["action"], make_episode(0, size=32).actions[3])


def test_ray_data_leaves_a_damaged_episode_out(local_ray, store):
    os.truncate(store.summaries()[0].path, 500)
    assert read_episodes(store.root, store.summaries()).count() == 3
    with pytest.raises(StoreError, match="no episode to read"):
        read_episodes(store.root, [])
