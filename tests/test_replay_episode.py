"""Episodes, their keys, the JPEG codec and the value targets. Also the synthetic episodes of the other replay tests."""

from types import SimpleNamespace

import numpy as np
import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.format.codec import decode_jpeg, encode_jpeg
from cosmos_ray.replay.format.episode import CLASS_NUMBERS, CLASSES, SOURCES, Episode, EpisodeKey, EpisodeSummary
from cosmos_ray.replay.sampling.returns import value_targets

CAMERAS = ("robot0_eye_in_hand", "agentview")


def make_trajectory(seed=0, length=12, chunk=None, success=True, size=16, task="Lift"):
    """A trajectory with frames at every step, or at multiples of ``chunk`` and the end; a function of the seed."""
    rng = np.random.default_rng(seed)
    steps = range(length + 1) if chunk is None else sorted({*range(0, length + 1, chunk), length})
    gradient = np.linspace(0, 255, size * size * 3).reshape(size, size, 3)
    return SimpleNamespace(
        task=task,
        instruction=f"lift the cube {seed}",
        seed=seed,
        cameras=CAMERAS,
        actions=[rng.uniform(-1, 1, 4).astype(np.float32) for _ in range(length)],
        labels=[rng.uniform(-1, 1, 4).astype(np.float32) for _ in range(length)],
        rewards=[0.0] * (length - 1) + [float(success)],
        proprio=[rng.normal(size=9).astype(np.float32) for _ in range(length + 1)],
        states=[rng.normal(size=21) for _ in range(length + 1)],
        frames={t: np.stack([np.roll(gradient, seed + 7 * t + c, 1).astype(np.uint8) for c in (0, 1)]) for t in steps},
        success=success,
        timed_out=not success,
        invalid="",
    )


def make_episode(seed=0, source="demo", chunk=None, run="run", attempt=0, invalid="", score=None, **trajectory):
    made = make_trajectory(seed, chunk=chunk, **trajectory)
    made.invalid = invalid
    return Episode.from_trajectory(
        made,
        EpisodeKey(run, made.task, source, seed, attempt),
        policy_version=-1 if source == "demo" else seed,
        predicted_values=np.where(np.arange(len(made.actions)) % 3, np.nan, 0.25),
        info={"horizon": 100, "fingerprint": {"xml": "ab12"}, "seconds": 1.5, "arm": None},
        score=score,
    )


def assert_same(left, right):
    """Bit-exact equality of two episodes, stored JPEG bytes included."""
    for name, value in vars(left).items():
        other = getattr(right, name)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype and value.shape == other.shape, name
            assert value.tobytes() == other.tobytes(), name
        else:
            assert value == other, name


def test_key_names_are_deterministic_distinct_and_safe():
    keys = [
        EpisodeKey(run, task, source, seed, attempt)
        for run in ("a", "b")
        for task in ("Lift", "my task/..-x")
        for source in ("demo", "rollout")
        for seed in (0, 123456789)
        for attempt in (0, 1)
    ]
    names = [key.name for key in keys]
    assert len(set(names)) == len(keys)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") for name in names)
    # Stored files are found again by this name, so it may never change.
    assert EpisodeKey("run", "Lift", "rollout", 1234, 0).name == "rollout-Lift-00001234-a0-2ef2b81a"
    assert EpisodeKey("run", "Lift", "rollout", np.int64(1234), np.int64(0)).name == "rollout-Lift-00001234-a0-2ef2b81a"


@pytest.mark.parametrize("fields", [("r", "Lift", "expert", 0, 0), ("r", "Lift", "demo", -1, 0)])
def test_impossible_keys_are_refused(fields):
    with pytest.raises(StoreError):
        EpisodeKey(*fields)


def test_jpeg_is_close_and_keeps_channel_order():
    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    image = np.stack([np.tile(ramp, (32, 1)), np.tile(ramp[:, None], (1, 32)), np.full((32, 32), 40, np.uint8)], -1)
    data = encode_jpeg(image)
    decoded = decode_jpeg(data)
    assert decoded.shape == image.shape and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - image).max() <= 12
    assert np.array_equal(decode_jpeg(memoryview(data)), decoded)
    # 4:4:4 means sampling factors 1x1 (0x11) for all three components of the frame header.
    header = data.index(b"\xff\xc0")
    assert [data[header + 11 + 3 * component] for component in range(3)] == [0x11] * 3


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_frames_of_the_wrong_kind_are_refused(image):
    with pytest.raises(StoreError, match="uint8 RGB"):
        encode_jpeg(image)


@pytest.mark.parametrize("data", [b"", b"not a jpeg"])
def test_bytes_that_are_no_jpeg_are_refused(data):
    with pytest.raises(StoreError, match="do not decode"):
        decode_jpeg(data)


def test_from_trajectory_takes_everything_over():
    trajectory = make_trajectory(seed=3, length=10, chunk=4, success=False)
    key = EpisodeKey("run", "Lift", "rollout", 3, 1)
    episode = Episode.from_trajectory(trajectory, key, policy_version=7, step_versions=range(10))
    assert sorted(episode.frames) == [0, 4, 8, 10]
    assert episode.frames[4] == [encode_jpeg(image) for image in trajectory.frames[4]]
    for name in ("actions", "labels", "proprio", "states"):
        assert np.array_equal(getattr(episode, name), np.stack(getattr(trajectory, name))), name
    assert episode.states.dtype == np.float64 and episode.states.shape == (11, 21)
    assert episode.step_versions.tolist() == list(range(10)) and episode.policy_version == 7
    assert np.isnan(episode.predicted_values).all() and episode.predicted_values.shape == (10,)
    assert (episode.success, episode.timed_out, episode.episode_return, episode.length) == (False, True, 0.0, 10)
    assert Episode.from_trajectory(trajectory, key, policy_version=7).step_versions.tolist() == [7] * 10


@pytest.mark.parametrize(
    "change", [{"rewards": [0.0]}, {"proprio": []}, {"actions": []}, {"frames": {99: []}}, {"task": "Stack"}]
)
def test_inconsistent_trajectories_are_refused(change):
    trajectory = make_trajectory()
    vars(trajectory).update(change)
    with pytest.raises(StoreError):
        Episode.from_trajectory(trajectory, EpisodeKey("run", "Lift", "demo", 0), policy_version=-1)


@pytest.mark.parametrize("score", [-0.1, 1.5, float("nan")])
def test_scores_outside_of_their_range_are_refused(score):
    with pytest.raises(StoreError, match=r"must lie in \[0, 1\]"):
        Episode.from_trajectory(make_trajectory(), EpisodeKey("run", "Lift", "demo", 0), policy_version=-1, score=score)


@pytest.mark.parametrize(
    "source, success, invalid, expected",
    [
        ("demo", True, "", "demo"),
        ("demo", False, "", "invalid"),
        ("rollout", True, "", "success"),
        ("rollout", False, "", "failure"),
        ("rollout", False, "non-finite action", "invalid"),
        ("eval", True, "", "evaluation"),
        ("eval", False, "non-finite action", "evaluation"),
    ],
)
def test_classes(source, success, invalid, expected):
    key = EpisodeKey("run", "Lift", source, 0)
    summary = EpisodeSummary(key, key.name, "", success, float(success), 0.0, 5, False, invalid, 0, np.zeros(0, np.int32))
    assert summary.episode_class == expected
    number = CLASS_NUMBERS[SOURCES.index(source), int(success), int(bool(invalid))]
    assert CLASSES[number] == expected  # as an index has it for many


@pytest.mark.parametrize(
    "length, score, gamma, expected",
    [
        (0, 1.0, 0.9, [1.0]),
        (2, 1.0, 0.9, [2 * 0.81 - 1, 2 * 0.9 - 1, 1.0]),
        (3, 1.0, 0.5, [-0.75, -0.5, 0.0, 1.0]),
        (3, 1.0, 1.0, [1.0, 1.0, 1.0, 1.0]),
        (2, 0.2, 0.5, [2 * 0.05 - 1, 2 * 0.1 - 1, 2 * 0.2 - 1]),  # partial credit is not rescaled to 1
        (3, 0.0, 0.9, [-1.0, -1.0, -1.0, -1.0]),
    ],
)
def test_value_target_table(length, score, gamma, expected):
    targets = value_targets(length, score, gamma)
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets, expected, rtol=1e-6)


@pytest.mark.parametrize("arguments", [(-1, 1.0, 0.9), (3, 1.0, 1.1), (3, 50.0, 0.9), (3, -0.1, 0.9), (3, float("nan"), 0.9)])
def test_value_targets_outside_of_their_range_are_refused(arguments):
    with pytest.raises(StoreError):
        value_targets(*arguments)
