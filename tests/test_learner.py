"""The learner: DeepSpeed training, resume, and ranks that die."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import ray

from cosmos_ray.asks import learner_ask
from cosmos_ray.config import LearnerConfig, ReplayConfig
from cosmos_ray.errors import CheckpointError, ConfigError, StoreError
from cosmos_ray.learner.actor import LearnerGroup, LearnerLost, LearnerTask
from cosmos_ray.learner.core import LearnerCore, learning_rate
from cosmos_ray.learner.mixture import BatchSource, Mixture
from cosmos_ray.model.checkpoint import load_checkpoint, save_policy
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.speed.training_graphs import capture_training
from cosmos_ray.placement import Placement
from cosmos_ray.replay.sampling.sampler import WindowSampler
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.supervision import Supervisor
from cosmos_ray.weights import Weights, pack, unpack
from tests.conftest import file_system
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


@pytest.mark.parametrize("name, theirs, ours", [
    ("zero_stage", 1, 0), ("zero_stage", 0, 1), ("precision", "fp32", "bf16"), ("lora_rank", 0, 4)])
def test_state_that_these_settings_cannot_continue_is_refused_with_both_ways_out(alone, store, tmp_path, name, theirs, ours):
    def run(root, folder):
        core_on(root, **{name: theirs}).save(folder)
        try:
            core_on(root, **{name: ours}).load(folder)
        except CheckpointError as error:
            return str(error)

    message = alone(run, store.root, tmp_path / "state")
    assert f"written with learner.{name} {theirs}, not {ours}: give --learner.{name.replace('_', '-')} {theirs} to continue" in message
    assert f"or delete {tmp_path / 'state'} to begin this stage anew" in message and len(message.splitlines()) == 1
    assert "--fresh" not in message


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
    "model states torn": lambda tag: truncate(next(tag.glob("*model_states.pt"))),
    "optimizer states torn": lambda tag: truncate(next(tag.glob("*optim_states.pt"))),
    "average torn": lambda tag: truncate(tag / "average.pt"),
    "random state torn": lambda tag: truncate(tag / "rank0.json"),
    "model states missing": lambda tag: next(tag.glob("*model_states.pt")).unlink(),
    "optimizer states missing": lambda tag: next(tag.glob("*optim_states.pt")).unlink(),
    "model states empty": lambda tag: next(tag.glob("*model_states.pt")).write_bytes(b""),
    "average empty": lambda tag: (tag / "average.pt").write_bytes(b""),
    "directory missing": lambda tag: tag.rename(tag.with_name("gone")),
}


@pytest.fixture(scope="module")
def saved_state(alone, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learner") / "state"

    def run(root, folder):
        core = core_on(root)
        core.step()
        core.save(folder)

    alone(run, store.root, folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_state_is_refused_with_one_clear_line(alone, store, saved_state, tmp_path, damage):
    folder = tmp_path / "state"
    shutil.copytree(saved_state, folder)
    DAMAGE[damage](folder / "step_00000001")

    def run(root, folder):
        try:
            core_on(root).load(folder)
        except CheckpointError as error:
            return str(error)

    message = alone(run, store.root, folder)
    assert message is not None, "damaged state was loaded without complaint"
    assert len(message.splitlines()) == 1 and "step_00000001" in message
    assert f"delete {folder} to begin this stage anew" in message and "--fresh" not in message


def test_a_save_that_was_killed_half_way_leaves_the_one_before(alone, store, saved_state, tmp_path):
    folder = tmp_path / "state"
    shutil.copytree(saved_state, folder)
    (folder / "step_00000002").mkdir()
    (folder / "step_00000002" / "mp_rank_00_model_states.pt").write_bytes(b"half")
    (folder / "latest.tmp").write_text("step_00000002")

    def run(root, folder):
        core = core_on(root)
        return core.load(folder), core.step_count

    assert alone(run, store.root, folder) == (True, 1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB."""
    with file_system(tmp_path / "disk", "24m") as mounted:
        yield mounted


def test_a_full_disk_is_one_clear_error_and_the_state_of_before_is_resumed_from(alone, store, small_disk):
    def run(root, disk):
        core = core_on(root)
        core.step()
        core.save(disk / "state")
        room = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(room - 200_000))
        core.step()
        with pytest.raises(CheckpointError) as error:
            core.save(disk / "state")
        again = core_on(root)
        resumed = again.load(disk / "state"), again.step_count, sorted(p.name for p in (disk / "state").glob("step_*"))
        (disk / "filler").unlink()
        core.step()
        core.save(disk / "state")
        return str(error.value), resumed, core_on(root).load(disk / "state")

    message, resumed, after = alone(run, store.root, small_disk)
    assert "learner state cannot be written to" in message and "make room there and run the same command again" in message
    assert "\n" not in message and resumed == (True, 1, ["step_00000001"]) and after


def test_only_the_last_two_states_are_kept(alone, store, tmp_path):
    def run(root, folder):
        core = core_on(root)
        for _ in range(4):
            core.step()
            core.save(folder)
        return core_on(root).load(folder)

    assert alone(run, store.root, tmp_path / "state")
    assert sorted(p.name for p in (tmp_path / "state").glob("step_*")) == ["step_00000003", "step_00000004"]


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


# ---------------------------------------------------------------- ranks


def group_of(store, folder, stage: int, resume=False, **changes) -> LearnerGroup:
    if not (folder / "policy").exists():
        save_policy(tiny(), folder / "policy", 0)
    config = dataclasses.replace(CONFIG, **{"world_size": 2, "zero_stage": stage, "threads": 1, **changes})
    task = LearnerTask(str(folder / "policy"), str(store.root), str(folder / "state"), REFINEMENT, 8, 0.98, 2e-3, 1000, 0)
    return LearnerGroup(config, task, place=Placement(Supervisor()).gang(learner_ask(config)), resume=resume)


def digests(group: LearnerGroup) -> list[str]:
    """Hash of the parameters each rank holds."""
    look = lambda self: hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in self.core.policy.net.parameters())).hexdigest()  # noqa: E731
    return ray.get([rank.__ray_call__.remote(look) for rank in group.ranks])


def train_and_publish(group: LearnerGroup, folder, stage: int) -> None:
    """Three steps, after which ranks, export and published weights must agree."""
    references = group.begin_training(3)
    left, right = ray.get(references)
    assert left["loss"] != right["loss"]  # each rank draws its own samples
    assert left["grad_norm"] == right["grad_norm"]
    group.finish_training(references)
    assert group.step == 3
    if stage < 3:
        assert len(set(digests(group))) == 1
    group.export(folder / "exported", 4, {})
    policy, version = load_checkpoint(folder / "exported")
    assert version == 4 and pack(policy.net.named_parameters(), 4).checksum == published(group, 4).checksum


def published(group: LearnerGroup, version: int) -> Weights:
    """The record of the weights that ``group`` publishes now."""
    group.publish(version)
    until = time.monotonic() + 300
    while (record := group.published()) is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert group.published() is None  # given out once
    return record


def pid_of(rank) -> int:
    return ray.get(rank.__ray_call__.remote(lambda self: os.getpid()))


def test_two_ranks_agree_and_the_sigkill_of_one_is_learner_lost(alone, store, tmp_path):
    group = group_of(store, tmp_path, 1, ema=0.9)
    try:
        train_and_publish(group, tmp_path, 1)
        victim, references = pid_of(group.ranks[1]), group.begin_training(500)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(LearnerLost, match="run the same command again") as caught:
            group.finish_training(references)
        assert len(str(caught.value).splitlines()) == 1
    finally:
        group.close()


@pytest.mark.slow
@pytest.mark.parametrize("stage, ema", [(1, 0.9), (2, 0.9), (3, 0.0)])
def test_two_ranks_resume_with_the_same_numbers_in_every_zero_stage(alone, store, tmp_path, stage, ema):
    group = group_of(store, tmp_path, stage, ema=ema)
    try:
        train_and_publish(group, tmp_path, stage)
        group.save()
        continued = group.finish_training(group.begin_training(2))
    finally:
        group.close()
    group = group_of(store, tmp_path, stage, resume=True, ema=ema)
    try:
        assert group.step == 3
        again = group.finish_training(group.begin_training(2))
        assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in continued.items() if k != "seconds"}
        victim, references = pid_of(group.ranks[0]), group.begin_training(500)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(LearnerLost):
            group.finish_training(references)
    finally:
        group.close()


def test_a_learner_without_its_store_raises_the_error_of_the_rank(local_ray, store, tmp_path):
    save_policy(tiny(), tmp_path / "policy", 0)
    task = LearnerTask(str(tmp_path / "policy"), str(tmp_path / "nothing"), str(tmp_path / "state"), BASE, 8, 0.98, 1e-3, 10, 0)
    with pytest.raises(StoreError) as caught:
        LearnerGroup(CONFIG, task, place=Placement(Supervisor()).gang(learner_ask(CONFIG)), resume=False)
    assert len(str(caught.value).splitlines()) == 1
