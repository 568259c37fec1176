"""Windows, targets, classes, reproducibility and statistics, against a plain computation from the episodes."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.format.codec import decode_jpeg
from cosmos_ray.replay.sampling.ranges import dataset_statistics
from cosmos_ray.replay.sampling.sampler import WindowSampler
from cosmos_ray.replay.sampling.windows import Selection, Windows, window_offsets
from cosmos_ray.replay.store import ReplayStore
from tests.test_replay_episode import make_episode

CHUNK, GAMMA = 5, 0.9

EPISODES = [
    *(make_episode(seed, length=6 + 3 * seed) for seed in range(4)),
    *(make_episode(10 + seed, source="rollout", chunk=CHUNK, length=13 + seed) for seed in range(3)),
    *(make_episode(20 + seed, source="rollout", chunk=CHUNK, length=20, success=False) for seed in range(2)),
    make_episode(30, source="rollout", success=False, invalid="non-finite action"),
    make_episode(31, source="eval"),
    make_episode(32, success=False),
]


def fill(root, episodes=EPISODES):
    store = ReplayStore(root)
    for episode in episodes:
        store.commit(episode)
    return store


def sampler_of(store, seed=0, **options):
    return WindowSampler(store, chunk=CHUNK, gamma=GAMMA, seed=seed, **options)


def windows_of(episode):
    """Every offset at which a window may start, by definition."""
    end = episode.length
    return [t for t in range(end) if t in episode.frames and min(t + CHUNK, end) in episode.frames]


def assert_batches_equal(left, right):
    for name, value in vars(left).items():
        assert np.array_equal(value, getattr(right, name)), name


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("store") / "store")


@pytest.mark.parametrize("word", ["demo", "success", "failure", "rollout"])
@pytest.mark.parametrize("cache", [0, 1 << 30])
def test_windows_match_a_plain_computation(filled, word, cache):
    batch = sampler_of(filled, frame_cache_bytes=cache).draw(200, word)
    episodes = {episode.key.name: episode for episode in EPISODES}
    assert len(batch) == 200
    for row, (name, t) in enumerate(zip(batch.episodes, batch.offsets, strict=True)):
        episode = episodes[name]
        assert t in windows_of(episode)
        end = episode.length
        future = min(t + CHUNK, end)
        steps = [min(t + k, end - 1) for k in range(CHUNK)]
        for images, step in ((batch.images, t), (batch.future_images, future)):
            assert np.array_equal(images[row], np.stack([decode_jpeg(data) for data in episode.frames[step]]))
        assert np.array_equal(batch.proprio[row], episode.proprio[t])
        assert np.array_equal(batch.future_proprio[row], episode.proprio[future])
        assert np.array_equal(batch.actions[row], np.stack([episode.actions[step] for step in steps]))
        assert np.array_equal(batch.labels[row], np.stack([episode.labels[step] for step in steps]))
        assert batch.value[row] == np.float32(2 * GAMMA ** (end - future) - 1 if episode.success else -1)
        assert batch.instructions[row] == episode.instruction
        assert batch.sources[row] == episode.key.source == ("demo" if word == "demo" else "rollout")
        assert batch.policy_versions[row] == episode.step_versions[t]
        assert word in ("demo", "rollout") or episode.success == (word == "success")
    assert batch.images.shape == (200, 2, 16, 16, 3) and batch.images.dtype == np.uint8
    assert all(array.dtype == np.float32 for array in (batch.actions, batch.labels, batch.proprio, batch.value))


def test_last_window_of_a_success_has_value_one_and_repeats_the_last_action(filled):
    batch = sampler_of(filled).draw(300, "demo")
    lengths = {episode.key.name: episode.length for episode in EPISODES}
    last = [row for row in range(300) if batch.offsets[row] == lengths[batch.episodes[row]] - 1]
    assert last
    for row in last:
        assert batch.value[row] == 1.0
        assert np.array_equal(batch.actions[row], np.tile(batch.actions[row, 0], (CHUNK, 1)))


def test_partial_score_of_a_failure_gives_partial_values(tmp_path):
    """The public code gives an episode of score 0.2 the values of a full success (method section 3)."""
    graded = make_episode(0, source="rollout", chunk=CHUNK, length=10, success=False, score=0.2)
    batch = sampler_of(fill(tmp_path / "store", [graded])).draw(20, "failure")
    assert set(batch.offsets) == {0, 5}
    for now, value in zip(batch.offsets, batch.value, strict=True):
        assert value == np.float32(2 * GAMMA ** (5 - now) * 0.2 - 1)


def test_counts_are_the_windows_there_are(filled):
    sampler = sampler_of(filled)
    plain = {name: [0, 0] for name in ("demo", "success", "failure", "rollout")}
    for episode in EPISODES[:9]:
        name = "demo" if episode.key.source == "demo" else "success" if episode.success else "failure"
        for word in {name, name if name == "demo" else "rollout"}:
            plain[word][0] += 1
            plain[word][1] += len(windows_of(episode))
    assert {name: list(count) for name, count in sampler.counts().items()} == plain
    assert sampler.excluded == 3  # invalid, evaluation, failed demonstration


def test_draws_are_uniform_over_windows(filled):
    sampler = sampler_of(filled)
    batch = sampler.draw(20_000, "demo")
    seen = Counter(zip(batch.episodes, batch.offsets.tolist(), strict=True))
    total = sampler.counts()["demo"].windows
    assert len(seen) == total
    expected = 20_000 / total
    # Chi-square with total - 1 degrees of freedom: mean total - 1, standard deviation sqrt(2 (total - 1)).
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    assert abs(chi_square - (total - 1)) < 5 * np.sqrt(2 * (total - 1))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_rollout_draws_mix_successes_and_failures(filled, share):
    sampler = sampler_of(filled, success_share=share)
    batch = sampler.draw(2000, "rollout")
    success = np.mean([name in {e.key.name for e in EPISODES if e.success} for name in batch.episodes])
    assert abs(success - share) <= 5 * np.sqrt(share * (1 - share) / 2000)
    assert sampler.fallbacks == {"success": 0, "failure": 0}


@pytest.mark.parametrize("present", ["success", "failure"])
def test_rollout_falls_back_to_the_other_class_and_counts(tmp_path, present):
    store = fill(tmp_path / "store", [e for e in EPISODES[4:9] if e.success == (present == "success")])
    sampler = sampler_of(store)
    assert set(sampler.draw(50, "rollout").episodes) == set(store.keys())
    assert sampler.fallbacks == {"success": 0, "failure": 0, present: 50}
    missing = "failure" if present == "success" else "success"
    with pytest.raises(StoreError, match=f"'{missing}' of .* has no window"):
        sampler.draw(1, missing)


def test_empty_or_unknown_class_is_refused(tmp_path):
    sampler = sampler_of(ReplayStore(tmp_path / "store"))
    for word in ("demo", "rollout"):
        with pytest.raises(StoreError, match="collect episodes and refresh first"):
            sampler.draw(1, word)
    with pytest.raises(StoreError, match="unknown: use one of demo, success, failure, rollout"):
        sampler.draw(1, "expert")


def test_same_seed_draws_the_same_whatever_the_order_of_commits(filled, tmp_path):
    other = fill(tmp_path / "store", EPISODES[::-1])
    one, two, different = sampler_of(filled), sampler_of(other), sampler_of(filled, seed=1)
    for word in ("demo", "rollout", "success"):
        drawn = one.draw(20, word)
        assert_batches_equal(drawn, two.draw(20, word))
        assert drawn.offsets.tolist() != different.draw(20, word).offsets.tolist()


def test_resume_continues_mid_stream(filled):
    sampler = sampler_of(filled)
    sampler.draw(7, "rollout")
    state = json.loads(json.dumps(sampler.state_dict()))
    expected = [sampler.draw(9, word) for word in ("demo", "rollout", "failure")]
    resumed = sampler_of(ReplayStore(filled.root), seed=99)
    resumed.load_state_dict(state)
    for batch, word in zip(expected, ("demo", "rollout", "failure"), strict=True):
        assert_batches_equal(resumed.draw(9, word), batch)


def test_refresh_sees_episodes_of_other_writers(tmp_path):
    store = fill(tmp_path / "store", EPISODES[:2])
    sampler, second = sampler_of(store), sampler_of(store)
    ReplayStore(store.root).commit(EPISODES[2])
    store.commit(EPISODES[4])
    assert sampler.counts()["demo"].episodes == 2
    assert sampler.refresh() == 2 and sampler.refresh() == 0
    assert second.refresh() == 2  # one sampler does not take episodes from another
    assert sampler.counts()["demo"].episodes == 3 and sampler.counts()["success"].episodes == 1
    assert EPISODES[2].key.name in sampler.draw(200, "demo").episodes
    assert set(sampler.draw(5, "success").episodes) == {EPISODES[4].key.name}


def test_episodes_without_windows_are_reported_and_not_drawn(tmp_path, caplog):
    sparse = make_episode(0, source="rollout", chunk=7, length=19)  # of its chunks of 7 only the last has 5 steps
    nothing = make_episode(1, source="rollout", chunk=100, length=20)
    sampler = sampler_of(fill(tmp_path / "store", [sparse, nothing]))
    assert sampler.counts()["success"] == (2, len(windows_of(sparse)))
    assert "1 of 2 new episodes have no two frames 5 steps apart" in caplog.text
    assert set(sampler.draw(20, "success").episodes) == {sparse.key.name}


@pytest.mark.parametrize("damage", ["action", "jpeg", "torn", "missing"])
def test_episode_damaged_after_it_was_indexed_is_quarantined_and_not_drawn(tmp_path, damage):
    store = fill(tmp_path / "store", EPISODES[:4])
    sampler = sampler_of(store)
    victim = EPISODES[1]
    path = Path(next(summary.path for summary in store.summaries() if summary.name == victim.key.name))
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "torn":
        data = data[: len(data) // 2]
    elif damage == "action":
        data[data.index(victim.actions.tobytes())] ^= 1
    elif damage == "jpeg":
        for images in victim.frames.values():
            for image in images:
                start = data.index(image)
                data[start : start + 20] = bytes(20)
    if damage != "missing":
        path.write_bytes(data)
    batch = sampler.draw(100, "demo")
    assert set(batch.episodes) == {episode.key.name for episode in EPISODES[:4]} - {victim.key.name}
    assert not path.exists() and len(store.quarantine.entries()) == (damage != "missing")
    # As if it had never been there.
    rest = fill(tmp_path / "rest", [EPISODES[0], *EPISODES[2:4]])
    assert_batches_equal(batch, sampler_of(rest).draw(100, "demo"))
    # Committed again, it is drawn again.
    if damage != "missing":
        store.commit(victim)
        assert sampler.refresh() == 1 and victim.key.name in sampler.draw(100, "demo").episodes


def test_episodes_of_another_image_size_are_refused(tmp_path):
    sampler = sampler_of(fill(tmp_path / "store", [make_episode(0, size=16), make_episode(1, size=32)]))
    with pytest.raises(StoreError, match="keep one robot and image size to a store"):
        sampler.draw(100, "demo")


def test_sampler_with_fewer_open_episodes_than_it_draws_from(tmp_path):
    fill(tmp_path / "store")
    narrow = sampler_of(ReplayStore(tmp_path / "store", open_limit=1), frame_cache_bytes=2000)
    assert_batches_equal(narrow.draw(50, "demo"), sampler_of(ReplayStore(tmp_path / "store")).draw(50, "demo"))


@pytest.mark.parametrize(
    "frames, length, chunk, expected",
    [
        (range(7), 6, 4, [0, 1, 2, 3, 4, 5]),  # all frames: every step, the end repeated
        ([0, 4, 8, 10], 10, 4, [0, 4, 8]),  # chunk ends: 8 leads to min(12, 10)
        ([0, 4, 8], 8, 4, [0, 4]),  # the end is no start
        ([0, 5, 10], 10, 4, []),  # other chunks
        ([0, 3], 3, 8, [0]),  # shorter than a chunk
        ([], 3, 1, []),
    ],
)
def test_window_offset_table(frames, length, chunk, expected):
    assert window_offsets(np.array(list(frames), dtype=np.int32), length, chunk).tolist() == expected


def test_windows_follow_the_index_as_episodes_come_and_go(tmp_path):
    store = ReplayStore(tmp_path / "store")
    windows = Windows(store.index, CHUNK)
    assert windows.update() == (0, 0) and windows.count("demo") == (0, 0)
    for episode in EPISODES[:2]:
        store.commit(episode)
    assert windows.update() == (2, 0)
    assert windows.count("demo") == (2, sum(len(windows_of(episode)) for episode in EPISODES[:2]))
    store.index.remove(EPISODES[0].key.name)
    store.commit(EPISODES[9])  # an invalid one
    assert windows.update() == (1, 0) and windows.excluded == 1
    assert windows.count("demo") == (1, len(windows_of(EPISODES[1])))
    assert windows.cell("demo", None, Selection()).rows.tolist() == [1]


def test_statistics_are_the_ranges_of_what_is_trained_on(filled):
    demos, rollouts = EPISODES[:4], EPISODES[4:9]
    for sources, episodes in ((["demo"], demos), (["demo", "rollout"], demos + rollouts)):
        statistics = dataset_statistics(filled, sources)
        for field, attribute in (("actions", "actions"), ("labels", "labels"), ("proprio", "proprio")):
            rows = np.concatenate([getattr(episode, attribute) for episode in episodes])
            for bound, plain in (("min", rows.min(0)), ("max", rows.max(0))):
                value = getattr(statistics, f"{field}_{bound}")
                assert value.dtype == np.float32 and np.array_equal(value, plain)
        assert statistics.episodes == len(episodes)
        assert statistics.steps == sum(episode.length for episode in episodes)


def test_statistics_of_a_constant_dimension_can_be_divided_by(tmp_path):
    episode = make_episode(0)
    episode.actions[:, 2] = 0.25
    statistics = dataset_statistics(fill(tmp_path / "store", [episode]))
    assert (statistics.actions_min[2], statistics.actions_max[2]) == (-0.75, 1.25)
    low, high = statistics.actions_min, statistics.actions_max
    normalised = 2 * (episode.actions - low) / (high - low) - 1
    assert np.abs(normalised).max() <= 1 + 1e-6 and np.all(normalised[:, 2] == 0)


def test_statistics_leave_damaged_episodes_out(tmp_path):
    store = fill(tmp_path / "store", EPISODES[:2])
    os.truncate(store.summaries()[0].path, 500)
    assert dataset_statistics(store).episodes == 1
    assert len(store.quarantine.entries()) == 1
    with pytest.raises(StoreError, match="no usable episode of rollout"):
        dataset_statistics(store, ["rollout"])
