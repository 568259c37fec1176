"""Offsets of whole chunks."""

import numpy as np
import pytest

from cosmos_ray.offsets import chunk_offset, translations


@pytest.mark.parametrize("dim, moving", [
    (4, [0, 1, 2]), (7, [0, 1, 2]), (8, [0, 1, 2, 4, 5, 6]), (14, [0, 1, 2, 7, 8, 9]), (3, [0, 1, 2]),
])  # fmt: skip
def test_only_translations_of_each_arm_are_moved(dim, moving):
    assert np.flatnonzero(translations(dim)).tolist() == moving
    offset = chunk_offset(3, dim, 0.5)
    assert offset.dtype == np.float32 and np.flatnonzero(offset).tolist() == moving


def test_an_offset_is_a_function_of_its_seed_and_as_large_as_asked():
    assert np.array_equal(chunk_offset([1, 2], 4, 0.3), chunk_offset([1, 2], 4, 0.3))
    assert not np.array_equal(chunk_offset([1, 2], 4, 0.3), chunk_offset([1, 3], 4, 0.3))
    many = np.stack([chunk_offset(seed, 4, 0.3)[:3] for seed in range(2000)])
    assert np.allclose(many.std(0), 0.3, atol=0.02) and np.allclose(many.mean(0), 0, atol=0.03)
    assert not chunk_offset(0, 4, 0.0).any()


def test_places_that_are_known_are_moved_instead_of_guessed_ones():
    """12 numbers are a hand of six fingers after six numbers of an arm, or two arms without grippers: their count does not say which."""
    assert np.flatnonzero(chunk_offset(3, 12, 0.5, moving=(0, 1, 2))).tolist() == [0, 1, 2]
    assert np.array_equal(chunk_offset(3, 7, 0.5, moving=(0, 1, 2)), chunk_offset(3, 7, 0.5))
