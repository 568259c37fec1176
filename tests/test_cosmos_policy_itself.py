"""The loaders of the public cosmos-policy repository against our windows, on the same files: COSMOS_POLICY names a checkout of it.

Its image preprocessing is left out on both sides; torchvision and imageio, which only that needs, are stood in for.
"""

import collections
import contextlib
import importlib
import io
import os
import shutil
import sys
import types
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from cosmos_ray.replay import ReplayStore, WindowSampler
from cosmos_ray.replay.exchange.aloha import export_aloha, read_aloha
from cosmos_ray.replay.exchange.cosmos_demos import export_demonstrations
from cosmos_ray.replay.exchange.cosmos_hdf5 import export_rollouts, read_rollouts
from cosmos_ray.replay.exchange.importing import import_episodes
from cosmos_ray.replay.exchange.robomimic import read_demonstrations
from tests.test_replay_exchange_aloha import write_episode
from tests.test_replay_exchange_hdf5_kinds import write_robocasa_rollout

CHUNK, GAMMA = 5, 0.99
CASES = Path(__file__).parent / "data" / "cases"
#: Per suite: reader, demonstrations, class of the loader, the cameras' names in its samples, in our order.
SUITES = {
    "libero": (read_demonstrations, "libero_openvla_regenerated", "LIBERODataset", ("wrist_image", "image")),
    "robocasa": (read_demonstrations, "robocasa_cosmos_release", "RoboCasaDataset", ("wrist_image", "image", "image2")),
    "aloha": (read_aloha, "", "ALOHADataset", ("wrist_image", "wrist_image2", "image")),
}
PLAIN = {"normalize_images": False, "normalize_actions": False, "normalize_proprio": False, "use_image_aug": False, "use_proprio": True,
         "use_stronger_image_aug": False, "num_duplicates_per_image": 4, "return_value_function_returns": True, "chunk_size": CHUNK,
         "gamma": GAMMA, "final_image_size": 64}


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    """The modules of its data sets, from a copy without what they do not need."""
    checkout = Path(os.environ.get("COSMOS_POLICY", "/nowhere"))
    if not (checkout / "cosmos_policy" / "datasets").is_dir():
        pytest.skip("COSMOS_POLICY names no checkout of the public repository; test_replay_last_action has its rules")
    copy = tmp_path_factory.mktemp("public")
    shutil.copytree(checkout / "cosmos_policy" / "datasets", copy / "cosmos_policy" / "datasets")
    (copy / "cosmos_policy" / "utils").mkdir()
    shutil.copy(checkout / "cosmos_policy" / "utils" / "utils.py", copy / "cosmos_policy" / "utils")
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.functional", "imageio"]
    stands = {name: types.ModuleType(name) for name in names}
    stands["torchvision"].transforms = stands["torchvision.transforms"]
    stands["torchvision.transforms"].functional = stands["torchvision.transforms.functional"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(copy))
        for name, module in stands.items():
            patch.setitem(sys.modules, name, module)
        found = {suite: importlib.import_module(f"cosmos_policy.datasets.{suite}_dataset") for suite in SUITES}
        for module in found.values():
            module.preprocess_image = lambda images, **options: torch.from_numpy(images.transpose(3, 0, 1, 2).copy())
        yield found


def samples(module, suite, demos, rollouts=None):
    """Every sample of the public loader: of the demonstrations, or of the rollouts beside them."""
    options = {**PLAIN, "demonstration_sampling_prob": 0.5 if rollouts else 1.0, "rollout_data_dir": str(rollouts or "")}
    if suite == "aloha":
        options["use_jpeg_for_rollouts"] = True
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        data = getattr(module, SUITES[suite][2])(str(demos), **options)
        data.t5_text_embeddings = collections.defaultdict(lambda: torch.zeros(1, 512, 8))
        return [data[index] for index in range(data.adjusted_demo_count if rollouts else 0, len(data))]


def assert_equal(theirs, store, cameras, tolerance):
    """Every sample is one of our windows, and every window one of the samples; pictures within ``tolerance`` grey levels on average."""
    sampler = WindowSampler(store, chunk=CHUNK, gamma=GAMMA, seed=0)
    total, ours = sum(count.windows for name, count in sampler.counts().items() if name != "rollout"), {}
    while len(ours) < total:
        batch = sampler.draw(64, "all")
        ours |= {(batch.episodes[i], int(batch.offsets[i])): (batch, i) for i in range(64)}
    for sample in theirs:
        video = sample["video"].numpy().transpose(1, 2, 3, 0).astype(int)
        shown = {when: [video[1 + 4 * (int(sample[f"{when}_{camera}_latent_idx"]) - 1)] for camera in cameras]
                 for when in ("current", "future")}  # fmt: skip
        same = [key for key, (batch, i) in ours.items()
                if np.array_equal(batch.proprio[i], np.asarray(sample["proprio"], np.float32))
                and np.array_equal(batch.actions[i], np.asarray(sample["actions"], np.float32))
                and np.array_equal(batch.future_proprio[i], np.asarray(sample["future_proprio"], np.float32))
                and abs(batch.value[i] - float(sample["value_function_return"])) < 1e-6
                and np.abs(np.stack(shown["current"]) - batch.images[i]).mean((1, 2, 3)).max() <= tolerance
                and np.abs(np.stack(shown["future"]) - batch.future_images[i]).mean((1, 2, 3)).max() <= tolerance]  # fmt: skip
        assert same, f"sample {sample['__key__']} is none of our windows"
        del ours[same[0]]
    assert not ours


def stored(tmp_path, read, path):
    store = ReplayStore(tmp_path)
    assert not import_episodes(read, path, store).skipped
    return store


@pytest.mark.parametrize("suite", SUITES)
def test_demonstrations_as_they_come_and_as_they_go_out(loaders, tmp_path, suite):
    read, case, _, cameras = SUITES[suite]
    demos, out = tmp_path / "demos", tmp_path / "out"
    if case:
        shutil.copytree(CASES / case, demos)
    else:
        for number in range(2):
            write_episode(demos / f"fold_shirt_15/train/episode_{number}.hdf5", ("videos", "images")[number], steps=12)
    store = stored(tmp_path / "store", read, demos)
    assert_equal(samples(loaders[suite], suite, demos), store, cameras, 4)  # pixels pass JPEG once on the way in
    export = export_aloha if suite == "aloha" else export_demonstrations
    export(store, store.summaries(), out)
    assert_equal(samples(loaders[suite], suite, out / "demos" if suite == "aloha" else out), store, cameras, 0)


@pytest.mark.parametrize("suite", ["robocasa", "aloha"])
def test_rollouts_as_they_come_and_as_they_go_out(loaders, tmp_path, suite):
    _, case, _, cameras = SUITES[suite]
    demos, rollouts, out = tmp_path / "demos", tmp_path / "rollouts", tmp_path / "out"
    rollouts.mkdir()
    for number, success in enumerate((True, False)):
        if case:
            file = write_robocasa_rollout(rollouts / f"episode_data--task=open--ep={number}--success={success}--x.hdf5", success)
            with h5py.File(file, "r+") as opened:
                opened["proprio"][:] += number
        else:
            write_episode(rollouts / f"episode_{number}.hdf5", "jpeg", steps=12, success=success, success_score=float(success),
                          task_description="fold shirt")
    if case:
        shutil.copytree(CASES / case, demos)
    else:
        write_episode(demos / "fold_shirt_15/train/episode_0.hdf5", "images", steps=12)
    store = stored(tmp_path / "store", read_rollouts if case else read_aloha, rollouts)
    assert_equal(samples(loaders[suite], suite, demos, rollouts), store, cameras, 0)
    (export_rollouts if case else export_aloha)(store, store.summaries(), out)
    assert_equal(samples(loaders[suite], suite, demos, out if case else out / "rollouts"), store, cameras, 0)
