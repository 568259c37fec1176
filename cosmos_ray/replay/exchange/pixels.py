"""Arrays of others' files as pictures of three colours, whatever their channels and numbers."""

from __future__ import annotations

import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.format.codec import MOST_PIXELS


def as_rgb(array: np.ndarray, name: str) -> np.ndarray:
    """(H, W, 3) uint8 of an array with channels first, last or (grey) none.

    Grey becomes three equal colours, the alpha of a fourth channel is left out, fractions are of white. StoreError for what is no such
    picture, such as depth; ``name`` says where it is.
    """
    grey = array[..., None] if array.ndim == 2 else array
    if grey.ndim == 3 and grey.shape[2] not in (1, 3, 4) and grey.shape[0] in (1, 3, 4):
        grey = grey.transpose(1, 2, 0)
    if grey.ndim != 3 or grey.shape[2] not in (1, 3, 4) or array.dtype.kind not in "fiu" or not 0 < grey[..., 0].size <= MOST_PIXELS:
        raise StoreError(f"{name} has arrays of shape {array.shape} and type {array.dtype}, not pictures of up to {MOST_PIXELS} pixels")
    picture = np.broadcast_to(grey, (*grey.shape[:2], 3)) if grey.shape[2] == 1 else grey[..., :3]
    if picture.dtype == np.uint8:
        return np.ascontiguousarray(picture)
    if picture.dtype.kind == "f":
        if not (np.isfinite(picture).all() and picture.min() >= 0.0 and picture.max() <= 1.0):
            raise StoreError(f"{name} has pictures of fractions outside of 0 to 1: write them as uint8 from 0 to 255")
        return np.rint(picture * 255.0).astype(np.uint8)
    if picture.min() < 0 or picture.max() > 255:
        raise StoreError(f"{name} has pictures of numbers outside of 0 to 255: write them as uint8")
    return picture.astype(np.uint8)
