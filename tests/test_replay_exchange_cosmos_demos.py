"""Demonstrations in the layout the public cosmos-policy trainer reads."""

import h5py
import numpy as np
import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import ReplayStore
from cosmos_ray.replay.exchange.cosmos_demos import export_demonstrations
from cosmos_ray.replay.exchange.importing import import_episodes
from cosmos_ray.replay.exchange.robomimic import read_demonstrations
from tests.test_replay_episode import make_episode


def make(seed, words="open the drawer", **options):
    episode = make_episode(seed, size=32, **options)
    episode.instruction = words
    return episode


def test_successes_are_grouped_by_instruction_and_come_back_as_they_went_out(tmp_path):
    store = ReplayStore(tmp_path / "store")
    for seed, words in enumerate(["open the drawer", "push the plate", "open the drawer"]):
        store.commit(make(seed, words))
    store.commit(make(3, success=False))
    store.commit(make(4, "path/../of SCENE"))
    store.commit(make(5, chunk=5))
    done = export_demonstrations(store, sorted(store.summaries(), key=lambda s: s.key.seed), tmp_path / "out", suite="libero_goal")
    assert done.episodes == 3
    reasons = [why for _, why in sorted(done.skipped)]
    assert len(reasons) == 3 and "did not succeed" in reasons[0] and "cannot say" in reasons[1] and "the format needs all" in reasons[2]
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.hdf5"))
    assert files == ["libero_goal/open_the_drawer_demo.hdf5", "libero_goal/push_the_plate_demo.hdf5"]
    with h5py.File(tmp_path / "out" / files[0]) as file:
        assert sorted(file["data"]) == ["demo_0", "demo_1"] and file["data/demo_1/robot_states"].shape == (12, 9)
    other = ReplayStore(tmp_path / "other")
    assert import_episodes(read_demonstrations, tmp_path / "out" / files[0], other).episodes == 2
    for summary in other.refresh():
        episode, wanted = other.read(summary.name), make(2 * summary.key.seed)
        assert episode.instruction == "open the drawer" and episode.success and episode.length == wanted.length
        assert np.array_equal(episode.actions, wanted.labels) and np.array_equal(episode.states[:-1], wanted.states[:-1])
        assert episode.frames == {t: wanted.frames[min(t, wanted.length - 1)] for t in range(wanted.length + 1)}


def test_one_kind_of_camera_is_not_enough(tmp_path):
    store = ReplayStore(tmp_path / "store")
    episode = make(0)
    episode.cameras, episode.frames = ("agentview",), {t: images[1:] for t, images in episode.frames.items()}
    store.commit(episode)
    with pytest.raises(StoreError, match="needs a third-person and a wrist camera"):
        export_demonstrations(store, store.summaries(), tmp_path / "out")
    with pytest.raises(StoreError, match="plain name"):
        export_demonstrations(store, store.summaries(), tmp_path / "out", suite="../elsewhere")
    assert not (tmp_path / "out").exists()
