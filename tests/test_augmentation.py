"""Training augmentation against plain numpy and colorsys computations."""

import colorsys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from cosmos_ray.errors import ConfigError
from cosmos_ray.model.augmentation import AugmentationParameters, apply, augment, draw, draw_seeded

GRAY = np.array([0.2989, 0.587, 0.114])


def identity(b=1):
    one, zero = torch.ones(b), torch.zeros(b)
    return AugmentationParameters(side=one, x=zero, y=zero, angle=zero, brightness=one, contrast=one, saturation=one, hue=zero)


def random_images(b=1, n=2, size=9, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (b, n, size, size, 3), dtype=np.uint8))


def only(**values):
    """Parameters of one sample that do one thing."""
    return replace(identity(), **{name: torch.tensor([value]) for name, value in values.items()})


def assert_close(images, expected):
    """Within one level, for where the last bit of a float decides about rounding."""
    assert images.dtype == torch.uint8
    difference = np.abs(images.numpy().astype(float) - np.clip(expected, 0, 255))
    assert difference.max() <= 0.51, difference.max()


def resampled(image, side, x, y, degrees):
    """One pixel after the other: where it comes from, and the four pixels around, the nearest one beyond the edge."""
    size = len(image)
    angle = np.deg2rad(degrees)
    out = np.zeros(image.shape)
    for row in range(size):
        for column in range(size):
            right, down = (2 * column + 1) / size - 1, (2 * row + 1) / size - 1
            from_right = side * (np.cos(angle) * right - np.sin(angle) * down) + x
            from_down = side * (np.sin(angle) * right + np.cos(angle) * down) + y
            px, py = np.clip(((from_right + 1) * size - 1) / 2, 0, size - 1), np.clip(((from_down + 1) * size - 1) / 2, 0, size - 1)
            left, top = min(int(px), size - 2), min(int(py), size - 2)
            fx, fy = px - left, py - top
            above = (1 - fx) * image[top, left] + fx * image[top, left + 1]
            below = (1 - fx) * image[top + 1, left] + fx * image[top + 1, left + 1]
            out[row, column] = (1 - fy) * above + fy * below
    return out


def jittered(image, brightness, contrast, saturation, hue):
    """The four changes of one frame in floats, each clamped."""
    image = np.clip(image * brightness, 0, 255)
    image = np.clip(contrast * image + (1 - contrast) * (image @ GRAY).mean(), 0, 255)
    image = np.clip(saturation * image + (1 - saturation) * (image @ GRAY)[..., None], 0, 255)
    out = np.zeros(image.shape)
    for place in np.ndindex(image.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*image[place] / 255)
        out[place] = np.array(colorsys.hsv_to_rgb((h + hue) % 1, s, v)) * 255
    return out


@pytest.mark.parametrize("size", [8, 64, 224])
def test_identity_parameters_change_no_bit(size):
    images = random_images(2, 3, size)
    assert torch.equal(apply(images, identity(2)), images)


@pytest.mark.parametrize(
    "side, x, y, degrees",
    [(0.9486833, 0.05, -0.03, 0.0), (1.0, 0.0, 0.0, 5.0), (0.9486833, -0.0513, 0.0513, -4.0), (1.0, 0.0, 0.0, 30.0)],
)
def test_crop_and_rotation_are_one_bilinear_resampling(side, x, y, degrees):
    images = random_images()
    result = apply(images, only(side=side, x=x, y=y, angle=degrees))
    for frame in range(2):
        assert_close(result[0, frame], resampled(images[0, frame].numpy().astype(float), side, x, y, degrees))


def test_positive_angles_turn_counter_clockwise():
    images = torch.zeros(1, 1, 21, 21, 3, dtype=torch.uint8)
    images[0, 0, 10, 20] = 255  # a dot at the right edge
    rotated = apply(images, only(angle=20.0))[0, 0, :, :, 0]
    assert rotated[:10].sum() > 0 and rotated[10:].sum() == 0


@pytest.mark.parametrize(
    "change",
    [{"brightness": 0.7}, {"brightness": 1.3}, {"contrast": 0.6}, {"contrast": 1.4}, {"saturation": 0.5}, {"saturation": 1.5},
     {"hue": -0.05}, {"hue": 0.05}, {"hue": 0.5}, {"brightness": 1.3, "contrast": 1.4, "saturation": 1.5, "hue": -0.05}],
)  # fmt: skip
def test_colour_changes_match_a_plain_computation_per_frame(change):
    images = random_images(1, 3)
    images[0, 2] = images[0, 2, :, :, :1]  # a gray frame, whose hue is nothing
    result = apply(images, only(**change))
    plain = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0} | change
    for frame in range(3):
        assert_close(result[0, frame], jittered(images[0, frame].numpy().astype(float), **plain))


def test_frames_of_a_sample_share_the_parameters_and_samples_do_not():
    images = random_images(1, 1, 16).expand(3, 4, -1, -1, -1)
    result = augment(images, torch.Generator().manual_seed(0))
    assert result.shape == images.shape and result.dtype == torch.uint8 and result.is_contiguous()
    for frame in range(1, 4):
        assert torch.equal(result[:, frame], result[:, 0])
    assert len({row.numpy().tobytes() for row in result}) == 3
    assert not any(torch.equal(row, images[0]) for row in result)


def test_a_sample_does_not_depend_on_its_batch():
    images = random_images(4, 2, 16)
    parameters = draw(4, torch.Generator().manual_seed(0))
    whole = apply(images, parameters)
    for i in range(4):
        alone = AugmentationParameters(**{field.name: getattr(parameters, field.name)[i : i + 1] for field in fields(parameters)})
        assert (apply(images[i : i + 1], alone).int() - whole[i : i + 1].int()).abs().max() <= 1


def test_drawn_parameters_fill_their_ranges_and_crops_stay_inside():
    parameters = draw(20_000, torch.Generator().manual_seed(0))
    side = np.sqrt(0.9)
    ranges = {"x": (side - 1, 1 - side), "y": (side - 1, 1 - side), "angle": (-5, 5), "brightness": (0.7, 1.3), "contrast": (0.6, 1.4),
              "saturation": (0.5, 1.5), "hue": (-0.05, 0.05)}
    for name, (low, high) in ranges.items():
        values = getattr(parameters, name).numpy()
        assert values.shape == (20_000,) and values.dtype == np.float32
        slack = 1e-6
        assert low - slack <= values.min() <= low + 0.01 * (high - low) and high - 0.01 * (high - low) <= values.max() <= high + slack
        assert abs(values.mean() - (low + high) / 2) < 0.01 * (high - low)
    assert np.allclose(parameters.side.numpy() ** 2, 0.9)
    drawn = np.stack([getattr(parameters, name).numpy() for name in ranges])
    assert np.abs(np.corrcoef(drawn) - np.eye(len(ranges))).max() < 0.05


def test_draws_are_a_function_of_the_generator_or_of_each_seed():
    images = random_images(2, 2, 16)
    first, again, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    seeded, reordered = draw_seeded([5, 2**63 - 1, 0]), draw_seeded([0, 5])
    for field in fields(AugmentationParameters):
        values = getattr(seeded, field.name)
        assert torch.equal(values[[2, 0]], getattr(reordered, field.name))
    assert len(set(seeded.x.tolist())) == 3


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 2, 8, 8, 3), torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(1, 2, 8, 9, 3, dtype=torch.uint8),
     torch.zeros(1, 2, 8, 8, 4, dtype=torch.uint8), torch.zeros(2, 2, 8, 8, 3, dtype=torch.uint8)],
)  # fmt: skip
def test_other_images_are_refused(images):
    with pytest.raises(ConfigError, match=r"expected \(1, n, H, H, 3\) uint8"):
        apply(images, identity(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu():
    images = random_images(4, 3, 64)
    parameters = draw(4, torch.Generator().manual_seed(0))
    on_gpu = apply(images.cuda(), parameters)
    assert on_gpu.is_cuda
    assert (on_gpu.cpu().int() - apply(images, parameters).int()).abs().max() <= 1
