"""Files as people bring them: pictures of other channels and numbers, folders behind links, files of another kind under an HDF5 name."""

import gzip
import io

import cv2
import h5py
import numpy as np
import pytest
from PIL import Image

from cosmos_ray.commands.cli import main
from cosmos_ray.errors import StoreError
from cosmos_ray.replay import ReplayStore
from cosmos_ray.replay.exchange.cosmos_hdf5 import read_rollouts
from cosmos_ray.replay.exchange.importing import import_episodes
from cosmos_ray.replay.exchange.lerobot_pictures import from_cell
from cosmos_ray.replay.exchange.pixels import as_rgb
from cosmos_ray.replay.exchange.robomimic import read_demonstrations
from cosmos_ray.replay.format.codec import decode_jpeg
from tests.test_replay_exchange_hdf5_kinds import changed, imported
from tests.test_replay_exchange_hostile import STEPS, picture, write_demo

PICTURE = "data/demo_0/obs/agentview_image"


def with_pictures(tmp_path, array):
    def change(file):
        del file[PICTURE]
        file[PICTURE] = array

    return changed(tmp_path, change)


@pytest.mark.parametrize("kind", ["grey", "one channel", "alpha", "channels first", "fractions", "int64"])
def test_pictures_of_other_channels_and_numbers_are_the_same_pictures(tmp_path, kind):
    colour = np.stack([picture(t) for t in range(STEPS)])
    grey = colour[..., 0]
    array = {"grey": grey, "one channel": grey[..., None], "int64": colour.astype(int),
             "alpha": np.concatenate([colour, grey[..., None]], 3),
             "channels first": colour.transpose(0, 3, 1, 2), "fractions": (colour / 255).astype(np.float32)}[kind]
    wanted = np.repeat(grey[..., None], 3, 3) if kind in ("grey", "one channel") else colour
    for t in range(STEPS):
        assert np.array_equal(as_rgb(array[t], "here"), wanted[t])
    done, (episode,), _ = imported(tmp_path, with_pictures(tmp_path, array))
    assert not done.skipped
    assert max(np.abs(decode_jpeg(episode.frames[t][0]).astype(int) - wanted[t]).mean() for t in range(STEPS)) < 6


@pytest.mark.parametrize("array, why", [
    (np.full((STEPS, 16, 16), 4000, np.uint16), "numbers outside of 0 to 255: write them as uint8"),  # depth in millimetres
    (np.full((STEPS, 16, 16, 3), 200.0), "fractions outside of 0 to 1: write them as uint8 from 0 to 255"),
    (np.zeros((STEPS, 16, 16, 2), np.uint8), "arrays of shape (16, 16, 2) and type uint8"),
    (np.zeros((STEPS, 16, 16, 3), "S1"), "type |S1"),
])  # fmt: skip
def test_what_is_no_picture_says_what_it_is(tmp_path, array, why):
    done, episodes, _ = imported(tmp_path, with_pictures(tmp_path, array))
    assert not episodes and why in done.skipped[0][1] and "agentview_image" in done.skipped[0][1]


def test_a_jpeg_that_was_held_otherwise_is_turned_as_lerobot_turns_it(tmp_path):
    upright = cv2.resize(np.tile(np.arange(16, dtype=np.uint8)[:, None, None] * 16, (1, 16, 3)), (32, 32))

    def jpeg(orientation):
        image, data = Image.fromarray(upright), io.BytesIO()
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(data, "JPEG", exif=exif, quality=95)
        return data.getvalue()

    assert from_cell({"bytes": jpeg(1), "path": None}, "camera", tmp_path) == jpeg(1)
    turned = decode_jpeg(from_cell({"bytes": jpeg(3), "path": None}, "camera", tmp_path)).astype(int)
    assert np.abs(turned - upright[::-1, ::-1]).mean() < 4
    with pytest.raises(StoreError, match="camera has a row without a picture"):
        from_cell(None, "camera", tmp_path)


def test_folders_behind_links_are_read_once_and_links_to_nothing_are_named(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    write_demo(elsewhere / "a.HDF5")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(".")
    (elsewhere / "circle").symlink_to(elsewhere)
    (folder / "gone.hdf5").symlink_to("nowhere.hdf5")
    done = import_episodes(read_demonstrations, folder, ReplayStore(tmp_path / "store"))
    assert done.episodes == 1 and done.known == 0
    assert [why.partition(": ")[2] for _, why in done.skipped] == ["it is a link to nowhere.hdf5, which is not there"]


@pytest.mark.parametrize("data, kind", [
    (b"", "it is empty: copy it again"), (gzip.compress(b"x" * 99, mtime=0), "gunzip it"), (b"PK\x03\x04" + bytes(99), "zip archive"),
    (b"<!DOCTYPE html><p>Sign in", "a web page"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    (b"#ROSBAG V2.0\n", "a ROS bag"), (b"nobody knows", "file signature not found"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["demo.hdf5", "demo.hdf5.gz"])
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, data, kind, name):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(StoreError, match=f"cannot be read as HDF5: .*{kind}"):
        import_episodes(read_demonstrations, tmp_path / name, ReplayStore(tmp_path / "store"))


def test_a_layout_that_none_of_the_formats_reads_sends_nobody_from_one_to_the_next(tmp_path):
    with h5py.File(tmp_path / "d4rl.hdf5", "w") as file:  # D4RL: arrays side by side
        file["actions"], file["observations"], file["rewards"] = np.zeros((9, 7)), np.zeros((9, 20)), np.zeros(9)
    with h5py.File(tmp_path / "maniskill.h5", "w") as file:
        file["traj_0/actions"] = np.zeros((9, 8))
    for path in tmp_path.glob("*.h*5"):
        for read in (read_demonstrations, read_rollouts):
            store = ReplayStore(tmp_path / "store")
            try:
                why = import_episodes(read, path, store).skipped[0][1]
            except StoreError as error:
                why = str(error)
            assert "none of the layouts that are read" in why and "--format" not in why


def test_a_link_is_called_by_where_it_leads(tmp_path):
    path = changed(tmp_path, lambda file: file.update({"data/demo_1": h5py.ExternalLink("b.hdf5", "/data/demo_0"),
                                                       "data/demo_2": h5py.SoftLink("/data/demo_0")}))  # fmt: skip
    done, _, _ = imported(tmp_path, path)
    assert done.episodes == 1
    leads = [why.partition("is a link to ")[2].partition(",")[0] for _, why in done.skipped]
    assert leads == ["/data/demo_0 of the file b.hdf5", "/data/demo_0"]


def test_numbers_too_large_and_texts_too_long_are_said_shortly(tmp_path, recwarn):
    path = changed(tmp_path, lambda file: file["data/demo_0/actions"].__setitem__((3, 0), 1e39))
    with h5py.File(path, "r+") as file:
        values = file["data/demo_0/actions"][()].astype(np.float64)
        values[3, 0] = 1e39
        del file["data/demo_0/actions"]
        file["data/demo_0/actions"] = values
    assert "too large for float32" in imported(tmp_path, path)[0].skipped[0][1]
    assert not [warning for warning in recwarn if "overflow" in str(warning.message)]
    done, (episode,), _ = imported(tmp_path / "long", changed(tmp_path, lambda file: None), instruction="lift " * 5000)
    assert len(episode.instruction) > 20_000 and len(done.text("here")) < 2000 and "(25000 characters)" in done.text("here")


def test_a_path_that_is_not_there_is_wrong_input_and_leaves_nothing(tmp_path, capsys):
    for where in (["--root", str(tmp_path), "--name", "new"], ["--store", str(tmp_path / "store")]):
        assert main(["replay", "import", *where, "--format", "robomimic", str(tmp_path / "typo.hdf5")]) == 2
        assert "typo.hdf5 does not exist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, why", [
    (["--resize", "1"], "frames cannot be resized to 1 pixels: give 16 to 4096"), (["--resize", "-64"], "frames cannot be resized to -64"),
    (["--control-freq", "nan"], "nan control steps per second"),
    (["--control-freq", "0.05"], "0.05 control steps per second (not the seconds of a step)"),
    (["--rename-camera", "agentview=../../x"], "--rename-camera '../../x' is no plain name"), (["--name", "a"], "are two stores"),
])  # fmt: skip
def test_a_wrong_option_of_an_import_is_wrong_input_and_leaves_nothing(tmp_path, capsys, flags, why):
    write_demo(tmp_path / "a.hdf5")
    where = ["--root", str(tmp_path / "runs"), "--store", str(tmp_path / "store")]
    assert main(["replay", "import", *where, "--format", "robomimic", str(tmp_path / "a.hdf5"), *flags]) == 2
    assert why in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["a.hdf5"]


def test_a_rate_that_the_files_overrule_is_said(tmp_path):
    text = '{"env_name": "Lift", "env_kwargs": {"control_freq": 20}}'
    path = changed(tmp_path, lambda file: file["data"].attrs.__setitem__("env_args", text))
    done, (episode,), _ = imported(tmp_path, path, control_freq=30.0)
    assert episode.info["control_freq"] == 20
    assert [note for note in done.notes if note.startswith("--control-freq 30 is for files that do not say their rate; these say 20 ")]
