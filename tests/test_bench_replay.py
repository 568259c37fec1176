"""The replay benchmark at toy size: every format returns the same windows, and the figures it promises are written."""

import importlib
import importlib.util
import json
import sys

import numpy as np
import pytest

from jobs.bench import replay_commits, replay_timing


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("jobs.bench.replay")


@pytest.fixture(scope="module")
def written(bench, tmp_path_factory):
    """Three short episodes in our store and in every format, at 32 pixels."""
    folder = tmp_path_factory.mktemp("formats")
    episodes = [bench.make_episode(seed, 32, length, 5.0) for seed, length in enumerate((20, 24, 30))]
    store = bench.ReplayStore(folder / "store")
    for episode in episodes:
        assert store.commit(episode)
    bench.formats.write_all(folder, episodes, 32)
    return folder, episodes


@pytest.mark.parametrize("key", ["vs_hdf5_episode_jpeg", "vs_h5py_frame_jpeg", "vs_lance", "vs_lerobot_v3", "vs_lerobot_v3_h264",
                                 "vs_lerobot_v3_pyav"])
def test_both_sides_return_the_same_windows(bench, written, key):
    reader, part, module = bench.formats.COMPETITORS[key]
    if not bench.formats.installed(module):
        pytest.skip(replay_timing.MISSING)
    folder, episodes = written
    ours = bench.sampler_of(folder / "store").draw(40, "demo")
    windows = bench.windows_of(ours)
    assert {(number, t + bench.CHUNK > episodes[number].length) for number, t in windows} >= {(0, True), (1, True), (2, True), (2, False)}
    theirs = reader(folder / part, bench.Vectors(episodes, 32))
    batch = theirs.read(windows)
    psnr = bench.check_same(key, ours, batch)
    assert np.isinf(psnr) != ("lerobot" in key)
    shifted = theirs.read([(number, (t + 5) % episodes[number].length) for number, t in windows])
    with pytest.raises(SystemExit, match=f"{key} returns other"):
        bench.check_same(key, ours, shifted)
    theirs.close()


def test_other_frames_of_a_video_are_noticed(bench, written):
    """Everything else is right but the frames are of another episode: their distance has to show it."""
    folder, episodes = written
    ours = bench.sampler_of(folder / "store").draw(10, "demo")
    theirs = bench.formats.LeRobot(folder / "h264", bench.Vectors(episodes, 32))
    right = theirs.read(bench.windows_of(ours))
    wrong = theirs.read([((number + 1) % 3, min(t, 19)) for number, t in bench.windows_of(ours)])
    theirs.close()
    with pytest.raises(SystemExit, match="returns other frames"):
        bench.check_same("vs_lerobot_v3_h264", ours, right | {name: wrong[name] for name in ("images", "future_images")})


def test_the_figures_are_written(bench, tmp_path, monkeypatch, capsys):
    """The whole script, with Lance missing: that is said, and everything else is measured."""
    monkeypatch.setattr(bench.formats, "installed", lambda module: module != "lance" and importlib.util.find_spec(module) is not None)
    monkeypatch.setattr(bench, "SETTLE_SECONDS", 0)
    for name, value in (("WRITERS", 2), ("SHARDS", 4)):
        monkeypatch.setattr(replay_commits, name, value)
    path = tmp_path / "replay.json"
    arguments = (f"--size 32,16 --episodes 2 --length 18 --batch 4 --batches 2 --rounds 1 --passes 2 --seconds 0.01 --commits 2 "
                 f"--per-writer 2 --open-100k --open-episodes 20 --folder {tmp_path} --json {path}")  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["replay.py", *arguments.split()])
    bench.main()
    results = json.loads(path.read_text())
    names = ["vs_hdf5_episode_jpeg", "vs_h5py_frame_jpeg", "over_jpeg_decode", "commit_over_write_fsync", "commit_over_durable_write",
             "threads_two_over_one", "eight_writers_of_fsync", "vs_lerobot_v3", "vs_lerobot_v3_h264", "vs_lerobot_v3_pyav"]  # fmt: skip
    expected = {*names, *(f"{name}_16" for name in names), *(f"open_20_episodes{how}_s" for how in ("", "_without_manifest", "_to_sample"))}
    assert set(results) == expected
    assert all(value > 0 for value in results.values())
    output = capsys.readouterr()
    assert f"{'vs_lance':<28} {replay_timing.MISSING}" in output.out
    assert "4 commits, none lost" in output.out  # 2 writers, 2 episodes each, 1 round
    assert [entry.name for entry in tmp_path.iterdir()] == ["replay.json"]


def test_a_lost_episode_is_no_figure(bench, written, tmp_path, monkeypatch):
    """A writer whose commits do not arrive ends the benchmark."""
    monkeypatch.setattr(replay_commits, "WRITERS", 1)
    monkeypatch.setattr(replay_commits, "SHARDS", 4)
    monkeypatch.setattr(bench.ReplayStore, "refresh", lambda store: None)
    options = type("Options", (), {"rounds": 1, "per_writer": 1})
    with pytest.raises(SystemExit, match="are missing of those that were acknowledged"):
        bench.bench_writers(options, bench.Report(None), tmp_path, written[1][0], "")
