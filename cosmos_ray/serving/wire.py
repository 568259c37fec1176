"""What comes over the wire, as Python values and arrays. Nothing is unpickled, and every array is checked before it is made.

Arrays come in four forms: nested lists; ``json_numpy``'s ``{"__numpy__": base64, "dtype", "shape"}``; the msgpack form
``{"__ndarray__": true, "data", "dtype", "shape"}`` of openpi (with keys of bytes) and vla-eval; and vla-eval's compressed images
``{"__image__": true, "format", "data", "shape"}``.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from cosmos_ray.errors import CosmosRayError

KINDS = "biuf"  #: of numpy's dtypes: truth, whole numbers, floating point
IMAGE_FORMATS = {"png": "PNG", "jpeg": "JPEG"}
LARGEST_SIDE = 4096  #: pixels


class BadRequest(CosmosRayError):
    """A request that cannot be answered; ``status`` is HTTP's."""

    def __init__(self, why: str, status: int = 400):
        super().__init__(why)
        self.status = status


def from_json(body: bytes | str) -> Any:
    """The value of a JSON text, with arrays in place of json_numpy's. BadRequest."""
    try:
        return json.loads(body, object_hook=_array_of_json)
    except (ValueError, RecursionError) as error:  # json's own errors and those of UTF-8 are ValueErrors
        raise BadRequest(f"the body is no JSON ({_short(error)})") from error


def to_json(value: Any, arrays: bool) -> str:
    """``value`` as JSON; its arrays as json_numpy's, or as nested lists."""
    return json.dumps(value, default=_json_of_array if arrays else _list_of_array)


def from_msgpack(data: bytes) -> Any:
    """The value of a msgpack text, with arrays in place of openpi's and vla-eval's, and text for keys of bytes. BadRequest."""
    import msgpack

    try:
        return msgpack.unpackb(data, object_hook=_array_of_msgpack, strict_map_key=True)
    except (ValueError, RecursionError, msgpack.UnpackException, TypeError) as error:
        raise BadRequest(f"the message is no msgpack ({_short(error)})") from error


def to_msgpack(value: Any, bytes_keys: bool) -> bytes:
    """``value`` as msgpack. ``bytes_keys``: arrays with keys of bytes, as openpi's client reads them, else as vla-eval's does."""
    import msgpack

    return msgpack.packb(value, default=_openpi_of_array if bytes_keys else _vla_eval_of_array)


def make_array(data: bytes, dtype: Any, shape: Any) -> np.ndarray:
    """The array of its bytes; a number for a shape of (). BadRequest for a dtype that is no number and bytes that do not fit."""
    if isinstance(dtype, bytes):
        dtype = dtype.decode("ascii", "replace")
    try:
        kind = np.dtype(dtype) if isinstance(dtype, str) else None
    except (TypeError, ValueError, SyntaxError):
        kind = None
    if kind is None or kind.kind not in KINDS or kind.subdtype is not None:
        raise BadRequest(f"an array is of dtype {_short(dtype)}: send numbers")
    if not isinstance(shape, (list, tuple)) or not all(isinstance(side, int) and 0 <= side < 2**31 for side in shape) or len(shape) > 8:
        raise BadRequest(f"an array has the shape {_short(shape)}: send at most eight whole numbers")
    if not isinstance(data, bytes) or math.prod(shape) * kind.itemsize != len(data):
        got = len(data) if isinstance(data, bytes) else type(data).__name__
        raise BadRequest(f"an array of {kind} and shape {tuple(shape)} has {math.prod(shape) * kind.itemsize} bytes, these are {got}")
    return np.frombuffer(data, kind).reshape(shape)


def _array_of_json(found: dict) -> Any:
    if "__numpy__" not in found:
        return found
    try:
        data = base64.b64decode(found["__numpy__"], validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise BadRequest(f"an array's __numpy__ is no base64 ({_short(error)})") from error
    return make_array(data, found.get("dtype"), found.get("shape"))


def _array_of_msgpack(found: dict) -> Any:
    found = {key.decode("utf-8", "replace") if isinstance(key, bytes) else key: value for key, value in found.items()}
    if "__ndarray__" in found:
        return make_array(found.get("data", b""), found.get("dtype"), found.get("shape"))
    if "__npgeneric__" in found:
        return found.get("data")
    return _image(found) if "__image__" in found else found


def _image(found: dict) -> np.ndarray:
    if found.get("format") == "raw":
        return make_array(found.get("data", b""), found.get("dtype"), found.get("shape"))
    form, data = found.get("format"), found.get("data")
    if form not in IMAGE_FORMATS or not isinstance(data, bytes):
        raise BadRequest(f"an image has the format {_short(form)}: send raw, {' or '.join(IMAGE_FORMATS)} bytes")
    try:
        with Image.open(io.BytesIO(data), formats=[IMAGE_FORMATS[form]]) as image:
            if max(image.size) > LARGEST_SIDE:
                raise BadRequest(f"an image is {image.size[0]} x {image.size[1]} pixels: send at most {LARGEST_SIDE} a side")
            return np.array(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRequest(f"an image is no {form} ({_short(error)})") from error


def _json_of_array(value: Any) -> dict:
    value = np.asarray(value, order="C")
    return {"__numpy__": base64.b64encode(value.tobytes()).decode(), "dtype": value.dtype.str, "shape": value.shape}


def _list_of_array(value: Any) -> Any:
    return value.tolist()


def _openpi_of_array(value: Any) -> dict:
    return {key.encode(): part for key, part in _vla_eval_of_array(value).items()}


def _vla_eval_of_array(value: Any) -> dict:
    value = np.asarray(value, order="C")
    return {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}


def _short(what: object) -> str:
    return " ".join(repr(what).split())[:80] if not isinstance(what, Exception) else " ".join(str(what).split())[:120]
