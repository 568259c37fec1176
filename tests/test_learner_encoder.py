"""Encoded windows: what the learner sees of a stored frame, and the cache of it."""

import dataclasses
import zlib

import numpy as np
import pytest
import torch

from cosmos_ray.config import LearnerConfig, ModelConfig
from cosmos_ray.learner.core import LearnerCore
from cosmos_ray.learner.encoder import WindowEncoder, open_latents
from cosmos_ray.model import augmentation
from cosmos_ray.model.images import prepare
from cosmos_ray.model.latents import current_latents, encode_images, training_latents
from cosmos_ray.model.objective import Objective
from cosmos_ray.model.policy import build
from cosmos_ray.model.spec import make_spec
from cosmos_ray.model.training_batch import TrainingBatch
from cosmos_ray.replay.store import ReplayStore
from tests import test_learner, test_model_2b
from tests.test_learner import losses, source
from tests.test_lora import randomised
from tests.test_model import batch, tiny

store, wan_folder = test_learner.store, test_model_2b.wan_folder  # the fixtures



class Counting:
    """A policy's tokenizer, passed through, that counts the windows it is given."""

    def __init__(self, policy):
        self.windows, encode = 0, policy.tokenizer.encode

        def counted(images, slots, frames):
            self.windows += len(images)
            return encode(images, slots, frames)

        policy.tokenizer.encode = counted


def windows(n: int, first: int = 0, size: int = 32) -> TrainingBatch:
    """Different windows under the names of what they show; window i is the same in every batch."""
    rng = [np.random.default_rng(i) for i in range(first, first + n)]
    images, futures = (np.stack([r.integers(0, 256, (2, size, size, 3), dtype=np.uint8) for r in rng]) for _ in range(2))
    whole = batch(n)
    return dataclasses.replace(whole, images=images, future_images=futures, windows=[f"episode@{first + i}" for i in range(n)])


def both(data: TrainingBatch) -> np.ndarray:
    return np.concatenate((data.images, data.future_images), axis=1)


def encoder_of(policy, mode: str, folder=None, *, chunk: int = 8, variants: int = 3, gigabytes: float = 1.0) -> WindowEncoder:
    config = LearnerConfig(latent_cache=mode, latent_variants=variants, latent_cache_gb=gigabytes)
    return WindowEncoder(policy, mode, variants, open_latents(policy, config, chunk, str(folder)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wan(folder, **changes):
    """A policy with the small Wan VAE in ``folder``."""
    config = ModelConfig(preset="cosmos-predict2-2b", width=64, heads=2, layers=1, chunk=16, tokenizer_path=str(folder), image_size=32,
                         **changes)
    return build(make_spec(config, ("wrist", "agent"), 7, 9), embeddings={"lift the cube": torch.zeros(512, 1024)})


def test_without_a_cache_every_batch_is_augmented_anew_where_the_policy_is():
    plain, augmented, data = tiny(), tiny(augment=True), windows(3)
    generator = seeded()
    assert torch.equal(encoder_of(plain, "off").encode(data, generator), encode_images(plain, both(data)))
    assert torch.equal(generator.get_state(), seeded().get_state())  # nothing was drawn
    encoder = encoder_of(augmented, "off")
    first, second = (encoder.encode(data, generator) for _ in range(2))
    wanted = augmentation.augment(torch.from_numpy(both(data)), seeded())
    assert torch.equal(first, encode_images(augmented, wanted)) and not torch.equal(first, second)


@pytest.mark.parametrize("augment, suite", [(True, "libero"), (True, ""), (False, "libero"), (False, "")])
def test_the_plain_cache_holds_windows_as_the_policy_will_see_them(tmp_path, augment, suite):
    policy, data = tiny(augment=augment, suite=suite), windows(3)
    encoder, generator = encoder_of(policy, "plain", tmp_path), seeded()
    first = encoder.encode(data, generator)
    seen = current_latents(policy, data.images, data.proprio)[:, :, list(policy.layout.images)]
    assert torch.equal(first[:, :, :2], seen.half().float())
    assert torch.equal(encoder.encode(data, generator), first)  # the second time from the cache
    assert torch.equal(generator.get_state(), seeded().get_state())
    assert torch.equal(first, encode_images(policy, both(data)).half().float()) == (not augment and not suite)


def test_the_augmented_cache_holds_some_versions_that_are_always_the_same(tmp_path):
    policy = tiny(augment=True)
    encoder, generator = encoder_of(policy, "augmented", tmp_path / "a", variants=3), seeded()
    drawn = torch.cat([encoder.encode(windows(2), generator) for _ in range(40)]).view(40, 2, -1)
    versions = [torch.unique(drawn[:, i], dim=0) for i in range(2)]
    assert [len(v) for v in versions] == [3, 3] and len(encoder.cache) == 6
    other = encoder_of(policy, "augmented", tmp_path / "b", variants=3)  # another cache, another stream, another batch
    generator = seeded(9)
    again = torch.cat([other.encode(windows(1, first=1), generator) for _ in range(40)]).view(40, -1)
    assert torch.equal(torch.unique(again, dim=0), versions[1])
    plain = encoder_of(policy, "plain", tmp_path / "c").encode(windows(2), generator).view(2, -1)
    assert not any(torch.equal(version, plain[i]) for i in range(2) for version in versions[i])


def test_augmented_versions_of_a_policy_that_is_not_augmented_are_one(tmp_path):
    policy = tiny()
    encoder = encoder_of(policy, "augmented", tmp_path)
    found = encoder.encode(windows(2), seeded())
    assert torch.equal(found, encode_images(policy, both(windows(2))).half().float()) and len(encoder.cache) == 2


def test_the_vae_encodes_only_windows_that_are_missing(tmp_path, wan_folder):
    policy = wan(wan_folder)
    count, encoder = Counting(policy), encoder_of(policy, "plain", tmp_path)
    first = encoder.encode(windows(3), seeded())
    assert count.windows == 3
    grown = encoder.encode(windows(4, first=1), seeded())  # two of these are known
    assert count.windows == 5 and torch.equal(grown[:2], first[1:])
    encoder.flush()
    later = encoder_of(policy, "plain", tmp_path)  # the next run of the same command
    assert torch.equal(later.encode(windows(3), seeded()), first) and count.windows == 5
    alone = encoder.encode(windows(1, first=3), seeded())
    assert torch.equal(alone[0], grown[2])


def test_the_policy_s_own_frames_come_from_the_vae_as_they_are_trained_on(tmp_path, wan_folder):
    """The prefix encoded when acting, and the whole window encoded when training, through the same image pipeline."""
    policy, data = wan(wan_folder, suite="libero"), windows(2)
    assert policy.spec.augmented and policy.spec.jpeg
    seen = current_latents(policy, data.images, data.proprio)[:, :, list(policy.layout.images)]
    cached = encoder_of(policy, "plain", tmp_path).encode(data, seeded())
    torch.testing.assert_close(cached[:, :, :2], seen, rtol=1e-3, atol=1e-3)


def test_a_damaged_segment_costs_only_its_windows(tmp_path):
    policy = tiny()
    count, encoder = Counting(policy), encoder_of(policy, "plain", tmp_path)
    latents = []
    for first in (0, 3):
        latents.append(encoder.encode(windows(3, first), seeded()))
        encoder.flush()
    damaged, _ = sorted(tmp_path.rglob("*.arrow"))
    damaged.write_bytes(damaged.read_bytes()[:-50])
    count.windows, again = 0, encoder_of(policy, "plain", tmp_path)
    assert [torch.equal(again.encode(windows(3, i * 3), seeded()), latents[i]) for i in range(2)] == [True, True]
    assert count.windows == 3


def respecified(**changes):
    """Changes a policy's spec."""
    return lambda policy: setattr(policy, "spec", dataclasses.replace(policy.spec, **changes))


@pytest.mark.parametrize("change, mode, chunk", [
    (lambda policy: policy.tokenizer.mean.add_(0.01), "plain", 8), (respecified(cameras=("agent", "wrist")), "plain", 8),
    (respecified(augmented=True), "plain", 8), (respecified(jpeg=True), "plain", 8), (respecified(), "augmented", 8),
    (respecified(), "plain", 7), (respecified(resize="bicubic"), "plain", 8), (respecified(augmentation="torchvision"), "plain", 8),
], ids=["tokenizer", "cameras", "augmentation", "jpeg", "mode", "chunk", "resize", "way"])  # fmt: skip
def test_windows_seen_otherwise_are_never_shared(tmp_path, change, mode, chunk):
    encoder, other = encoder_of(tiny(), "plain", tmp_path), tiny()
    encoder.encode(windows(3), seeded())
    encoder.flush()
    assert len(encoder_of(other, "plain", tmp_path).cache) == 3
    change(other)
    assert len(encoder_of(other, mode, tmp_path, chunk=chunk).cache) == 0


def test_other_augmentation_ranges_start_another_cache(tmp_path, monkeypatch):
    policy = tiny(augment=True)
    encoder_of(policy, "augmented", tmp_path).encode(windows(2), seeded())
    before = encoder_of(policy, "augmented", tmp_path).cache.path
    monkeypatch.setattr(augmentation, "RANGES", (0.8, *augmentation.RANGES[1:]))
    assert encoder_of(policy, "augmented", tmp_path).cache.path != before


def test_frames_are_augmented_after_the_jpeg_that_the_policy_will_see(tmp_path):
    policy, data = tiny(augment=True, suite="libero"), windows(2)
    jpegs = torch.from_numpy(prepare(both(data), 32, True, False))
    assert not torch.equal(jpegs, torch.from_numpy(both(data)))
    fresh = encoder_of(policy, "off").encode(data, seeded())
    assert torch.equal(fresh, encode_images(policy, augmentation.augment(jpegs, seeded(), "torchvision")))
    kept = encoder_of(policy, "augmented", tmp_path, variants=1).encode(data, seeded())
    seeds = [zlib.crc32(f"{name}#0".encode()) for name in data.windows]
    augmented = augmentation.apply(jpegs, augmentation.draw_seeded(seeds), "torchvision")
    assert torch.equal(kept, encode_images(policy, augmented).half().float())


def test_training_latents_hold_the_frames_where_acting_puts_them():
    policy, data = tiny(), windows(2)
    latents, layout = training_latents(policy, data), policy.layout
    now, then = (current_latents(policy, images, data.proprio)[:, :, list(layout.images)] for images in (data.images, data.future_images))
    assert torch.equal(latents[:, :, list(layout.images)], now) and torch.equal(latents[:, :, list(layout.future_images)], then)
    assert torch.equal(training_latents(policy, data, encode_images(policy, both(data))), latents)


@pytest.mark.parametrize("mode", ["off", "plain"])
@pytest.mark.parametrize("height, width", [(48, 48), (24, 40), (256, 192)])
def test_stored_frames_of_any_size_are_learned_as_the_policy_sees_them(tmp_path, mode, height, width):
    policy, rng = tiny(), np.random.default_rng(0)
    images, futures = rng.integers(0, 256, (2, 3, 2, height, width, 3), dtype=np.uint8)
    data = dataclasses.replace(windows(3), images=images, future_images=futures)
    encoded, layout = encoder_of(policy, mode, tmp_path).encode(data, seeded()), policy.layout
    now, then = (current_latents(policy, frames, data.proprio)[:, :, list(layout.images)] for frames in (images, futures))
    acted = torch.cat((now, then), 2)
    assert torch.equal(encoded, acted.half().float() if mode == "plain" else acted)
    assert torch.equal(training_latents(policy, data)[:, :, list(layout.images + layout.future_images)], acted)


def test_cached_latents_give_the_same_loss_up_to_their_rounding(tmp_path):
    policy, data = randomised(), windows(4)
    encoded = encoder_of(policy, "plain", tmp_path).encode(data, seeded())
    with torch.no_grad():
        objective, exact = Objective(policy), encode_images(policy, both(data))
        losses_of = [float(objective.loss(data, seeded(), encoded=e)[0]) for e in (None, encoded, exact)]
    assert losses_of[0] == losses_of[2]
    assert losses_of[1] == pytest.approx(losses_of[0], rel=1e-3) and losses_of[1] != losses_of[0]


def cached_core(root, folder, mode="augmented", gigabytes=1.0, **changes) -> LearnerCore:
    config = dataclasses.replace(test_learner.CONFIG, latent_cache=mode, latent_cache_gb=gigabytes, latent_variants=2, **changes)
    policy = tiny(augment=True)
    return LearnerCore(config, policy, source(ReplayStore(root, create=False)), peak_lr=2e-3, total_steps=40, seed=3,
                       latents=open_latents(policy, config, 8, str(folder)))


def test_a_filled_cache_and_an_empty_one_train_alike(alone, store, tmp_path):
    """What is cached is rounded the first time too, so a resumed or repeated training sees the same numbers."""
    def run(root, folder):
        first = cached_core(root, folder)
        before = losses(first, 3)
        first.save(folder / "state")
        after = losses(first, 3)
        known = len(first.encoder.cache)
        resumed = cached_core(root, folder)
        assert resumed.load(folder / "state") and 0 < len(resumed.encoder.cache) < known
        fresh = cached_core(root, folder / "another")
        return before, after, losses(resumed, 3), losses(fresh, 3), first.weights(1), resumed.weights(1)

    before, after, resumed, fresh, weights, same = alone(run, store.root, tmp_path)
    assert after == resumed and before == fresh
    assert weights.checksum == same.checksum


def test_a_cache_without_room_trains_all_the_same(alone, store, tmp_path):
    def run(root, folder):
        roomy, full = (cached_core(root, folder / str(size), gigabytes=size) for size in (1.0, 0.0))
        return losses(roomy, 3), losses(full, 3), len(roomy.encoder.cache), len(full.encoder.cache)

    roomy, full, some, none = alone(run, store.root, tmp_path)
    assert roomy == full and some > 0 and none == 0
