"""LeRobot datasets of every kind that is about: versions, where text lies, tables that disagree with the data."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import ReplayStore
from cosmos_ray.replay.exchange.importing import ImportOptions, import_episodes
from cosmos_ray.replay.exchange.lerobot import export_lerobot
from cosmos_ray.replay.exchange.lerobot_import import read_lerobot
from cosmos_ray.replay.format.codec import decode_jpeg

CASES = Path(__file__).parent / "data" / "cases"
BOWL, DRAWER = "put the bowl on the plate", "open the drawer"
IMAGE, IMAGE2 = "observation.images.image", "observation.images.image2"


def pictured(tmp_path):
    """Two episodes of eight rows, two cameras of pictures in the table."""
    return Path(shutil.copytree(CASES / "lerobot_camera_names" / "v3image", tmp_path / "set"))


def filmed(tmp_path):
    """Two episodes of eight rows in one video per camera, of two sizes."""
    return Path(shutil.copytree(CASES / "camera_sizes" / "camsizes", tmp_path / "videos"))


folder = pytest.fixture(pictured)
videos = pytest.fixture(filmed)


def data(folder, change):
    path = folder / "data/chunk-000/file-000.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def table_of_episodes(folder, **columns):
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, path)


def information(folder, change):
    path = folder / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def put(table, name, values):
    """The table with a column, in place of one of that name."""
    array = values if isinstance(values, pa.Array) else pa.array(values)
    return table.set_column(table.column_names.index(name), name, array) if name in table.column_names else table.append_column(name, array)


def taken(folder, tmp_path, **options):
    store = ReplayStore(tmp_path / "store")
    done = import_episodes(read_lerobot, folder, store, ImportOptions(**options))
    return done, {s.key.seed: store.view(s.name) for s in store.summaries()}


def original(tmp_path):
    return taken(CASES / "lerobot_camera_names" / "v3image", tmp_path / "original")[1]


def assert_same(found, wanted):
    assert sorted(found) == sorted(wanted)
    for number, view in found.items():
        for name in ("action", "proprio", "reward"):
            assert np.array_equal(view.column(name), wanted[number].column(name))
        assert view.spoken == wanted[number].spoken
        for camera in view.cameras:
            frames = [[v.stored_frame(camera, t).tobytes() for t in range(view.length)] for v in (view, wanted[number])]
            assert frames[0] == frames[1]


# ---------------------------------------------------------------- tables that disagree with the data


@pytest.mark.parametrize("columns", [
    {"length": [8, 5]}, {"dataset_from_index": [3, 99], "dataset_to_index": [0, 0]}, {"data/file_index": [7, 0]},
    {"data/chunk_index": [0, 2]},
], ids=["length", "range", "file", "chunk"])  # fmt: skip
def test_where_the_table_of_episodes_disagrees_the_rows_count(folder, tmp_path, columns):
    table_of_episodes(folder, **columns)
    done, found = taken(folder, tmp_path)
    assert_same(found, original(tmp_path))
    assert any("episode 1 has 8 rows" in note and "says 5" in note for note in done.notes) == ("length" in columns)


def test_an_episode_that_the_table_lacks_comes_in_by_its_rows(folder, tmp_path):
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).slice(0, 1), path)
    assert_same(taken(folder, tmp_path)[1], original(tmp_path))


def test_an_episode_without_rows_is_named(folder, tmp_path):
    data(folder, lambda table: table.slice(0, 8))
    done, found = taken(folder, tmp_path)
    assert sorted(found) == [0] and done.skipped == (("episode 1", "no file below data has rows of it"),)


def test_rows_that_begin_late_come_in_and_a_gap_does_not(folder, tmp_path):
    data(folder, lambda table: table.take([*range(2, 11), *range(12, 16)]))
    done, found = taken(folder, tmp_path)
    assert [view.length for view in found.values()] == [6]
    assert any("episode 0 has 6 rows in the data files from frame 2 on" in note for note in done.notes)
    assert "and not each of these once" in done.skipped[0][1]


def test_rows_out_of_order_and_over_several_files_are_put_together(folder, tmp_path):
    table = pq.read_table(folder / "data/chunk-000/file-000.parquet")
    pq.write_table(table.take([5, 3, 1, 15]), folder / "data/chunk-000/file-000.parquet")
    pq.write_table(table.take([0, 2, 4, 6, 7, *range(8, 15)]), folder / "data/chunk-000/file-001.parquet")
    assert_same(taken(folder, tmp_path)[1], original(tmp_path))


def test_a_damaged_data_file_is_named_and_the_rest_comes_in(folder, tmp_path):
    (folder / "data/chunk-000/file-001.parquet").write_bytes(b"PAR1 torn")
    done, found = taken(folder, tmp_path)
    assert len(found) == 2 and "file-001.parquet" in done.skipped[0][0] and "\n" not in done.skipped[0][1]


# ---------------------------------------------------------------- text


def test_the_text_is_found_in_a_column_named_task_too(folder, tmp_path):
    pq.write_table(pa.table({"task": [BOWL, DRAWER], "task_index": [0, 1]}), folder / "meta/tasks.parquet")
    assert_same(taken(folder, tmp_path)[1], original(tmp_path))


def test_tasks_out_of_order_go_by_their_number_and_that_is_said(folder, tmp_path):
    pq.write_table(pa.table({"task": [DRAWER, BOWL], "task_index": [1, 0]}), folder / "meta/tasks.parquet")
    done, found = taken(folder, tmp_path)
    assert_same(found, original(tmp_path))
    assert any("rows out of order" in note for note in done.notes)


def test_a_column_of_text_counts_when_asked(folder, tmp_path):
    texts = ["reach"] * 3 + ["grasp"] * 5 + ["pull"] * 8
    data(folder, lambda table: put(table, "language_instruction", texts))
    information(folder, lambda info: info["features"].update(language_instruction={"dtype": "string", "shape": [1], "names": None}))
    done, found = taken(folder, tmp_path, keys={"task": "language_instruction"})
    assert [view.spoken for view in found.values()] == [[(0, "reach"), (3, "grasp")], [(0, "pull")]]
    assert "instructions are those of column language_instruction" in done.notes


def test_subtasks_count_when_asked(folder, tmp_path):
    data(folder, lambda table: put(table, "subtask_index", [0] * 3 + [1] * 13))
    pq.write_table(pa.table({"subtask": ["reach", "pull"], "subtask_index": [0, 1]}), folder / "meta/subtasks.parquet")
    found = taken(folder, tmp_path, keys={"task": "subtask"})[1]
    assert [view.spoken for view in found.values()] == [[(0, "reach"), (3, "pull")], [(0, "pull")]]


def test_another_column_may_be_the_number_of_the_task(folder, tmp_path):
    data(folder, lambda table: put(table, "annotation.human.task", [1] * 16))
    found = taken(folder, tmp_path, keys={"task_index": "annotation.human.task"})[1]
    assert [view.instruction for view in found.values()] == [DRAWER, DRAWER]


def test_without_a_task_index_the_table_of_episodes_says_the_text(folder, tmp_path):
    data(folder, lambda table: table.drop_columns(["task_index"]))
    (folder / "meta/tasks.parquet").unlink()
    done, found = taken(folder, tmp_path)
    assert_same(found, original(tmp_path))
    assert "instructions are those of the table of episodes" in done.notes


def test_a_task_number_without_text_is_named(folder, tmp_path):
    data(folder, lambda table: put(table, "task_index", [0] * 8 + [9] * 8))
    assert taken(folder, tmp_path)[0].skipped == (("episode 1", "its task_index 9 is not in the dataset's table of 2 texts"),)


def test_an_instruction_that_is_given_counts_for_all(folder, tmp_path):
    done, found = taken(folder, tmp_path, instruction="wave", task="waving")
    assert done.instructions == {"wave": 2} and done.tasks == {"waving": 2} and {view.instruction for view in found.values()} == {"wave"}


# ---------------------------------------------------------------- versions, keys, numbers


def as_v2(source, target, version):
    """The dataset as formats v2.0 and v2.1 keep it: an episode per file, JSON lines."""
    info = json.loads((source / "meta/info.json").read_text())
    info |= {"codebase_version": version, "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
             "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"}  # fmt: skip
    table = pq.read_table(sorted(source.glob("data/*/*.parquet"))[0])
    tasks = pq.read_table(source / "meta/tasks.parquet")
    texts = dict(zip(tasks["task_index"].to_pylist(), tasks["__index_level_0__"].to_pylist(), strict=True))
    (target / "meta").mkdir(parents=True)
    (target / "data/chunk-000").mkdir(parents=True)
    (target / "meta/info.json").write_text(json.dumps(info))
    rows = [{"task_index": number, "task": text} for number, text in texts.items()]
    (target / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    episodes = []
    for number in sorted(set(table["episode_index"].to_pylist())):
        mine = table.filter(pa.compute.equal(table["episode_index"], number))
        pq.write_table(mine, target / f"data/chunk-000/episode_{number:06d}.parquet")
        episodes.append({"episode_index": number, "tasks": sorted({texts[i] for i in mine["task_index"].to_pylist()}), "length": len(mine)})
        for name, feature in info["features"].items():
            if feature["dtype"] == "video":
                path = target / f"videos/chunk-000/{name}/episode_{number:06d}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                cut(source / f"videos/{name}/chunk-000/file-000.mp4", path, 8 * number, 8, info["fps"])
    (target / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, episodes)) + "\n")


def cut(source, target, begin, length, fps):
    with av.open(str(source)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][begin : begin + length]
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "1", "bf": "2"})
        stream.height, stream.width = pictures[0].shape[:2]
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_versions_2_come_in_as_version_3_does(folder, tmp_path, version):
    as_v2(folder, tmp_path / "v2", version)
    done, found = taken(tmp_path / "v2", tmp_path)
    assert_same(found, original(tmp_path))
    assert done.embodiment.control_freq == 20


def test_version_2_has_a_video_for_each_episode(videos, tmp_path):
    as_v2(videos, tmp_path / "v2", "v2.1")
    found, wanted = taken(tmp_path / "v2", tmp_path, cameras=("top",))[1], taken(videos, tmp_path / "v3", cameras=("top",))[1]
    for number, view in found.items():
        assert np.array_equal(view.column("action"), wanted[number].column("action"))
        for t in range(8):
            ours, theirs = (decode_jpeg(v.stored_frame("top", t)).astype(int) for v in (view, wanted[number]))
            assert np.abs(ours - theirs).mean() < 3


def test_a_state_of_several_features_is_put_side_by_side(folder, tmp_path):
    data(folder, lambda table: put(table, "observation.extra", [[float(i), -1.0] for i in range(16)]))
    information(folder, lambda info: info["features"].update({"observation.extra": {"dtype": "float32", "shape": [2], "names": None}}))
    done, found = taken(folder, tmp_path, keys={"observation.state": "observation.state,observation.extra"})
    assert done.embodiment.proprio_dim == 10
    assert np.array_equal(found[1].column("proprio")[3, 8:], [11, -1])


def test_numbers_that_are_not_finite_are_named(folder, tmp_path):
    def change(table):
        values = np.array(table["action"].to_pylist(), np.float32)
        values[13, 2] = np.nan
        return put(table, "action", pa.array(values.tolist()))

    data(folder, change)
    done, found = taken(folder, tmp_path)
    assert sorted(found) == [0] and done.skipped[0][1] == "actions has a number that is not finite at step 5"


def test_rows_of_another_rate_than_the_dataset_says_are_noted(videos, tmp_path):
    information(videos, lambda info: info.update(fps=10))
    done = taken(videos, tmp_path, cameras=("top",))[0]
    assert any("rows are 0.0333 s apart, while meta/info.json says 10 a second" in note for note in done.notes)


@pytest.mark.parametrize("entry, odd", [("shape", 7), ("info", "x"), ("video_info", [1]), ("shape", {"h": 1})])
def test_a_description_of_the_wrong_kind_is_one_line(videos, tmp_path, entry, odd):
    information(videos, lambda info: info["features"]["observation.images.top"].update({entry: odd}))
    with pytest.raises(StoreError, match=f"not a LeRobot dataset that can be read: {entry} of feature observation.images.top is"):
        taken(videos, tmp_path)


@pytest.mark.parametrize("values", [["x"] * 16, [None] * 16, [[1.0, 2.0]] * 16])
def test_rows_without_the_number_of_their_episode_are_named(folder, tmp_path, values):
    data(folder, lambda table: put(table, "episode_index", values))
    done, found = taken(folder, tmp_path)
    assert not found and "file-000.parquet" in done.skipped[0][0] and len(done.skipped) == 3


def test_a_folder_of_datasets_is_one_line_that_names_them(tmp_path):
    with pytest.raises(StoreError, match="no meta/info.json; there is one in .*v3image"):
        taken(CASES / "lerobot_camera_names", tmp_path)


def test_a_folder_of_the_hugging_face_cache_is_read_as_given(folder, tmp_path):
    """Its files are links to blobs beside the snapshot."""
    cache = tmp_path / "datasets--lerobot--bowls"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        link = cache / "snapshots/0a1b" / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, cache / f"blobs/{number}")
        link.symlink_to(cache / f"blobs/{number}")
    found = taken(cache, tmp_path)[1]
    assert_same(found, original(tmp_path))
    assert found[0].header["run"] == "import:datasets--lerobot--bowls"


def test_a_dataset_cloned_without_its_large_files_says_how_to_get_them(videos, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"
    (videos / "videos/observation.images.top/chunk-000/file-000.mp4").write_text(pointer)
    assert "git lfs pull" in taken(videos, tmp_path, cameras=("top",))[0].skipped[0][1]
    (videos / "meta/tasks.parquet").write_text(pointer)
    with pytest.raises(StoreError, match="tasks.parquet is only a pointer to the file: run `git lfs pull`"):
        taken(videos, tmp_path)


def test_the_kind_of_robot_goes_out_again(videos, tmp_path):
    store = ReplayStore(tmp_path / "store")
    import_episodes(read_lerobot, videos, store, ImportOptions(cameras=("top",)))
    export_lerobot(store, store.summaries(), tmp_path / "out")
    assert json.loads((tmp_path / "out/meta/info.json").read_text())["robot_type"] == "so100_follower"
