"""LeRobot datasets into a store: what the export wrote, and what is hostile or of another version."""

import json

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import ReplayStore
from cosmos_ray.replay.exchange import lerobot
from cosmos_ray.replay.exchange.importing import import_episodes
from cosmos_ray.replay.exchange.lerobot import export_lerobot
from cosmos_ray.replay.exchange.lerobot_import import read_lerobot
from cosmos_ray.replay.format.codec import decode_jpeg
from cosmos_ray.replay.format.episode import LAST_STATE_REPEATED
from tests.test_replay_episode import CAMERAS, make_episode


def original(seed):
    return make_episode(seed, source="rollout" if seed == 2 else "demo", length=12 + seed, size=32, success=seed != 2)


@pytest.fixture
def store(tmp_path):
    store = ReplayStore(tmp_path / "store")
    for seed in range(3):
        store.commit(original(seed))
    return store


def read_back(folder, tmp_path):
    other = ReplayStore(tmp_path / "other")
    done = import_episodes(read_lerobot, folder, other)
    return other, done, {s.key.seed: other.read(s.name) for s in other.refresh()}


def check(episode, wanted):
    """Every row there was; the last state repeats the last row, since what the last action led to is not in the format."""
    assert episode.length == wanted.length and episode.cameras == CAMERAS and episode.instruction == wanted.instruction
    assert np.array_equal(episode.actions, wanted.actions) and np.array_equal(episode.labels, wanted.labels)
    assert np.array_equal(episode.proprio, wanted.proprio[[*range(wanted.length), -2]]) and np.isnan(episode.states).all()
    assert episode.info[LAST_STATE_REPEATED] and episode.frames[episode.length] == episode.frames[episode.length - 1]
    assert (episode.success, episode.episode_return) == (wanted.success, wanted.episode_return)
    assert np.array_equal(episode.rewards, wanted.rewards)
    assert episode.key.source == wanted.key.source and np.array_equal(episode.step_versions, wanted.step_versions)


def test_stored_jpegs_come_back_byte_for_byte(tmp_path, store):
    export_lerobot(store, store.summaries(), tmp_path / "set", frames="image")
    other, done, episodes = read_back(tmp_path / "set", tmp_path)
    assert (done.episodes, done.known, done.skipped) == (3, 0, ())
    for seed, episode in episodes.items():
        check(episode, original(seed))
        assert {t: episode.frames[t] for t in range(episode.length)} == {t: original(seed).frames[t] for t in range(episode.length)}
    assert import_episodes(read_lerobot, tmp_path / "set", other).known == 3 and len(other) == 3


@pytest.mark.parametrize("rows", [20_000, 15])  # all in one file, or one file each
def test_videos_come_back_as_the_right_pictures(tmp_path, store, monkeypatch, rows):
    monkeypatch.setattr(lerobot, "ROWS_PER_FILE", rows)
    export_lerobot(store, store.summaries(), tmp_path / "set")
    assert len(list((tmp_path / "set" / "videos").rglob("*.mp4"))) == (2 if rows > 15 else 6)
    _, done, episodes = read_back(tmp_path / "set", tmp_path)
    assert done.episodes == 3 and not done.skipped
    for seed, episode in episodes.items():
        check(episode, original(seed))
        for t in range(episode.length):
            shown, wanted = decode_jpeg(episode.frames[t][1]).astype(int), decode_jpeg(original(seed).frames[t][1])
            assert np.abs(shown - wanted).mean() < 12  # a neighbouring frame is off by more


def test_png_pictures_as_lerobot_writes_them_are_taken_in(tmp_path, store):
    export_lerobot(store, store.summaries()[:1], tmp_path / "set", frames="image")
    path = tmp_path / "set/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    for camera in CAMERAS:
        name = f"observation.images.{camera}"
        pictures = [decode_jpeg(row["bytes"])[:, :, ::-1] for row in table[name].to_pylist()]
        pngs = [{"bytes": cv2.imencode(".png", picture)[1].tobytes(), "path": None} for picture in pictures]
        table = table.set_column(table.column_names.index(name), name, pa.array(pngs, table.schema.field(name).type))
    pq.write_table(table, path)
    (episode,) = read_back(tmp_path / "set", tmp_path)[2].values()
    shown, wanted = decode_jpeg(episode.frames[3][0]).astype(int), decode_jpeg(original(0).frames[3][0])
    assert np.abs(shown - wanted).mean() < 3


@pytest.mark.parametrize("how, message", [
    ("rows", "frames 0 to 11, and not each of these once"), ("video", "of 12 pictures"), ("no file", "no file below data has rows of it"),
    ("garbage", "Invalid data"), ("no video", "is missing"),
])  # fmt: skip
def test_a_damaged_episode_is_named_and_the_others_come_in(tmp_path, store, monkeypatch, how, message):
    monkeypatch.setattr(lerobot, "ROWS_PER_FILE", 15)
    export_lerobot(store, store.summaries(), tmp_path / "set")
    data = tmp_path / "set/data/chunk-000/file-000.parquet"
    video = tmp_path / "set/videos/observation.images.agentview/chunk-000/file-000.mp4"
    if how == "rows":
        table = pq.read_table(data)
        pq.write_table(pa.concat_tables([table.slice(0, 3), table.slice(4)]), data)
    elif how == "no video":
        video.unlink()
    elif how == "no file":
        data.unlink()
    elif how == "garbage":
        video.write_bytes(b"no video" * 99)
    else:
        with av.open(str(video), "w") as container:
            stream = container.add_stream("libx264", rate=20)
            stream.width = stream.height = 32
            for _ in range(5):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
            container.mux(stream.encode())
    _, done, episodes = read_back(tmp_path / "set", tmp_path)
    assert [which for which, _ in done.skipped] == ["episode 0"] and message in done.skipped[0][1] and "\n" not in done.skipped[0][1]
    assert sorted(episodes) == [1, 2]


def change(info, how):
    if how == "version":
        info["codebase_version"] = "v1.6"
    elif how == "fps":
        info["fps"] = 0
    elif how == "features":
        info["features"] = ["action"]
    elif how == "dtype":
        info["features"]["action"] = 7
    return info


@pytest.mark.parametrize("how", ["version", "fps", "features", "dtype", "no json", "empty"])
def test_what_is_no_v3_dataset_is_one_clear_error(tmp_path, store, how):
    export_lerobot(store, store.summaries(), tmp_path / "set")
    path = tmp_path / "set/meta/info.json"
    path.write_text({"no json": "{", "empty": ""}.get(how, json.dumps(change(json.loads(path.read_text()), how))))
    with pytest.raises(StoreError, match="LeRobot") as error:
        import_episodes(read_lerobot, tmp_path / "set", store)
    assert "\n" not in str(error.value)


def test_paths_out_of_the_folder_are_not_followed(tmp_path, store):
    export_lerobot(store, store.summaries(), tmp_path / "set")
    path = tmp_path / "set/meta/info.json"
    info = json.loads(path.read_text())
    info["data_path"] = info["video_path"] = "/etc/{chunk_index.__class__}"
    info["features"]["../../../secret"] = info["features"]["observation.images.agentview"]
    path.write_text(json.dumps(info))
    with pytest.raises(StoreError, match="no plain name"):
        read_back(tmp_path / "set", tmp_path)
