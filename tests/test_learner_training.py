"""The paper's training: learning rate, activation checkpointing, and the weights that training starts from."""

import dataclasses

import numpy as np
import pytest
import torch

from cosmos_ray.config import ModelConfig, ReplayConfig, RunConfig, SimConfig
from cosmos_ray.config.settings import new_config
from cosmos_ray.errors import CheckpointError
from cosmos_ray.folder import RunFolder
from cosmos_ray.learner.core import learning_rate
from cosmos_ray.model.checkpoint import load_checkpoint, load_net, save_policy
from cosmos_ray.model.exchange import FORMATS, diffusers_config, write_weights
from cosmos_ray.model.objective import Objective
from cosmos_ray.replay.sampling.ranges import dataset_statistics
from cosmos_ray.run import Run
from cosmos_ray.stages.training import make_initial_policy, widened
from cosmos_ray.tracking import Tracker
from tests import test_learner
from tests.test_learner import core_on, fill, losses
from tests.test_lora import randomised
from tests.test_model import batch, tiny

store = test_learner.store  # the fixture

# ---------------------------------------------------------------- learning rate


def learner_of(suite: str, refine: bool = False):
    config = new_config({"model.preset": "cosmos-predict2-2b", "model.suite": suite}).learner
    return dataclasses.replace(config, warmup=config.refine_warmup, cycle=config.refine_cycle) if refine else config


@pytest.mark.parametrize("suite, refine, warmup, cycle", [
    ("libero", False, 1000, 30_000), ("robocasa", False, 1000, 30_000), ("aloha", False, 2000, 20_000), ("aloha", True, 1500, 15_000),
])  # fmt: skip
def test_the_paper_s_learning_rate(suite, refine, warmup, cycle):
    """Method 5.3, 11.4: warm-up from 1e-6 to 1.0, a line from there to 0.3 at the end of the cycle, then 0.06."""
    config = learner_of(suite, refine)

    def share(step: int) -> float:
        return learning_rate(step, 45_000, config.lr, config) / 1e-4

    assert share(0) == pytest.approx(1e-6, rel=1e-9)
    assert share(warmup // 2) == pytest.approx(0.5, rel=1e-5)
    assert share(warmup - 1) == pytest.approx(1 - 1 / warmup, rel=1e-5)
    assert [share(warmup), share(cycle)] == pytest.approx([1.0, 0.3], rel=1e-9)
    assert share((warmup + cycle) // 2) == pytest.approx(0.65, rel=1e-9)
    assert [share(step) for step in (cycle + 1, 45_000, 50_000)] == pytest.approx([0.06] * 3, rel=1e-9)


@pytest.mark.parametrize("suite, refine, expected", [  # computed by the public scheduler (method 11.4), to six places
    ("libero", False, {0: 1e-6, 1: 0.001001, 999: 0.999, 1000: 1.0, 1001: 0.999976, 15_000: 0.662069, 29_999: 0.300024, 30_000: 0.3,
                       30_001: 0.06}),
    ("aloha", False, {0: 1e-6, 1: 0.000501, 1999: 0.9995, 2000: 1.0, 10_000: 0.688889, 19_999: 0.300039, 20_000: 0.3, 20_001: 0.06}),
    ("aloha", True, {0: 1e-6, 1: 0.000668, 1499: 0.999333, 1500: 1.0, 7500: 0.688889, 14_999: 0.300052, 15_000: 0.3, 15_001: 0.06}),
])  # fmt: skip
def test_the_learning_rate_is_the_public_scheduler_s(suite, refine, expected):
    config = learner_of(suite, refine)
    assert {step: round(learning_rate(step, 45_000, 1.0, config), 6) for step in expected} == expected


def test_a_run_from_before_keeps_the_line_that_it_trained_on():
    """It fell from step 0, and the cycle ended one step earlier."""
    config = dataclasses.replace(learner_of("libero"), schedule="paper_before")
    assert learning_rate(1000, 45_000, 1.0, config) == pytest.approx(1 - 0.7 * 1000 / 30_000, rel=1e-9)
    assert [learning_rate(step, 45_000, 1.0, config) for step in (29_999, 30_000)] == pytest.approx([0.3 + 0.7 / 30_000, 0.06], rel=1e-9)


def test_the_optimizer_steps_at_the_paper_s_rate(alone, store):
    def run(root):
        core = core_on(root, schedule="paper", warmup=3, cycle=5)
        return [core.step()["lr"] / 2e-3 for _ in range(6)]

    assert alone(run, store.root) == pytest.approx([1e-6, 1 / 3, 2 / 3, 1.0, 0.65, 0.3], rel=1e-5)


# ---------------------------------------------------------------- activation checkpointing


def trained_once(checkpointing: bool):
    """(loss, gradients, bytes kept for the backward pass)."""
    policy, kept = randomised(), 0
    policy.net.checkpointing = checkpointing
    own = {p.data_ptr() for p in policy.net.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if tensor.data_ptr() in own else tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = Objective(policy).loss(batch(3, np.arange(3)), torch.Generator().manual_seed(0))
    forward = kept
    loss.backward()
    return loss.detach(), [p.grad for p in policy.net.parameters()], forward


def test_checkpointed_activations_change_no_bit_and_keep_less():
    loss, gradients, kept = trained_once(False)
    again, others, less = trained_once(True)
    assert torch.equal(loss, again) and all(map(torch.equal, gradients, others))
    assert min(g.abs().max() for g in gradients) > 0
    assert less < kept / 2, (less, kept)


def test_the_learner_with_checkpointed_activations_learns_the_same_weights(alone, store):
    def run(root):
        cores = [core_on(root, activation_checkpointing=value) for value in (False, True)]
        return [(losses(core, 3), core.weights(1), core.policy.net.checkpointing) for core in cores]

    (plain, weights, off), (checkpointed, same, on) = alone(run, store.root)
    assert (off, on) == (False, True)
    assert plain == checkpointed and weights.checksum == same.checksum


# ---------------------------------------------------------------- weights to start from

SMALL = ModelConfig(width=64, heads=2, layers=2, image_size=32)
PATHS = {"pt": "weights.pt", "dcp": "iter_000000100", "diffusers": "transformer", "safetensors": "weights.safetensors"}


def written(policy, folder, format: str):
    """The policy's network in another project's format."""
    config = diffusers_config(**policy.spec.transformer.diffusers_dimensions())
    write_weights(policy.net.state_dict(), folder / PATHS[format], format, config)
    return folder / PATHS[format]


def same_net(policy, other) -> bool:
    return all(left.dtype == right.dtype and torch.equal(left, right)
               for left, right in zip(policy.net.parameters(), other.net.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [*FORMATS, "ours"])
def test_weights_of_every_format_are_loaded_whole_and_trainable(tmp_path, format, dtype):
    source, target = randomised(), tiny()
    source.net.to(dtype)
    if format == "ours":
        save_policy(source, tmp_path / "policy", 3)
    path = tmp_path / "policy" if format == "ours" else written(source, tmp_path, format)
    load_net(target, path, dtype=None)
    assert same_net(target, source)  # in the stored precision
    load_net(target, path)
    source.net.float()
    assert same_net(target, source) and not same_net(target, tiny())
    assert all(p.requires_grad for p in target.net.parameters())


def test_weights_of_other_dimensions_are_refused_and_leave_the_network(tmp_path):
    path, target = written(tiny(layers=3), tmp_path, "pt"), tiny()
    with pytest.raises(CheckpointError, match=r"blocks\.2\..*unknown to the model") as caught:
        load_net(target, path)
    assert len(str(caught.value).splitlines()) == 1 and same_net(target, tiny())


def open_run(root, **changes) -> Run:
    """A run of synthetic demonstrations, without Ray."""
    config = RunConfig(root=str(root), name="run", model=SMALL, sim=SimConfig(image_size=32), replay=ReplayConfig(gamma=0.98), **changes)
    folder = RunFolder(config)
    fill(folder.replay, demos=3, successes=0, failures=0)
    return Run(config, folder, Tracker(config, folder), quiet=True)


@pytest.mark.parametrize("format", FORMATS)
def test_pretraining_starts_from_the_weights_it_is_given(tmp_path, format):
    path = written(randomised(), tmp_path, format)
    run = open_run(tmp_path, init=str(path))
    make_initial_policy(run)
    policy, version = load_checkpoint(run.folder.checkpoint("initial"))
    assert version == 0 and same_net(policy, randomised())
    stats = dataset_statistics(run.folder.store(), ("demo",))
    assert np.array_equal(policy.action_high, np.maximum(stats.actions_max, stats.labels_max))
    assert np.array_equal(policy.proprio_low, stats.proprio_min)
    assert policy.tokenizer.encoder.any()  # fitted
    run.folder.close()


def test_a_policy_is_made_for_its_own_frame_size_whatever_the_store_holds(tmp_path):
    run = open_run(tmp_path)  # of frames of 32 pixels
    run.config = dataclasses.replace(run.config, model=ModelConfig(width=64, heads=2, layers=2, image_size=48))
    make_initial_policy(run)
    policy, _ = load_checkpoint(run.folder.checkpoint("initial"))
    assert policy.spec.image_size == 48 and policy.spec.frame_shape == (16, 6, 6) and policy.tokenizer.encoder.any()
    run.folder.close()


def test_what_demonstrations_hardly_change_is_not_blown_up():
    low, high = widened(np.array([0.0, 0.99, 1.0], np.float32), np.array([0.5, 1.0, 1.0], np.float32))
    assert np.allclose(low, [0.0, 0.945, 0.95]) and np.allclose(high, [0.5, 1.045, 1.05]) and low.dtype == np.float32
