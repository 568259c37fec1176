"""Pictures of LeRobot datasets as JPEGs: from videos, from encoded pictures in tables or beside them, from arrays of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange.pixels import as_rgb
from cosmos_ray.replay.format.codec import MOST_PIXELS, decode_jpeg, encode_jpeg

_EXIF_WITHIN = 4096  # bytes from the beginning of a JPEG: the segment stands among the first


def from_video(path: Path, times: Sequence[float], fps: float) -> list[bytes]:
    """The picture nearest to each of the ascending ``times`` in seconds, as LeRobot takes it. StoreError where one is further than half a
    frame away."""
    wanted, found = np.asarray(times, np.float64), {}
    nearest = np.full(len(wanted), 0.5 / fps)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            tick = stream.time_base
            if not tick:
                raise StoreError(f"{path} does not say when its pictures are shown")
            container.seek(max(0, int(wanted[0] / tick)), stream=stream, backward=True)
            for frame in container.decode(stream):
                if not 0 < frame.width * frame.height <= MOST_PIXELS:
                    raise StoreError(f"{path} has pictures of {frame.width}x{frame.height} pixels, at most {MOST_PIXELS} are read")
                at = float((frame.pts or 0) * tick)
                if at > wanted[-1] + 0.5 / fps:
                    break
                index = int(np.abs(wanted - at).argmin())
                if (away := abs(wanted[index] - at)) < nearest[index]:
                    nearest[index], found[index] = away, encode_jpeg(frame.to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, IndexError) as error:
        pointer = path.is_file() and path.stat().st_size < 1000 and b"git-lfs" in path.read_bytes()
        raise StoreError(f"{path} cannot be decoded: " + ("run `git lfs pull`, it is only a pointer" if pointer else str(error))) from error
    if len(found) < len(wanted):
        lost = next(index for index in range(len(wanted)) if index not in found)
        raise StoreError(f"{path} has {len(found)} of {len(wanted)} pictures, none at {wanted[lost]:.3f} s")
    return [found[index] for index in range(len(wanted))]


def from_cell(value: Any, name: str, folder: Path) -> bytes:
    """The picture in a cell of a table: encoded, as ``{bytes, path}`` or plain bytes, or an array of numbers.

    A path is one of a file within ``folder``. StoreError for anything else.
    """
    if value is None:
        raise StoreError(f"{name} has a row without a picture")
    if isinstance(value, dict):
        value = value.get("bytes") or _beside(value.get("path"), name, folder)
    if isinstance(value, bytes):
        return _as_jpeg(value, name)
    return encode_jpeg(as_rgb(np.asarray(value), name))


def _beside(path: Any, name: str, folder: Path) -> bytes:
    if not path:
        raise StoreError(f"{name} has a row without a picture")
    file = folder / str(path)
    if ".." in file.parts or not file.is_relative_to(folder) or not file.is_file():
        raise StoreError(f"{name} has a row whose picture {str(path)!r} is no file within the dataset")
    return file.read_bytes()


def _as_jpeg(data: bytes, name: str) -> bytes:
    """The bytes themselves if they are a JPEG that is upright, else (LeRobot writes PNG) the picture as one.

    A camera may say in a JPEG's Exif data how it was held; LeRobot's reader turns the picture, so it is turned here.
    """
    if data[:2] == b"\xff\xd8":
        decode_jpeg(data)
        if b"Exif\0\0" not in data[:_EXIF_WITHIN]:
            return data
        encoded = np.frombuffer(data, np.uint8)
        turned, stored = (cv2.imdecode(encoded, cv2.IMREAD_COLOR | as_stored) for as_stored in (0, cv2.IMREAD_IGNORE_ORIENTATION))
        return data if np.array_equal(turned, stored) else encode_jpeg(turned[:, :, ::-1])
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if _png_pixels(data) <= MOST_PIXELS else None
    if picture is None:
        raise StoreError(f"{name} has a row that is neither JPEG nor PNG of up to {MOST_PIXELS} pixels")
    return encode_jpeg(picture[:, :, ::-1])


def _png_pixels(data: bytes) -> int:
    """Width times height as the header says, before anything is unpacked; too many for what is no PNG."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        return MOST_PIXELS + 1
    return int.from_bytes(data[16:20], "big") * int.from_bytes(data[20:24], "big")
