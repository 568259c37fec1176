"""Versioned weights in transit, checked on arrival.

The learner puts views of its parameters into Ray's object store: that is the only copy out of the learner. The driver hands on a
:class:`Weights` with a reference in place of the bytes. An inference actor maps the bytes (on the learner's node nothing is copied),
checks them while it serves, and copies them into its network between two batches. On the learner's node it checks names and sizes
alone: there it reads the very memory that the learner filled. Bytes that are damaged, or that belong to another model, are refused
whole, and the old weights stay.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from isal.isal_zlib import crc32

from cosmos_ray.errors import CheckpointError

# Buffers of the object store are read-only, and are only read here.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

Buffers = tuple[np.ndarray, ...]  #: the bytes of each parameter, (bytes,) uint8 each, in the module's order


@dataclass(frozen=True)
class Weights:
    """A policy version that travels, or the record of one in Ray's object store."""

    version: int  #: policy version, monotone within a run
    fingerprint: str  #: of the parameter names and shapes
    checksum: int  #: CRC-32 of all bytes, in order
    dtype: str  #: of the parameters, "float32" or "bfloat16"
    data: Any  #: ``Buffers``, or what ``put`` of :func:`pack` gave for them
    node: str = ""  #: Ray's id of the node whose memory the learner filled; "" = unknown


def fingerprint(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of parameter names and shapes: equal exactly when weights are interchangeable."""
    text = ";".join(f"{name}{tuple(p.shape)}" for name, p in named)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def copies(buffers: Buffers) -> Buffers:
    """The same bytes in memory of their own."""
    return tuple(buffer.copy() for buffer in buffers)


@torch.no_grad()
def pack(named: Iterable[tuple[str, torch.Tensor]], version: int, put: Callable[[Buffers], Any] = copies) -> Weights:
    """Named parameters, in a module's order, as weights in the first one's precision.

    ``put`` must copy what it gets: where the parameters lie in the CPU's memory, that is views of them.
    """
    named = list(named)
    dtype = named[0][1].dtype
    buffers = tuple(tensor.view(-1).view(torch.uint8).numpy() for tensor in _on_host([tensor for _, tensor in named], dtype))
    with ThreadPoolExecutor(1) as beside:
        checksum = beside.submit(_checksum, buffers)
        return Weights(version, fingerprint(named), data=put(buffers), checksum=checksum.result(), dtype=str(dtype).removeprefix("torch."))


def check(weights: Weights, module: torch.nn.Module, node: str = "") -> None:
    """CheckpointError when ``weights``, with ``Buffers`` as data, are damaged or do not belong to ``module``. ``node`` is that of the
    caller: bytes that did not leave it are not summed again."""
    if weights.fingerprint != fingerprint(module.named_parameters()):
        raise CheckpointError(f"weights version {weights.version} belong to another model: their parameter names or shapes differ")
    itemsize = getattr(torch, weights.dtype).itemsize
    whole = [len(buffer) for buffer in weights.data] == [itemsize * parameter.numel() for parameter in module.parameters()]
    travelled = not node or weights.node != node
    if not whole or (travelled and _checksum(weights.data) != weights.checksum):
        raise CheckpointError(f"weights version {weights.version} were damaged in transit: checksum mismatch")


@torch.no_grad()
def write(weights: Weights, module: torch.nn.Module) -> None:
    """Write ``weights`` that :func:`check` accepted into ``module`` in place."""
    dtype = getattr(torch, weights.dtype)
    for parameter, buffer in zip(module.parameters(), weights.data, strict=True):
        if parameter.dtype == dtype and not parameter.is_cuda and parameter.is_contiguous():  # as bytes: a quarter faster
            np.copyto(parameter.detach().view(-1).view(torch.uint8).numpy(), buffer)
        else:
            parameter.copy_(torch.from_numpy(buffer).view(dtype).view_as(parameter))


def unpack(weights: Weights, module: torch.nn.Module) -> None:
    """:func:`check`, then :func:`write`. CheckpointError leaves the module untouched."""
    check(weights, module)
    write(weights, module)


def _on_host(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """``tensors`` contiguous, as ``dtype``, in the CPU's memory: themselves where they are so already."""
    if not tensors[0].is_cuda:
        return [tensor.to(dtype).contiguous() for tensor in tensors]
    pinned = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=dtype, pin_memory=True)  # torch keeps it for the next time
    parts = list(pinned.split([tensor.numel() for tensor in tensors]))
    for part, tensor in zip(parts, tensors, strict=True):
        part.copy_(tensor.reshape(-1), non_blocking=True)
    torch.cuda.synchronize()
    return parts


def _checksum(buffers: Buffers) -> int:
    value = 0
    for buffer in buffers:
        value = crc32(buffer, value)
    return value
