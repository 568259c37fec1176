"""Weights in transit: what arrives is what was sent, or nothing."""

import dataclasses

import numpy as np
import pytest
import torch

from cosmos_ray.errors import CheckpointError
from cosmos_ray.weights import check, copies, fingerprint, pack, unpack
from tests.test_model import tiny


def noised(seed: int):
    net = tiny().net
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return net


def values(net) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(left, right) -> bool:
    return all(map(torch.equal, left, right))


def test_round_trip_is_exact():
    source, target = noised(1), noised(2)
    weights = pack(source.named_parameters(), version=5)
    unpack(weights, target)
    assert weights.version == 5 and same(values(source), values(target))


def test_a_packed_buffer_is_a_copy():
    source = noised(1)
    before, weights = values(source), pack(source.named_parameters(), 1)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    target = noised(2)
    unpack(weights, target)
    assert same(before, values(target))


def test_what_is_put_are_views_of_the_parameters_and_no_copies():
    source, target = noised(1), noised(2)
    weights = pack(source.named_parameters(), 1, put=lambda buffers: buffers)
    assert all(buffer.ctypes.data == p.data_ptr() for buffer, p in zip(weights.data, source.parameters(), strict=True))
    unpack(weights, target)
    assert same(values(source), values(target))


def test_an_average_travels_in_place_of_the_parameters():
    source, target = noised(1), noised(2)
    average = [torch.full_like(p, i) for i, p in enumerate(source.parameters())]
    names = [name for name, _ in source.named_parameters()]
    unpack(pack(zip(names, average, strict=True), 1), target)
    assert same(average, values(target))


def test_a_damaged_buffer_is_refused_and_the_old_weights_stay():
    weights, target = pack(noised(1).named_parameters(), 3), noised(2)
    before = values(target)
    last = len(weights.data) - 1
    for number, position in ((0, 0), (last // 2, 5), (last, -1)):
        data = copies(weights.data)
        data[number][position] ^= 1
        with pytest.raises(CheckpointError, match="version 3 were damaged in transit"):
            unpack(dataclasses.replace(weights, data=data), target)
    for data in (weights.data[:-1], (*weights.data[:-1], weights.data[-1][:-4]), (weights.data[0][:4], *weights.data[1:])):
        with pytest.raises(CheckpointError, match="damaged"):
            unpack(dataclasses.replace(weights, data=data), target)
    assert same(before, values(target))


def test_weights_that_did_not_leave_their_node_are_not_summed_again_but_their_sizes_are_checked():
    weights, target = dataclasses.replace(pack(noised(1).named_parameters(), 3), node="here"), noised(2)
    other = dataclasses.replace(weights, checksum=weights.checksum ^ 1)
    check(other, target, node="here")
    for node in ("", "there"):
        with pytest.raises(CheckpointError, match="damaged"):
            check(other, target, node=node)
    with pytest.raises(CheckpointError, match="damaged"):
        check(dataclasses.replace(weights, data=weights.data[:-1]), target, node="here")


def test_weights_of_another_model_are_refused_and_the_old_weights_stay():
    target = noised(2)
    before = values(target)
    with pytest.raises(CheckpointError, match="belong to another model"):
        unpack(pack(tiny(layers=3).net.named_parameters(), 3), target)
    assert same(before, values(target))


def test_fingerprint_follows_names_and_shapes_not_values():
    def of(module: torch.nn.Module) -> str:
        return fingerprint(module.named_parameters())

    assert of(noised(1)) == of(noised(2))
    assert of(torch.nn.Linear(2, 3)) != of(torch.nn.Linear(3, 2))
    assert of(torch.nn.Sequential(torch.nn.Linear(2, 2))) != of(torch.nn.Linear(2, 2))


def test_bfloat16_weights_travel_in_half_the_bytes_and_arrive_bit_for_bit():
    source, target = noised(1).bfloat16(), noised(2)
    weights = pack(source.named_parameters(), 1)
    assert (weights.dtype, sum(map(len, weights.data))) == ("bfloat16", 2 * sum(p.numel() for p in source.parameters()))
    unpack(weights, target)  # into a float32 network
    assert same([p.float() for p in values(source)], values(target))


def test_read_only_buffers_are_accepted():
    """Ray hands out buffers of its object store, which nobody may write to."""
    source, target = noised(1), noised(2)
    weights = pack(source.named_parameters(), 1)
    frozen = tuple(np.frombuffer(buffer.tobytes(), np.uint8) for buffer in weights.data)
    assert not frozen[0].flags.writeable
    unpack(dataclasses.replace(weights, data=frozen), target)
    assert same(values(source), values(target))
