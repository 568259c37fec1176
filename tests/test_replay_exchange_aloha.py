"""Episodes of ALOHA, in the layouts that the public cosmos-policy code writes and reads."""

import cv2
import h5py
import numpy as np
import pytest
import torch

from cosmos_ray.config import LearnerConfig, ModelConfig, ReplayConfig
from cosmos_ray.config.suites import SUITES
from cosmos_ray.embodiment import Embodiment
from cosmos_ray.errors import StoreError
from cosmos_ray.learner.core import LearnerCore
from cosmos_ray.learner.mixture import BatchSource, Mixture
from cosmos_ray.model.images import prepare
from cosmos_ray.model.policy import build
from cosmos_ray.model.spec import make_spec
from cosmos_ray.replay import ReplayStore, WindowSampler
from cosmos_ray.replay.exchange.aloha import VIEWS, export_aloha, read_aloha
from cosmos_ray.replay.exchange.cosmos_demos import export_demonstrations
from cosmos_ray.replay.exchange.cosmos_hdf5 import export_rollouts
from cosmos_ray.replay.exchange.importing import ImportOptions, import_episodes
from cosmos_ray.replay.format.codec import decode_jpeg, encode_jpeg
from cosmos_ray.replay.sampling.ranges import dataset_statistics
from tests.test_replay_last_action import assert_windows_are_the_public_ones

STEPS, SIZE = 9, 64
CAMERAS = ("cam_left_wrist", "cam_right_wrist", "cam_high")


def picture(t, camera):
    y, x = np.mgrid[:SIZE, :SIZE]
    return np.stack([x * 3 + 9 * t, y * 3 + 40 * camera, (x + y) + 5 * t], -1).astype(np.uint8) // 2 + 40


def write_video(path, camera, steps):
    """As the public script: OpenCV, mp4v, 25 pictures per second."""
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, (SIZE, SIZE))
    for t in range(steps):
        out.write(cv2.cvtColor(picture(t, camera), cv2.COLOR_RGB2BGR))
    out.release()


def write_episode(path, pictures="videos", *, steps=STEPS, frames=None, **attributes):
    """An episode of the public layout; its pictures as ``videos``, ``images`` or ``jpeg``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(int(path.stem.split("_")[1]))
    with h5py.File(path, "w") as file:
        file.attrs["sim"] = False
        for name, value in attributes.items():
            file.attrs[name] = value
        observed = file.create_group("observations")
        observed["qpos"], file["action"] = rng.normal(size=(steps, 14)).astype("f4"), rng.normal(size=(steps, 14)).astype("f4")
        observed["qvel"] = observed["effort"] = np.zeros((steps, 14), "f4")
        file["relative_action"] = np.zeros((steps, 14), "f4")
        for number, camera in enumerate(CAMERAS):
            if pictures == "videos":
                video = path.with_name(f"{path.stem}_{camera}.mp4")
                write_video(video, number, frames or steps)
                observed.create_dataset(f"video_paths/{camera}", data=video.name.encode())
            elif pictures == "images":
                observed[f"images/{camera}"] = np.stack([picture(t, number) for t in range(steps)])
            else:
                column = file.create_dataset(f"{VIEWS[camera]}_images_jpeg", (steps,), dtype=h5py.vlen_dtype(np.uint8))
                for t in range(steps):
                    column[t] = np.frombuffer(encode_jpeg(picture(t, number)), np.uint8)
    return path


def imported(tmp_path, path, **options):
    store = ReplayStore(tmp_path / "store")
    done = import_episodes(read_aloha, path, store, ImportOptions(**options))
    return done, [store.read(s.name) for s in sorted(store.summaries(), key=lambda s: s.key.seed)], store


@pytest.mark.parametrize("pictures", ["videos", "images", "jpeg"])
def test_a_demonstration_gives_the_windows_of_the_public_loader(tmp_path, pictures):
    file = write_episode(tmp_path / "data/put_candies_in_bowl_1000_steps/train/episode_3.hdf5", pictures)
    done, (episode,), store = imported(tmp_path, tmp_path / "data")
    assert episode.cameras == CAMERAS and episode.key.source == "demo" and episode.success
    assert episode.instruction == "put candies in bowl" and any("folder's name" in note for note in done.notes)
    assert done.embodiment.control_freq == (25 if pictures == "videos" else 0)
    frames = [[decode_jpeg(jpeg) for jpeg in episode.frames[t]] for t in range(STEPS)]
    for t in range(STEPS):
        for number in range(3):
            assert np.abs(frames[t][number].astype(int) - picture(t, number)).mean() < 4  # a neighbour is off by more
    with h5py.File(file) as source:
        assert_windows_are_the_public_ones(store, episode.key.name, source["action"][:], source["observations/qpos"][:], frames)


def test_rollouts_have_their_outcome_and_partial_credit(tmp_path):
    folder = tmp_path / "rollouts"
    for number, (success, score) in enumerate(((True, 1.0), (False, 0.4), (False, 0.0))):
        write_episode(folder / f"episode_{number}.hdf5", "jpeg", success=success, success_score=score, task_description="fold shirt")
    done, episodes, store = imported(tmp_path, folder)
    assert [(e.success, e.score) for e in episodes] == [(True, None), (False, 0.4), (False, None)]
    assert {e.key.source for e in episodes} == {"rollout"}
    assert [s.score for s in sorted(store.summaries(), key=lambda s: s.key.seed)] == [1.0, 0.4, 0.0]
    assert done.instructions == {"fold shirt": 3} and not done.skipped


@pytest.mark.parametrize("kind, text", [
    ("unknown folder", "give --instruction TEXT"), ("short video", "has 7 pictures, there are 9 actions"),
    ("long video", "more than 9 pictures"), ("no video", "is missing: the video belongs beside"), ("elsewhere", "not followed"),
    ("score", "success_score = 3.0"),
])  # fmt: skip
def test_what_an_episode_lacks_is_one_line(tmp_path, kind, text):
    folder = "stack_cups" if kind == "unknown folder" else "fold_shirt_15"
    extra = {"success": True, "success_score": 3.0} if kind == "score" else {}
    frames = {"short video": 7, "long video": 12}.get(kind)
    file = write_episode(tmp_path / folder / "train/episode_0.hdf5", frames=frames, **extra)
    if kind == "no video":
        file.with_name("episode_0_cam_high.mp4").unlink()
    elif kind == "elsewhere":
        with h5py.File(file, "r+") as source:
            del source["observations/video_paths/cam_high"]
            source["observations/video_paths/cam_high"] = b"../../../etc/passwd"
    done, episodes, _ = imported(tmp_path, file)
    assert not episodes and text in done.skipped[0][1] and "\n" not in done.skipped[0][1]


def test_validation_episodes_stay_out_and_that_is_said(tmp_path):
    for split in ("train", "val"):
        write_episode(tmp_path / f"data/fold_shirt_15/{split}/episode_{'01'[split == 'val']}.hdf5")
    done, episodes, _ = imported(tmp_path, tmp_path / "data")
    assert len(episodes) == 1 and any("1 episodes of val/ are left out" in note for note in done.notes)
    assert len(imported(tmp_path / "val", tmp_path / "data/fold_shirt_15/val")[1]) == 1


def test_episodes_come_back_as_they_went_out(tmp_path):
    write_episode(tmp_path / "in/fold_shirt_15/train/episode_0.hdf5")
    write_episode(tmp_path / "in/fold_shirt_15/train/episode_1.hdf5", "jpeg", success=False, success_score=0.4)
    _, originals, store = imported(tmp_path, tmp_path / "in")
    done = export_aloha(store, store.summaries(), tmp_path / "out")
    assert done.episodes == 2 and not done.skipped
    demo, rollout = tmp_path / "out/demos/fold_shirt/train/episode_0.hdf5", tmp_path / "out/rollouts/fold_shirt/episode_0.hdf5"
    with h5py.File(demo) as file:  # what the public loader reads of a demonstration
        assert file["action"].shape == file["observations/qpos"].shape == (STEPS, 14)
        assert all(file[f"observations/images/{camera}"].shape == (STEPS, SIZE, SIZE, 3) for camera in CAMERAS)
    _, (again, rolled), _ = imported(tmp_path / "again", tmp_path / "out")
    by_source = {e.key.source: e for e in (again, rolled)}
    for original in originals:
        back = by_source[original.key.source]
        assert np.array_equal(back.actions, original.actions) and np.array_equal(back.proprio, original.proprio)
        assert (back.success, back.score, back.instruction, back.cameras) == (
            original.success, original.score, original.instruction, original.cameras)
    assert by_source["rollout"].frames == next(e for e in originals if e.key.source == "rollout").frames and rollout.exists()


def test_two_wrist_cameras_do_not_go_out_as_one(tmp_path):
    write_episode(tmp_path / "in/fold_shirt_15/train/episode_0.hdf5", "jpeg", success=True)
    _, (episode,), store = imported(tmp_path, tmp_path / "in")
    for export in (export_rollouts, export_demonstrations):
        with pytest.raises(StoreError, match="cam_left_wrist, cam_right_wrist, cam_high: the format needs"):
            export(store, store.summaries(), tmp_path / "out")


def test_a_policy_of_the_suite_trains_on_imported_episodes(alone, tmp_path):
    """14 numbers per action, 50 actions per chunk, three cameras, frames of another size than the network's."""
    for number in range(3):
        write_episode(tmp_path / f"data/fold_shirt_15/train/episode_{number}.hdf5", steps=60)
    done, _, store = imported(tmp_path, tmp_path / "data", resize=96)
    assert done.embodiment.misfit(Embodiment(CAMERAS, 14, 14, 25)) == [] and set(done.sizes.values()) == {(96, 96)}

    def train(root):
        suite, store = SUITES["aloha"], ReplayStore(root, create=False)
        config = ModelConfig(width=64, heads=2, layers=2, image_size=64, chunk=suite.chunk)
        policy = build(make_spec(config, CAMERAS, suite.action_dim, suite.proprio_dim), seed=1)
        store.refresh()
        stats = dataset_statistics(store)
        policy.set_statistics(stats.labels_min, stats.labels_max, stats.proprio_min, stats.proprio_max)
        sampler = WindowSampler(store, chunk=suite.chunk, gamma=suite.gamma, seed=0)
        policy.tokenizer.fit(torch.from_numpy(prepare(sampler.draw(4, "demo").images, 64, False, False)[:, 0]))
        learner = LearnerConfig(batch_size=4, warmup=2)
        core = LearnerCore(learner, policy, BatchSource(sampler, Mixture.base(learner, ReplayConfig()), 4), peak_lr=2e-3, total_steps=40,
                           seed=3)
        return core.train(5)["loss"], core.train(30)["loss"]

    first, last = alone(train, store.root)
    assert np.isfinite(first) and last < first
