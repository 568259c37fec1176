"""The evaluation image pipeline against PIL."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from cosmos_ray.errors import ConfigError
from cosmos_ray.model.images import prepare


def noise(size, b=2, n=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (b, n, size, size, 3), dtype=np.uint8)


def smooth(size, b=1, n=2):
    """Images like photographs: random blobs with edges, no pixel noise."""
    coarse = np.random.default_rng(1).uniform(0, 255, (b * n, 9, 9, 3)).astype(np.float32)
    blobs = [cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC) for image in coarse]
    return np.clip(blobs, 0, 255).astype(np.uint8).reshape(b, n, size, size, 3)


def each(images, change):
    return np.stack([[change(frame) for frame in row] for row in images])


def pil_resize(size):
    return lambda frame: np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR))


def pil_jpeg(frame):
    data = io.BytesIO()
    Image.fromarray(frame).save(data, "JPEG", quality=95)
    return np.asarray(Image.open(data))


def levels(left, right):
    """Largest difference in grey levels."""
    assert left.shape == right.shape and left.dtype == right.dtype == np.uint8
    return np.abs(left.astype(int) - right.astype(int)).max()


@pytest.mark.parametrize("size, target", [(256, 224), (64, 224), (480, 64)])
def test_resize_agrees_with_pil_within_one_level(size, target):
    images = noise(size, 1, 2)
    assert levels(prepare(images, target, jpeg=False, centre_crop=False), each(images, pil_resize(target))) <= 1


def test_frames_that_are_not_square_become_square():
    images = noise(64)[:, :, :48]
    assert levels(prepare(images, 32, jpeg=False, centre_crop=False), each(images, pil_resize(32))) <= 1


def test_jpeg_round_trip_is_pils():
    images = smooth(64)
    result = prepare(images, 64, jpeg=True, centre_crop=False)
    assert levels(result, images) > 0 and np.abs(result.astype(int) - images).mean() < 3
    assert levels(result, each(images, pil_jpeg)) <= 1


@pytest.mark.parametrize("size, kept", [(224, 212), (64, 60), (96, 91)])
def test_centre_crop_keeps_the_middle(size, kept):
    images = noise(size, 1, 2)
    start = round((size - kept) / 2)
    cropped = images[:, :, start : start + kept, start : start + kept]
    assert levels(prepare(images, size, jpeg=False, centre_crop=True), each(cropped, pil_resize(size))) <= 1
    # Nothing of what lies outside of the crop is seen.
    changed = images.copy()
    changed[:, :, :start] = 255 - changed[:, :, :start]
    changed[:, :, :, start + kept :] = 255 - changed[:, :, :, start + kept :]
    assert np.array_equal(prepare(changed, size, False, True), prepare(images, size, False, True))
    changed[:, :, start, start] = 255 - changed[:, :, start, start]
    assert not np.array_equal(prepare(changed, size, False, True), prepare(images, size, False, True))


def test_order_is_jpeg_then_resize_then_crop():
    images = smooth(256)
    steps = prepare(images, 256, True, False), 224
    resized = prepare(*steps, False, False)
    cropped = prepare(resized, 224, False, True)
    assert np.array_equal(prepare(images, 224, True, True), cropped)
    assert not np.array_equal(prepare(prepare(images, 224, False, False), 224, True, True), cropped)  # JPEG after the resize
    assert not np.array_equal(prepare(prepare(images, 256, True, True), 224, False, False), cropped)  # crop before the resize


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (17, 130, 201)])
def test_constant_frames_stay_constant(colour):
    images = np.broadcast_to(np.array(colour, np.uint8), (1, 2, 256, 256, 3)).copy()
    assert np.array_equal(prepare(images, 224, False, True), np.broadcast_to(images[:, :, :1, :1], (1, 2, 224, 224, 3)))


def test_nothing_to_do_returns_the_same_array():
    images = noise(64)
    assert prepare(images, 64, jpeg=False, centre_crop=False) is images


def test_input_is_left_as_it_is():
    images = noise(64)
    before = images.copy()
    assert prepare(images, 32, jpeg=True, centre_crop=True).shape == (2, 3, 32, 32, 3)
    assert np.array_equal(images, before)


@pytest.mark.parametrize("images", [noise(8)[0], noise(8).astype(np.float32), noise(8)[..., :2]])
def test_other_images_are_refused(images):
    with pytest.raises(ConfigError, match=r"expected \(B, n, H, W, 3\) uint8"):
        prepare(images, 8, jpeg=False, centre_crop=False)
