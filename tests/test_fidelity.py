"""`model.fidelity reference`: the arithmetic of the public code, whose own functions computed the numbers here (method 11.4 to 11.11)."""

import dataclasses

import numpy as np
import pytest
import torch

from cosmos_ray.config import LearnerConfig, ModelConfig, check
from cosmos_ray.config.presets import FIDELITIES
from cosmos_ray.config.settings import SETTINGS, given, new_config, value_of
from cosmos_ray.learner.engine import _groups
from cosmos_ray.model import augmentation
from cosmos_ray.model.augmentation import AugmentationParameters
from cosmos_ray.model.images import prepare
from cosmos_ray.model.latents import current_latents
from tests.test_model import batch, tiny


def pattern(size: int) -> np.ndarray:
    """(size, size, 3) uint8: an image that a formula gives."""
    y, x = np.mgrid[0:size, 0:size]
    return np.stack([(x * 15 + y) % 256, (y * 13 + 2 * x) % 256, (x * y * 3) % 256], -1).astype(np.uint8)


@pytest.mark.parametrize("told, fidelity", [
    ({}, "ours"), ({"model.preset": "cosmos-predict2-2b"}, "ours"), ({"model.suite": "libero"}, "reference"),
    ({"model.suite": "aloha", "model.fidelity": "ours"}, "ours"), ({"model.fidelity": "reference"}, "reference"),
], ids=str)  # fmt: skip
def test_the_switch_follows_the_suite_and_sets_every_value_that_acts(told, fidelity):
    config = new_config(told)
    check(config)
    assert config.model.fidelity == fidelity
    assert {name: value_of(config, name) for name in FIDELITIES[fidelity]} == FIDELITIES[fidelity]
    assert new_config(given(config)) == config


def test_a_single_value_wins_over_the_switch():
    config = new_config({"model.suite": "libero", "model.resize": "bilinear", "planner.ladder": "rounded"})
    assert (config.model.resize, config.planner.ladder, config.model.augmentation) == ("bilinear", "rounded", "torchvision")
    assert FIDELITIES["ours"].keys() == FIDELITIES["reference"].keys() == {n for n, s in SETTINGS.items() if s.follows == "model.fidelity"}


def test_resizing_is_pils_bicubic_to_the_bit():
    resized = prepare(pattern(16)[None, None], 8, jpeg=False, centre_crop=False, resize="bicubic")[0, 0]
    assert resized.sum() == 20904 and resized[3].tolist() == [
        [15, 86, 10], [44, 90, 48], [75, 94, 88], [105, 98, 127], [135, 102, 169], [165, 106, 207], [195, 110, 174], [224, 114, 97]]
    assert prepare(pattern(16)[None, None], 8, jpeg=False, centre_crop=False)[0, 0].sum() != 20904


def test_a_policy_sees_frames_of_another_size_through_the_filter_of_its_suite():
    images = np.random.default_rng(0).integers(0, 256, (1, 2, 48, 56, 3), dtype=np.uint8)
    policy = tiny(fidelity="reference")
    seen = current_latents(policy, images, batch(1).proprio)
    assert torch.equal(seen, current_latents(policy, prepare(images, 32, False, False, "bicubic"), batch(1).proprio))
    assert not torch.equal(seen, current_latents(tiny(), images, batch(1).proprio))


def test_augmentation_is_torchvisions_step_by_step():
    """A crop of 15 of 16 pixels from row 1, 4.1 degrees and four changes of colour, as torchvision 0.29 computes them."""
    side = 0.9**0.5
    one = {"side": side, "x": -(1 - side) / 2, "y": (1 - side) / 2, "angle": 4.123, "brightness": 1.2345, "contrast": 0.7123,
           "saturation": 1.3071, "hue": 0.0417}
    parameters = AugmentationParameters(**{name: torch.tensor([value]) for name, value in one.items()})
    images = torch.from_numpy(pattern(16))[None, None]
    result = augmentation.apply(images, parameters, "torchvision")[0, 0]
    assert abs(int(result.int().sum()) - 101868) <= 4  # of 768 numbers, few lie at a whole one and may be rounded down from it
    assert result[0, 0].tolist() == result[0, -1].tolist() == [39, 39, 39]  # the corners: black, before contrast lifts it
    assert result[5].tolist() == [
        [29, 98, 41], [42, 111, 55], [58, 112, 70], [75, 111, 84], [88, 112, 97], [103, 112, 109], [121, 112, 124], [139, 113, 141],
        [157, 112, 157], [173, 113, 171], [190, 112, 186], [204, 114, 197], [222, 114, 215], [239, 113, 229], [238, 115, 215],
        [238, 145, 131]]
    smooth = augmentation.apply(images, parameters)[0, 0]
    assert smooth[0, 0].tolist() != [39, 39, 39] and (smooth.int() - result.int()).abs().float().mean() < 20


def test_both_ways_use_the_same_draws_and_keep_what_is_not_changed():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 2, 32, 32, 3), dtype=np.uint8))
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    for generator, way in zip(generators, ("smooth", "torchvision"), strict=True):
        augmentation.augment(images, generator, way)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    one, zero = torch.ones(3), torch.zeros(3)
    still = AugmentationParameters(one, zero, zero, zero, one, one, one, zero)
    assert (augmentation.apply(images, still, "torchvision").int() - images.int()).abs().max() <= 1


def test_crops_of_whole_pixels_reach_every_place():
    """Of 32 pixels a crop keeps 30: three places in each direction, alike often."""
    images = torch.arange(32, dtype=torch.uint8).view(1, 1, 1, 32, 1).expand(1, 1, 32, 32, 3) * 8
    drawn = augmentation.draw_seeded(range(300))
    places = augmentation._cropped(images.permute(0, 1, 4, 2, 3).float().expand(300, 1, 3, 32, 32), drawn)[:, 0, 0, 0, 0]
    values, counts = places.unique(return_counts=True)
    assert len(values) == 3 and counts.min() > 70


def test_the_public_optimizer_decays_every_parameter():
    net = tiny().net
    for decay_all, expected in ((False, {0.1, 0.0}), (True, {0.1})):
        groups = _groups(net, 0.1, decay_all)
        assert {group["weight_decay"] for group in groups} == expected
        assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    assert dataclasses.replace(LearnerConfig(), decay_all=True).decay_all


def test_a_checkpoint_keeps_how_its_frames_are_made():
    spec = tiny(suite="libero").spec
    assert (spec.resize, spec.augmentation) == ("bicubic", "torchvision")
    assert type(spec).from_json(spec.to_json()) == spec
    old = {name: value for name, value in spec.to_json().items() if name not in ("resize", "augmentation")}
    assert (type(spec).from_json(old).resize, type(spec).from_json(old).augmentation) == ("bilinear", "smooth")
    assert ModelConfig().fidelity == "ours"
