"""A stored episode as a filmstrip PNG and as H.264 video."""

from __future__ import annotations

import copy
import itertools
import resource

import av
import cv2
import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.replay import Episode, EpisodeKey
from cosmos_ray.replay.format.codec import decode_jpeg
from cosmos_ray.report.episode_strip import MOST_COLUMNS, draw_episode, outcome_text, save_episode
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.simulation import start


@pytest.fixture(scope="module")
def episode() -> Episode:
    """A rollout of 50 steps at 10 Hz with frames at every fifth."""
    env = Environment(SimConfig(control_freq=10, horizon=50))
    trajectory = start(env, 3)
    chunk = np.random.default_rng(0).uniform(-1, 1, (50, env.action_dim)).astype(np.float32)
    env.execute(chunk, trajectory, render_at=tuple(range(5, 51, 5)))
    values = np.where(np.arange(50) % 10, np.nan, 0.3)
    info = {"horizon": env.horizon, "fingerprint": env.fingerprint}
    env.close()
    key = EpisodeKey("run", "Lift", "rollout", 3)
    return Episode.from_trajectory(trajectory, key, policy_version=7, predicted_values=values, info=info)


def pictures(figure) -> list[np.ndarray]:
    return [axis.images[0].get_array() for axis in figure.axes if axis.images]


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def decode(path) -> tuple[list[np.ndarray], av.VideoStream, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        return [frame.to_ndarray(format="rgb24") for frame in frames], stream, float(frames[-1].time)


def test_filmstrip_shows_the_stored_pixels_of_evenly_picked_steps(episode):
    figure = draw_episode(episode)
    steps = [0, 5, 15, 20, 30, 35, 45, 50]
    shown = pictures(figure)
    expected = [decode_jpeg(jpeg) for step in steps for jpeg in episode.frames[step]]
    assert len(shown) == 16 and all(np.array_equal(a, b) for a, b in zip(shown, expected, strict=True))
    assert [text for text in texts(figure) if text.isdecimal()] == [str(step) for step in steps[1:]]
    title = " ".join(texts(figure))
    for part in ("Lift, seed 3", "timed out after 50 steps", "lift the red cube", "policy version 7", episode.key.name):
        assert part in title
    assert [axis.get_ylabel() for axis in figure.axes if not axis.images] == ["predicted\nvalue", "action", "reward"]


def test_filmstrip_of_every_kth_step(episode):
    assert len(pictures(draw_episode(episode, every=25))) == 2 * len((0, 25, 50))
    assert len(pictures(draw_episode(episode, every=20))) == 2 * len((0, 20, 40, 50))


def test_a_strip_without_predictions_has_no_row_for_them(episode):
    demo = copy.deepcopy(episode)
    demo.predicted_values[:] = np.nan
    assert [axis.get_ylabel() for axis in draw_episode(demo).axes if not axis.images] == ["action", "reward"]


@pytest.mark.parametrize("columns", [1, 3, 11])
def test_no_text_overlaps_or_leaves_the_figure(episode, columns):
    shown = copy.deepcopy(episode)
    shown.instruction = "open the $top$ drawer " * 20
    shown.frames = {step: shown.frames[step] for step in list(shown.frames)[:columns]}
    figure = draw_episode(shown, every=1)
    figure.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in figure.texts]
    boxes += [("picture", axis.images[0].get_window_extent()) for axis in figure.axes if axis.images]
    boxes += [(axis.get_ylabel(), axis.yaxis.label.get_window_extent()) for axis in figure.axes if not axis.images]
    width, height = figure.canvas.get_width_height()
    assert [what for what, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height] == []
    assert [(a[0], b[0]) for a, b in itertools.combinations(boxes, 2) if a[1].overlaps(b[1])] == []


def test_png_is_a_picture_and_the_same_each_time(episode, tmp_path):
    save_episode(episode, tmp_path / "a.png")
    save_episode(episode, str(tmp_path / "b.PNG"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.PNG").read_bytes()
    picture = cv2.imread(str(tmp_path / "a.png"))
    assert picture.shape[1] > 1500 and picture.std() > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.PNG"]


def test_video_runs_at_the_control_frequency_and_holds_frames(episode, tmp_path):
    save_episode(episode, tmp_path / "episode.mp4")
    frames, stream, last = decode(tmp_path / "episode.mp4")
    assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 10)
    assert len(frames) == episode.length + 1 and last == pytest.approx(5.0)
    for step, shown in ((0, 0), (23, 20), (50, 50)):
        for camera in (0, 1):
            left = camera * (320 + 4)
            enlarged = frames[step][30:350, left : left + 320].astype(int)
            stored = decode_jpeg(episode.frames[shown][camera]).repeat(5, 0).repeat(5, 1)
            other = decode_jpeg(episode.frames[(shown + 25) % 55][camera]).repeat(5, 0).repeat(5, 1)
            assert np.abs(enlarged - stored).mean() < min(3, np.abs(enlarged - other).mean() / 2)
    assert not np.array_equal(frames[23][350:], frames[24][350:])  # the step number goes on while the frame stands


def test_video_of_every_kth_step_stands_longer(episode, tmp_path):
    save_episode(episode, tmp_path / "episode.mp4", every=25)
    frames, _, _ = decode(tmp_path / "episode.mp4")
    stored = decode_jpeg(episode.frames[0][1]).repeat(5, 0).repeat(5, 1)
    assert len(frames) == 51
    before, after = (np.abs(frames[step][30:350, 324:644].astype(int) - stored).mean() for step in (24, 25))
    assert before < 3 < after


@pytest.mark.parametrize("height, width, cameras", [(33, 17, 3), (101, 333, 1)])
def test_odd_sizes_and_other_numbers_of_cameras_work(episode, tmp_path, height, width, cameras):
    from cosmos_ray.replay.format.codec import encode_jpeg

    odd = copy.deepcopy(episode)
    odd.cameras = tuple(f"camera_with_a_long_name_{i}" for i in range(cameras))
    odd.info = {}
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype(np.uint8)
    odd.frames = {step: [encode_jpeg(ramp)] * cameras for step in (10, 20)}
    save_episode(odd, tmp_path / "odd.mp4")
    frames, stream, _ = decode(tmp_path / "odd.mp4")
    assert len(frames) == 51 and stream.average_rate == 20 and frames[0].shape[0] % 2 == frames[0].shape[1] % 2 == 0
    save_episode(odd, tmp_path / "odd.png")


def test_outcomes_in_words(episode):
    changed = copy.deepcopy(episode)
    assert outcome_text(changed) == "timed out after 50 steps"
    changed.score = 0.5
    assert outcome_text(changed) == "timed out after 50 steps, score 0.50"
    changed.success, changed.score = True, None
    assert outcome_text(changed) == "success after 50 steps"
    changed.invalid = "unstable physics"
    assert outcome_text(changed) == "simulation broke after 50 steps"


def test_what_cannot_be_drawn_is_refused_in_one_line(episode, tmp_path):
    bare, long = copy.deepcopy(episode), copy.deepcopy(episode)
    bare.frames = {}
    long.frames = {step: episode.frames[0] for step in range(51)}
    cases = [(episode, "a.gif", None, "must end in .png"), (episode, "a", None, "must end in .png"), (bare, "a.png", None, "no stored"),
             (bare, "a.mp4", None, "no stored"), (episode, "a.png", 0, "1 or more"), (long, "a.png", 1, f"at most {MOST_COLUMNS}"),
             (episode, "missing/a.png", None, "cannot write"), (episode, "missing/a.mp4", None, "cannot write")]
    for shown, name, every, message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            save_episode(shown, tmp_path / name, every)
        assert "\n" not in str(caught.value)
    save_episode(long, tmp_path / "long.png", every=2)
    assert [path.name for path in tmp_path.iterdir()] == ["long.png"]


@pytest.mark.parametrize("name", ["episode.png", "episode.mp4"])
def test_a_file_that_cannot_be_finished_leaves_the_old_one(episode, tmp_path, name):
    """A limit on the size of files stands for a full disk."""
    path = tmp_path / name
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(ConfigError, match="cannot write .*episode"):
            save_episode(episode, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == [name]
