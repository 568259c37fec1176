"""The windows that the episodes of an index have, and how many."""

from dataclasses import replace

import numpy as np
import pytest

from cosmos_ray.replay.index import EpisodeIndex
from cosmos_ray.replay.sampling.windows import Selection, Windows, window_offsets
from tests.test_replay_episode import make_episode
from tests.test_replay_selection import CHUNK, EPISODES, fill, summary_of


@pytest.mark.parametrize(
    "frames, length, chunk, expected",
    [
        ([0, 1], 1, 1, [0]),  # the shortest episode
        ([0, 1], 1, 10**12, [0]),  # a chunk far beyond the end
        ([0], 1, 1, []),  # no frame at the end
        ([1], 1, 1, []),  # nor at the start
        (range(5), 4, 4, [0, 1, 2, 3]),  # exactly a chunk: all lead to the end
        ([0, 4, 7, 8], 8, 4, [0, 4, 7]),  # 7 is no chunk end, but leads to the end
        ([3, 6], 9, 3, [3]),  # 6 would lead to 9, which has none
    ],
)
def test_window_offsets_at_the_edges(frames, length, chunk, expected):
    offsets = window_offsets(np.array(list(frames), np.int32), length, chunk)
    assert offsets.tolist() == expected and offsets.dtype == np.int32


def test_windows_are_everywhere_where_frames_can_be_made(tmp_path):
    episodes = [make_episode(0, length=7, size=8), make_episode(1, "rollout", chunk=CHUNK, length=13, size=8)]
    index = fill(tmp_path / "store", episodes).index
    stored, everywhere = Windows(index, CHUNK), Windows(index, CHUNK, everywhere=True)
    assert stored.update() == everywhere.update() == (2, 0)
    assert (stored.count("demo"), stored.count("success")) == ((1, 7), (1, 3))
    assert (everywhere.count("demo"), everywhere.count("success")) == ((1, 7), (1, 13))
    assert stored.offsets(1).tolist() == [0, 5, 10] and everywhere.offsets(1).tolist() == list(range(13))


def test_episodes_without_a_window_are_counted_once_and_never_drawn(tmp_path):
    barren = make_episode(1, "rollout", chunk=4, length=13, size=8)  # frames at 0, 4, 8, 12 and 13
    barren.frames = {step: barren.frames[step] for step in (0, 4, 8)}
    windows = Windows(fill(tmp_path / "store", [barren, make_episode(2, "rollout", size=8)]).index, CHUNK)
    assert windows.update() == (2, 1) and windows.update() == (0, 0)
    assert windows.count("success") == (2, 12)
    assert windows.cell("success", None, Selection()).rows.tolist() == [1]
    everywhere = Windows(windows.index, CHUNK, everywhere=True)
    assert everywhere.update() == (2, 0) and everywhere.count("success") == (2, 25)


def test_removals_are_taken_in_with_and_without_new_episodes(tmp_path):
    store = fill(tmp_path / "store", [*EPISODES, make_episode(1, "eval"), make_episode(2, "eval")])
    windows = Windows(store.index, CHUNK)
    assert windows.update() == (len(EPISODES) + 2, 0) and windows.excluded == 2
    store.evict([EPISODES[0].key.name, make_episode(1, "eval").key.name], "test")
    assert windows.count("demo") == (6, sum(e.length for e in EPISODES if e.key.source == "demo"))  # not before update()
    assert windows.update() == (0, 0) and windows.excluded == 1
    assert windows.count("demo") == (5, sum(e.length for e in EPISODES[1:] if e.key.source == "demo"))
    assert 0 not in windows.cell("demo", None, Selection()).rows and 0 not in windows.names()
    # One comes and goes between two updates, another one only comes.
    late = [make_episode(seed, size=8, length=6) for seed in (700, 701)]
    for episode in late:
        store.commit(episode)
    store.evict([late[0].key.name], "test")
    assert windows.update() == (1, 0) and windows.count("demo")[0] == 6
    names = {store.index.names[row] for row in windows.cell("demo", None, Selection()).rows}
    assert names == {e.key.name for e in (*EPISODES[1:], late[1]) if e.key.source == "demo"}


def test_many_rows_at_once_count_as_one_by_one():
    """Episodes of the same frames and length are counted together: lengths and frames must not be mixed up."""
    rng, index = np.random.default_rng(0), EpisodeIndex()
    first, summaries = summary_of(EPISODES[0]), []
    for seed in range(300):
        length = int(rng.integers(1, 12))
        steps = sorted(rng.choice(length + 1, size=int(rng.integers(0, length + 2)), replace=False).tolist())
        ranges = tuple((step, step + 1, 1) for step in steps)
        name = f"demo-Lift-{seed:08d}-a0-{seed:08x}"
        summaries.append(replace(first, key=replace(first.key, seed=seed), name=name, length=length, frame_ranges=ranges))
        index.add(summaries[-1])
    windows = Windows(index, 3)
    windows.update()
    assert windows.counts.tolist() == [len(window_offsets(s.frame_steps, s.length, 3)) for s in summaries]
