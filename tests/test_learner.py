"""The learner: DeepSpeed training, resume, and what it publishes."""

import dataclasses
import json

import numpy as np
import pytest

from cosmos_ray.config import LearnerConfig, ReplayConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.learner.core import LearnerCore, learning_rate
from cosmos_ray.learner.mixture import BatchSource, Mixture
from cosmos_ray.model.checkpoint import load_checkpoint
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.speed.training_graphs import capture_training
from cosmos_ray.replay.sampling.sampler import WindowSampler
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.weights import pack, unpack
from tests.test_model import tiny
from tests.test_replay_episode import make_episode

FUTURE = (SampleType.VALUE_FUTURE,)
CONFIG = LearnerConfig(batch_size=8, warmup=2)
BASE = Mixture.base(CONFIG, ReplayConfig())
REFINEMENT = Mixture.refinement(dataclasses.replace(CONFIG, refine_mix=(0.1, 0.45, 0.45)), ReplayConfig())


def fill(root, demos=3, successes=3, failures=3) -> ReplayStore:
    """A store of synthetic episodes; demonstrations carry labels that differ from the executed actions."""
    store = ReplayStore(root)
    for seed in range(demos):
        store.commit(make_episode(seed, "demo", size=32))
    for seed in range(100, 100 + successes):
        store.commit(make_episode(seed, "rollout", size=32))
    for seed in range(200, 200 + failures):
        store.commit(make_episode(seed, "rollout", size=32, success=False))
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ReplayStore:
    return fill(tmp_path_factory.mktemp("store") / "replay")


def source(store: ReplayStore, mixture: Mixture = REFINEMENT, batch_size: int = 8, seed: int = 0) -> BatchSource:
    return BatchSource(WindowSampler(store, chunk=8, gamma=0.98, seed=seed), mixture, batch_size)


# ---------------------------------------------------------------- learning rate


@pytest.mark.parametrize("step, expected", [
    (0, 0.1), (4, 0.5), (9, 1.0),  # ten steps of warm-up
    (40, 1.0), (50, 1.0),  # plateau
    (75, 0.55), (99, 0.118), (100, 0.1), (120, 0.1),  # down to a tenth of the peak
])  # fmt: skip
def test_learning_rate_schedule(step, expected):
    config = LearnerConfig(warmup=10, decay_from=0.5, final_lr=0.1)
    assert learning_rate(step, 100, 2.0, config) == pytest.approx(2.0 * expected)


def test_learning_rate_without_warm_up_or_decay():
    config = LearnerConfig(warmup=0, decay_from=1.0)
    assert [learning_rate(step, 10, 0.5, config) for step in range(10)] == [0.5] * 10


# ---------------------------------------------------------------- core


def core_on(root, mixture: Mixture = REFINEMENT, **changes) -> LearnerCore:
    """A learner on the store in ``root``, always the same one."""
    store = ReplayStore(root, create=False)
    policy = tiny(world_weight=1.0)  # the future frames of synthetic episodes are noise that nothing predicts
    return LearnerCore(dataclasses.replace(CONFIG, **changes), policy, source(store, mixture), peak_lr=2e-3, total_steps=40, seed=3)


def losses(core: LearnerCore, steps: int) -> list[float]:
    return [core.step()["loss"] for _ in range(steps)]


def test_graphs_without_a_gpu_are_refused():
    with pytest.raises(ConfigError, match="learner.accelerate = 'graphs' needs a GPU.*'none'"):
        capture_training(tiny().net)


def test_training_lowers_the_loss_and_stops_at_the_last_step(alone, store):
    def train(root):
        core = core_on(root, BASE)  # of the refinement mixture one sample in ten is the policy's: too few to see it learn
        first = core.train(10)
        core.train(20)
        return first, core.train(100), core.train(5)

    first, last, none = alone(train, store.root)
    assert last["loss"] < 0.7 * first["loss"] and last["action"] < first["action"]
    assert (first["step"], last["step"], none) == (10, 40, {"step": 40})
    assert first["lr"] > last["lr"] and np.isfinite(last["grad_norm"])


def test_a_resumed_learner_is_bit_identical_to_one_that_never_stopped(alone, store, tmp_path):
    def run(root, folder):
        whole = core_on(root)
        before = losses(whole, 3)
        whole.save(folder)
        after = losses(whole, 4)
        resumed = core_on(root)
        assert resumed.load(folder) and resumed.step_count == 3
        again, nets = losses(resumed, 4), [pack(core.policy.net.named_parameters(), 1) for core in (whole, resumed)]
        return before, after, again, whole.weights(1), resumed.weights(1), *nets

    before, after, again, average, average_again, raw, raw_again = alone(run, store.root, tmp_path / "state")
    assert after == again and before != after[:3]
    assert average.checksum == average_again.checksum != raw.checksum == raw_again.checksum


def test_nothing_to_resume_is_said_and_changes_nothing(alone, store, tmp_path):
    def run(root, folder):
        core = core_on(root)
        return core.load(folder), core.step_count

    assert alone(run, store.root, tmp_path / "state") == (False, 0)


@pytest.mark.parametrize("ema", [0.5, 0.0])
def test_the_exported_policy_is_the_published_one_and_training_goes_on_unchanged(alone, store, tmp_path, ema):
    def run(root, path):
        exported, other = core_on(root, ema=ema), core_on(root, ema=ema)
        losses(exported, 3)
        exported.export(path, 9, {"stage": "test"})
        losses(other, 3)
        return exported.weights(9), pack(exported.policy.net.named_parameters(), 9), losses(exported, 2), losses(other, 2)

    published, raw, after_export, without = alone(run, store.root, tmp_path / "policy")
    policy, version = load_checkpoint(tmp_path / "policy")
    assert version == 9 and pack(policy.net.named_parameters(), 9).checksum == published.checksum
    assert (published.checksum == raw.checksum) == (ema == 0)
    assert after_export == without
    assert json.loads((tmp_path / "policy" / "policy.json").read_text())["info"] == {"step": 3, "stage": "test"}


def test_bf16_trains_and_publishes_float32(alone, store):
    def run(root):
        core = core_on(root, precision="bf16")
        return losses(core, 12), core.weights(1)

    seen, weights = alone(run, store.root)
    assert np.isfinite(seen).all() and np.mean(seen[-3:]) < np.mean(seen[:3])
    unpack(weights, tiny().net)
