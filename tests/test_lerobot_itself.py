"""With LeRobot's own code, where it is installed (it brings its own torch): LEROBOT_PYTHON names an interpreter that has it."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from cosmos_ray.replay import ReplayStore
from cosmos_ray.replay.exchange.importing import ImportOptions, import_episodes
from cosmos_ray.replay.exchange.lerobot import export_lerobot
from cosmos_ray.replay.exchange.lerobot_import import read_lerobot
from cosmos_ray.replay.format.codec import decode_jpeg
from tests.test_replay_episode import make_episode

CASES = sorted(path.parent.parent for path in (Path(__file__).parent / "data" / "cases").glob("*/*/meta/info.json"))
PYTHON = os.environ.get("LEROBOT_PYTHON", sys.executable)


@cache
def installed():
    return subprocess.run([PYTHON, "-c", "import lerobot"], capture_output=True).returncode == 0


@pytest.fixture(autouse=True)
def lerobot():
    if not installed():
        pytest.skip("LeRobot is not installed; LEROBOT_PYTHON names an interpreter that has it")


def run(*words):
    script = Path(__file__).with_name("lerobot_rows.py")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([PYTHON, str(script), *map(str, words)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def rows_of(folder, tmp_path):
    """What LeRobot gives for every row, by feature."""
    run("read", folder, tmp_path / "rows.npz")
    with np.load(tmp_path / "rows.npz") as rows:
        return {name: rows[name] for name in rows.files}


def compare(rows, store, state="observation.state", action="action", cameras=None, loss=3.0):
    """Numbers and texts equal, frames within ``loss`` grey levels on average. Returns the largest mean difference of a frame."""
    worst = 0.0
    for number in np.unique(rows["episode_index"]).tolist():
        at = np.flatnonzero(rows["episode_index"] == number)
        view = store.view(next(s.name for s in store.summaries() if s.key.seed == number))
        assert view.length == len(at) and view.embodiment.control_freq == rows["fps"]
        assert np.array_equal(view.column("action"), rows[action][at]) and np.array_equal(view.column("proprio")[:-1], rows[state][at])
        assert [view.instruction_at(t) for t in range(len(at))] == rows["task"][at].tolist()
        for camera in view.cameras:
            feature = (cameras or {}).get(camera, f"observation.images.{camera}")
            for t, row in enumerate(at):
                shown = decode_jpeg(view.stored_frame(camera, t)).astype(int)
                worst = max(worst, float(np.abs(shown - rows[feature][row]).mean()))
    assert worst < loss, worst
    return worst


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_dataset_that_lerobot_wrote_comes_in_with_the_values_that_lerobot_reads(tmp_path, kind):
    run("write", tmp_path / "set", kind)
    store = ReplayStore(tmp_path / "store")
    assert import_episodes(read_lerobot, tmp_path / "set", store).episodes == 2
    print(kind, compare(rows_of(tmp_path / "set", tmp_path), store))


@pytest.mark.parametrize("kind", ["image", "h264"])
def test_lerobot_reads_what_we_wrote_and_so_do_we(tmp_path, kind):
    store, again = ReplayStore(tmp_path / "store"), ReplayStore(tmp_path / "again")
    wanted = []
    for seed in range(3):
        episode = make_episode(seed, length=12 + seed, size=32)
        episode.info = {**episode.info, "control_freq": 15, "instructions": [[0, episode.instruction], [5, "then wait"]]}
        store.commit(episode)
        wanted.append(episode)
    assert export_lerobot(store, sorted(store.summaries(), key=lambda s: s.key.seed), tmp_path / "set", frames=kind).episodes == 3
    rows = rows_of(tmp_path / "set", tmp_path)
    assert np.array_equal(rows["action"], np.concatenate([e.actions for e in wanted]))
    assert np.array_equal(rows["label"], np.concatenate([e.labels for e in wanted]))
    assert np.array_equal(rows["observation.state"], np.concatenate([e.proprio[:-1] for e in wanted]))
    assert np.array_equal(rows["next.reward"].ravel(), np.concatenate([e.rewards for e in wanted]))
    assert rows["task"].tolist() == [text for e in wanted for text in [e.instruction] * 5 + ["then wait"] * (e.length - 5)]
    assert rows["fps"] == 15
    for camera, number in (("robot0_eye_in_hand", 0), ("agentview", 1)):
        shown = rows[f"observation.images.{camera}"].astype(int)
        kept = np.concatenate([[decode_jpeg(e.frames[t][number]) for t in range(e.length)] for e in wanted])
        assert np.abs(shown - kept).max() <= 2 if kind == "image" else np.abs(shown - kept).mean() < 12
    import_episodes(read_lerobot, tmp_path / "set", again)
    print(kind, compare(rows, again))


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.parent.name)
def test_the_cases_have_the_values_that_lerobot_reads(tmp_path, folder):
    other = folder.parent.name == "lerobot_other_keys"
    keys = {"observation.state": "state", "action": "actions"} if other else {}
    rows = rows_of(folder, tmp_path)
    for camera in ("top", "wrist") if folder.parent.name == "camera_sizes" else ("",):
        store = ReplayStore(tmp_path / f"store{camera}")
        assert not import_episodes(read_lerobot, folder, store, ImportOptions(keys=keys, cameras=(camera,) if camera else ())).skipped
        names = {"image": "image", "wrist_image": "wrist_image"} if other else None
        print(folder.parent.name, compare(rows, store, *(("state", "actions") if other else ()), cameras=names))
