"""Pictures of LeRobot datasets as JPEGs: from videos, from encoded pictures in tables or beside them, from arrays of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.format.codec import MOST_PIXELS, decode_jpeg, encode_jpeg


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
    if isinstance(value, dict):
        value = value.get("bytes") or _beside(value.get("path"), name, folder)
    if isinstance(value, bytes):
        return _as_jpeg(value, name)
    return encode_jpeg(_picture(np.asarray(value), name))


def _beside(path: Any, name: str, folder: Path) -> bytes:
    if not path:
        raise StoreError(f"{name} has a row without a picture")
    file = folder / str(path)
    if ".." in file.parts or not file.is_relative_to(folder) or not file.is_file():
        raise StoreError(f"{name} has a row whose picture {str(path)!r} is no file within the dataset")
    return file.read_bytes()


def _picture(array: np.ndarray, name: str) -> np.ndarray:
    """(H, W, 3) uint8 of an array with channels first or last; fractions are of white."""
    if array.ndim == 3 and array.shape[2] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype.kind not in "fiu" or array.shape[0] * array.shape[1] > MOST_PIXELS:
        raise StoreError(f"{name} has arrays of shape {array.shape} and type {array.dtype}, not pictures of three colours")
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0.0 and array.max() <= 1.0):
            raise StoreError(f"{name} has pictures of fractions outside of 0 to 1")
        return (array * 255.0).round().astype(np.uint8)
    if array.min() < 0 or array.max() > 255:
        raise StoreError(f"{name} has pictures of numbers outside of 0 to 255")
    return array.astype(np.uint8)


def _as_jpeg(data: bytes, name: str) -> bytes:
    """The bytes themselves if they are a JPEG, else (LeRobot writes PNG) the picture as one."""
    if data[:2] == b"\xff\xd8":
        decode_jpeg(data)
        return data
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if _png_pixels(data) <= MOST_PIXELS else None
    if picture is None:
        raise StoreError(f"{name} has a row that is neither JPEG nor PNG of up to {MOST_PIXELS} pixels")
    return encode_jpeg(picture[:, :, ::-1])


def _png_pixels(data: bytes) -> int:
    """Width times height as the header says, before anything is unpacked; too many for what is no PNG."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        return MOST_PIXELS + 1
    return int.from_bytes(data[16:20], "big") * int.from_bytes(data[20:24], "big")
