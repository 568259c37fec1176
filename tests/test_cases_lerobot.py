"""LeRobot datasets as users bring them, after public reports (``tests/data/cases``): each gives what its own reader gives, or one line."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cosmos_ray.commands.cli import main
from cosmos_ray.errors import StoreError
from cosmos_ray.replay import ReplayStore, WindowSampler
from cosmos_ray.replay.exchange.importing import ImportOptions, import_episodes
from cosmos_ray.replay.exchange.lerobot import export_lerobot
from cosmos_ray.replay.exchange.lerobot_import import read_lerobot
from cosmos_ray.replay.format.codec import encode_jpeg
from tests.test_replay_episode import make_episode

CASES = Path(__file__).parent / "data" / "cases"
BOWL, DRAWER = "put the bowl on the plate", "open the drawer"


@pytest.fixture
def store(tmp_path):
    return ReplayStore(tmp_path / "store")


def folder_of(case):
    return next(path.parent.parent for path in (CASES / case).glob("*/meta/info.json"))


def taken(case, store, **options):
    return import_episodes(read_lerobot, folder_of(case), store, ImportOptions(**options))


def imported(case, store, *options):
    """The exit code of the command."""
    return main(["replay", "import", str(folder_of(case)), "--format", "lerobot", "--store", str(store), "--quiet", *options])


def episodes(store):
    return {s.key.seed: store.read(s.name) for s in store.summaries()}


def assert_rows(case, store, state="observation.state", action="action"):
    """Every row of the data files is there, with the numbers it has."""
    table = pq.read_table(sorted((folder_of(case) / "data").rglob("*.parquet"))[0])
    of = table["episode_index"].to_numpy()
    found = episodes(store)
    assert sorted(found) == sorted(set(of.tolist()))
    for number, episode in found.items():
        rows = np.flatnonzero(of == number)
        assert np.array_equal(episode.actions, np.array(table[action].take(rows).to_pylist(), np.float32))
        assert np.array_equal(episode.proprio[:-1], np.array(table[state].take(rows).to_pylist(), np.float32))


def test_cameras_of_unequal_size_are_refused_with_their_sizes_and_nothing_is_stored(store):
    with pytest.raises(StoreError, match="wrist 48x64, top 96x128.*--resize N") as error:
        taken("camera_sizes", store)
    assert "\n" not in str(error.value) and len(store) == 0


def test_cameras_of_unequal_size_are_resized_when_asked(store):
    done = taken("camera_sizes", store, resize=32)
    assert done.sizes == {"wrist": (32, 32), "top": (32, 32)} and done.episodes == 2
    assert WindowSampler(store, chunk=3, gamma=0.9, seed=0).draw(8).images.shape == (8, 2, 32, 32, 3)
    assert_rows("camera_sizes", store)


def test_one_of_the_cameras_can_be_taken_alone(store):
    assert taken("camera_sizes", store, cameras=("top",)).sizes == {"top": (96, 128)}
    assert WindowSampler(store, chunk=3, gamma=0.9, seed=0).draw(4).images.shape == (4, 1, 96, 128, 3)


def test_a_draw_never_moves_an_intact_episode_to_quarantine(store):
    """Frames of several sizes are no damage: the draw says which episode, and the file stays."""
    odd = make_episode(0, size=32)
    odd.frames = {t: [images[0], encode_jpeg(np.zeros((16, 16, 3), np.uint8))] for t, images in odd.frames.items()}
    store.commit(odd)
    with pytest.raises(StoreError, match=f"{odd.key.name} has cameras of several image sizes"):
        WindowSampler(store, chunk=3, gamma=0.9, seed=0).draw(4)
    store.commit(make_episode(1, size=32))
    with pytest.raises(StoreError, match="keep one"):
        WindowSampler(store, chunk=3, gamma=0.9, seed=0).draw(64)
    store.update()
    assert store.quarantine.entries() == [] and len(store) == 2


def test_cameras_of_other_names_than_the_stores_are_refused_with_both_lists(store):
    names = {"image": "agentview", "image2": "robot0_eye_in_hand"}
    done = taken("lerobot_camera_names", store, rename_camera=names)
    assert done.embodiment.cameras == ("robot0_eye_in_hand", "agentview")  # wrist cameras first, whatever the order in the file
    with pytest.raises(StoreError, match="cameras are image, image2, and the store's robot0_eye_in_hand, agentview.*--rename-camera"):
        taken("lerobot_fps", store)
    assert len(store) == 2


def test_the_renamed_cameras_show_their_own_pictures(store, tmp_path):
    taken("lerobot_camera_names", store, rename_camera={"image": "agentview", "image2": "robot0_eye_in_hand"})
    plain = ReplayStore(tmp_path / "plain")
    taken("lerobot_camera_names", plain)
    for number, episode in episodes(store).items():
        assert [images[::-1] for images in episode.frames.values()] == list(episodes(plain)[number].frames.values())


def test_the_import_prints_the_cameras_and_the_texts(tmp_path, capsys):
    code = imported("lerobot_camera_names", tmp_path / "store")
    said = capsys.readouterr().out
    assert code == 0 and "cameras, height x width: image 64x64, image2 64x64" in said
    assert f"instruction of 1: {BOWL!r}" in said and "7 numbers per action, 8 of proprioception, 20 control steps per second" in said
    assert "each is taken for a success" in said and "task_index" in said


def test_a_data_file_that_the_episode_table_does_not_name_is_read(store):
    assert taken("lerobot_file000_missing", store).episodes == 2
    assert_rows("lerobot_file000_missing", store)


def test_the_data_rate_is_kept_in_and_out(store, tmp_path):
    assert taken("lerobot_fps", store).embodiment.control_freq == 30
    export_lerobot(store, store.summaries(), tmp_path / "out", frames="image")
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    assert info["fps"] == 30 and isinstance(info["fps"], int)
    times = pq.read_table(tmp_path / "out/data/chunk-000/file-000.parquet")["timestamp"].to_numpy()
    assert np.allclose(np.diff(times[:8]), 1 / 30)


def test_a_window_of_an_episode_with_several_tasks_has_the_text_of_its_start(store, tmp_path):
    done = taken("lerobot_multitask", store)
    pick, put = "pick up the mug", "put the mug on the shelf"
    assert done.instructions == {pick: 1, put: 1}
    wanted = [pick] * 4 + [put] * 4
    batch = WindowSampler(store, chunk=3, gamma=0.9, seed=0).draw(64)
    assert set(batch.offsets) == set(range(8))
    assert batch.instructions == [wanted[t] for t in batch.offsets]
    # Out again and in again: the text of each frame, through task_index.
    export_lerobot(store, store.summaries(), tmp_path / "out", frames="image")
    table = pq.read_table(tmp_path / "out/data/chunk-000/file-000.parquet")
    texts = pq.read_table(tmp_path / "out/meta/tasks.parquet")["task"].to_pylist()
    assert [texts[number] for number in table["task_index"].to_pylist()] == wanted
    again = ReplayStore(tmp_path / "again")
    import_episodes(read_lerobot, tmp_path / "out", again)
    (summary,) = again.summaries()
    assert [again.view(summary.name).instruction_at(t) for t in range(8)] == wanted


@pytest.mark.parametrize("case", ["lerobot_no_tasks_column", "lerobot_tasks_text"])
def test_the_text_is_that_of_the_task_index_whatever_the_episode_table_has(store, case):
    assert taken(case, store).episodes == 2
    assert [episodes(store)[number].instruction for number in (0, 1)] == [BOWL, DRAWER]
    assert_rows(case, store)


def test_keys_of_other_names_are_one_line_that_says_what_is_there(store):
    with pytest.raises(StoreError, match="no feature observation.state, action; it has image 64x64x3, wrist_image 64x64x3, state 8, "
                                         "actions 7: say which with --key observation.state=NAME action=NAME") as error:
        taken("lerobot_other_keys", store)
    assert "\n" not in str(error.value) and len(store) == 0


def test_keys_of_other_names_are_mapped_when_asked(tmp_path):
    store = ReplayStore(tmp_path / "store")
    keys = ("observation.state=state", "action=actions", "observation.images.agentview=image")
    code = imported("lerobot_other_keys", tmp_path / "store", "--key", *keys)
    store.refresh()
    assert code == 0 and store.view(store.keys()[0]).cameras == ("wrist_image", "agentview")
    assert_rows("lerobot_other_keys", store, "state", "actions")
