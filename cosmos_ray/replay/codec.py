"""Camera frames as JPEG bytes: quality 95, chroma 4:4:4, RGB in and out.

Quality 95 is what the reference policy stores and trains on; 4:4:4 keeps the colour of the few pixels that a small
object covers at 64x64, which 4:2:0 would average away. OpenCV works in BGR; the channels are swapped here and nowhere else.
"""

from __future__ import annotations

import cv2
import numpy as np

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
    # Arrow buffers export signed chars, so the element type is set here instead of being taken from the buffer.
    raw = np.frombuffer(data, dtype=np.uint8)
    height, width = _size(raw[:HEAD].tobytes()) or _size(raw.tobytes()) or (0, 0)
    if height * width > MOST_PIXELS:
        raise StoreError(f"{raw.size} bytes of JPEG claim {width}x{height} pixels, frames have at most {MOST_PIXELS}")
    try:
        image = cv2.imdecode(raw, cv2.IMREAD_COLOR_RGB) if height and width else None
    except cv2.error:
        image = None
    if image is None:
        raise StoreError(f"{raw.size} bytes do not decode as a JPEG image")
    return image


HEAD = 1024  # bytes of a JPEG in which its size is usually found
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of the segment that holds the size


def _size(head: bytes) -> tuple[int, int] | None:
    """Height and width from the first bytes of a JPEG, None if they are not among them."""
    if head[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if marker in _FRAMES:
            return head[at + 5] << 8 | head[at + 6], head[at + 7] << 8 | head[at + 8]
        at += 2 + (head[at + 2] << 8 | head[at + 3])
    return None


def encode_cameras(frames: np.ndarray) -> list[bytes]:
    """One JPEG per camera of ``(n_cam, H, W, 3)`` uint8 frames."""
    return [encode_jpeg(image) for image in frames]
