"""What the policy server reads from the wire, and writes to it, without a port."""

from __future__ import annotations

import json_numpy
import msgpack
import numpy as np
import pytest

from cosmos_ray.serving import wire
from cosmos_ray.serving.wire import BadRequest


@pytest.mark.parametrize("data", [
    b"\x85", b"\x91" * 5000, b"\xdf\xff\xff\xff\xff", msgpack.packb({b"__ndarray__": True, b"data": b"1", b"dtype": "<f8", b"shape": [2]}),
    msgpack.packb({"__image__": True, "format": "png", "data": b"no picture"}),
    msgpack.packb({"__image__": True, "format": "exe", "data": b""})])
def test_msgpack_that_is_none_is_refused(data):
    with pytest.raises(BadRequest):
        wire.from_msgpack(data)


def test_arrays_survive_both_wires():
    for array in (np.arange(6, dtype=np.int16).reshape(2, 3), np.float32(2.5), np.zeros((0, 3)), np.array(True)):
        packed = [wire.from_msgpack(wire.to_msgpack({"a": array}, bytes_keys=keys))["a"] for keys in (True, False)]
        for back in (wire.from_json(wire.to_json({"a": array}, arrays=True))["a"], *packed):
            assert np.array_equal(back, array) and back.dtype == array.dtype
        assert np.array_equal(json_numpy.loads(wire.to_json({"a": array}, arrays=True))["a"], array)


