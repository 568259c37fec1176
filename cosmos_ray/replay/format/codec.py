"""Camera frames as JPEG bytes: quality 95, chroma 4:4:4, RGB in and out.

Quality 95 is what the reference policy stores and trains on; 4:4:4 keeps the colour of the few pixels that a small
object covers at 64x64, which 4:2:0 would average away. OpenCV encodes (it works in BGR; the channels are swapped here and nowhere
else); simplejpeg decodes to the same pixels a fifth to a third faster, straight into the memory of a batch.
"""

from __future__ import annotations

import cv2
import numpy as np
import simplejpeg

from cosmos_ray.errors import StoreError

QUALITY = 95
MOST_PIXELS = 1 << 24  # of a frame; a file that claims more is not given the memory for them

_ENCODE = [
    cv2.IMWRITE_JPEG_QUALITY, QUALITY,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
]  # fmt: skip


def encode_jpeg(image: np.ndarray) -> bytes:
    """JPEG bytes of one ``(H, W, 3)`` uint8 RGB image; StoreError for any other shape or dtype."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise StoreError(f"cannot encode a frame of shape {image.shape} {image.dtype}: expected (H, W, 3) uint8 RGB")
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR), _ENCODE)
    if not ok:
        raise StoreError(f"OpenCV could not encode a frame of shape {image.shape} as JPEG")
    return data.tobytes()


def decode_jpeg(data: bytes | memoryview | np.ndarray) -> np.ndarray:
    """``(H, W, 3)`` uint8 RGB image of JPEG ``data`` (any buffer, read in place); StoreError if it is none or too large."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MOST_PIXELS:
            raise StoreError(f"a JPEG claims {width}x{height} pixels, frames have at most {MOST_PIXELS}")
        return simplejpeg.decode_jpeg(data)
    except ValueError as error:
        raise StoreError(f"{len(data)} bytes do not decode as a JPEG image: {error}") from error


def decode_into(data: bytes | memoryview | np.ndarray, out: np.ndarray) -> tuple[int, ...]:
    """Decode into ``out``, ``(H, W, 3)`` uint8 contiguous; returns the image's shape. Where it is another one than that of
    ``out``, what ``out`` holds is worthless. StoreError if ``data`` is no JPEG."""
    try:
        return simplejpeg.decode_jpeg(data, buffer=out).shape
    except ValueError:
        return decode_jpeg(data).shape  # larger than ``out``, or no image at all


def encode_cameras(frames: np.ndarray) -> list[bytes]:
    """One JPEG per camera of ``(n_cam, H, W, 3)`` uint8 frames."""
    return [encode_jpeg(image) for image in frames]
