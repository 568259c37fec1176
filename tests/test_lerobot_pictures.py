"""Pictures of LeRobot datasets: what is none, where they lie, how they are kept."""

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cosmos_ray.replay.format.codec import decode_jpeg
from tests.test_lerobot_kinds import IMAGE, assert_same, data, filmed, information, original, pictured, put, taken

folder = pytest.fixture(pictured)
videos = pytest.fixture(filmed)


@pytest.mark.parametrize("where, feature", [
    ("info", {"video.is_depth_map": True}), ("video_info", {"video.is_depth_map": True}), ("info", {"is_segmentation_mask": True}),
])  # fmt: skip
def test_what_is_marked_as_no_picture_is_left_out_and_said(videos, tmp_path, where, feature):
    def mark(info):
        del info["features"]["observation.images.wrist"]["info"]
        info["features"]["observation.images.wrist"][where] = feature

    information(videos, mark)
    done, found = taken(videos, tmp_path)
    assert found[0].cameras == ("top",)
    assert any(note.startswith("left out observation.images.wrist (marked as ") for note in done.notes)
    assert taken(videos, tmp_path / "asked", cameras=("wrist",))[1][0].cameras == ("wrist",)


def test_pictures_of_one_channel_and_of_depth_by_name_are_left_out(folder, tmp_path):
    def add(info):
        info["features"]["observation.images.top_depth"] = {"dtype": "image", "shape": [64, 64, 3], "names": ["height", "width", "channel"]}
        info["features"]["observation.images.heat"] = {"dtype": "image", "shape": [64, 64, 1], "names": ["height", "width", "channels"]}

    information(folder, add)
    done, found = taken(folder, tmp_path)
    assert found[0].cameras == ("image", "image2")
    assert any("top_depth (named like depth or a mask)" in note and "heat (of 1 channels)" in note for note in done.notes)


def test_pictures_beside_the_table_are_read_and_none_outside_of_the_folder(folder, tmp_path):
    table = pq.read_table(folder / "data/chunk-000/file-000.parquet")
    (folder / "images").mkdir()
    paths = []
    for number, cell in enumerate(table[IMAGE].to_pylist()):
        paths.append({"bytes": None, "path": f"images/{number}.png"})
        (folder / paths[-1]["path"]).write_bytes(cell["bytes"])
    (tmp_path / "secret.png").write_bytes(cell["bytes"])
    paths[12]["path"] = "../secret.png"
    data(folder, lambda table: put(table, IMAGE, pa.array(paths, table.schema.field(IMAGE).type)))
    done, found = taken(folder, tmp_path)
    assert_same(found, {0: original(tmp_path)[0]})
    assert "is no file within the dataset" in done.skipped[0][1]


@pytest.mark.parametrize("kind", ["float", "uint8", "channels first", "plain bytes"])
def test_pictures_as_numbers_or_plain_bytes_are_read_when_a_key_names_them(folder, tmp_path, kind):
    def change(table):
        pngs = [cell["bytes"] for cell in table[IMAGE].to_pylist()]
        if kind == "plain bytes":
            return put(table, "pixels", pngs)
        arrays = np.stack([cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1] for png in pngs])
        arrays = arrays.transpose(0, 3, 1, 2) if kind == "channels first" else arrays
        return put(table, "pixels", pa.array((arrays / np.float32(255) if kind == "float" else arrays).tolist()))

    data(folder, change)
    information(folder, lambda info: info["features"].update(pixels={"dtype": "float32", "shape": [64, 64, 3], "names": None}))
    found = taken(folder, tmp_path, keys={"observation.images.pixels": "pixels"})[1]
    wanted = original(tmp_path)
    assert found[0].cameras == ("image", "image2", "pixels")
    for number, view in found.items():
        for t in range(8):
            assert np.array_equal(decode_jpeg(view.stored_frame("pixels", t)), decode_jpeg(wanted[number].stored_frame("image", t)))


def test_the_orientation_is_said_and_pictures_are_turned_when_asked(folder, tmp_path):
    done, found = taken(folder, tmp_path, flip=True)
    assert "pictures are turned upside down, as --flip says" in done.notes
    plain, wanted = taken(folder, tmp_path / "plain")
    assert any("the format does not say which way is up" in note for note in plain.notes)
    for t in range(8):
        shown, upright = (decode_jpeg(view.stored_frame("image", t)).astype(int) for view in (found[1], wanted[1]))
        assert np.abs(shown - upright[::-1]).mean() < 2 and np.abs(shown - upright).mean() > 5


def test_a_camera_that_changes_its_size_is_named_and_resized_when_asked(folder, tmp_path):
    def change(table):
        cells = table[IMAGE].to_pylist()
        cells[11]["bytes"] = cv2.imencode(".png", np.zeros((32, 48, 3), np.uint8))[1].tobytes()
        return put(table, IMAGE, pa.array(cells, table.schema.field(IMAGE).type))

    data(folder, change)
    done, found = taken(folder, tmp_path)
    assert sorted(found) == [0] and "frames of image change in size, at step 3 from 64x64 to 32x48: give --resize N" in done.skipped[0][1]
    assert taken(folder, tmp_path / "again", resize=48)[0].sizes == {"image": (48, 48), "image2": (48, 48)}


def test_a_video_is_read_at_the_times_of_the_rows(videos, tmp_path):
    """The second episode begins where the first ends; each row has the picture of its time, as LeRobot takes it."""
    found = taken(videos, tmp_path, cameras=("top",))[1]
    with av.open(str(videos / "videos/observation.images.top/chunk-000/file-000.mp4")) as container:
        pictures = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    for number, view in found.items():
        for t in range(8):
            shown = decode_jpeg(view.stored_frame("top", t))
            away = [np.abs(shown - picture).mean() for picture in pictures]
            assert int(np.argmin(away)) == 8 * number + t and min(away) < 2
