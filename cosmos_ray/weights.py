"""Versioned weights in transit: one flat buffer, checked on arrival.

The learner packs, Ray's object store carries the numpy buffer (zero-copy on one node), inference actors unpack between two
batches. A buffer that is damaged, or that belongs to another model, is refused and the old weights stay.
"""

from __future__ import annotations

import hashlib
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from cosmos_ray.errors import CheckpointError


@dataclass(frozen=True)
class Weights:
    """A policy version ready to travel."""

    version: int  #: policy version, monotone within a run
    fingerprint: str  #: of the parameter names and shapes
    checksum: int  #: CRC-32 of ``data``
    dtype: str  #: of the parameters, "float32" or "bfloat16"
    data: np.ndarray  #: (bytes,) uint8, the parameters back to back in the module's order


def fingerprint(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of parameter names and shapes: equal exactly when weights are interchangeable."""
    text = ";".join(f"{name}{tuple(p.shape)}" for name, p in named)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pack(named: Iterable[tuple[str, torch.Tensor]], version: int) -> Weights:
    """Copy named parameters, in a module's order, into a travelling buffer of the first one's precision."""
    named = list(named)
    dtype = named[0][1].dtype
    flat = torch.empty(sum(t.numel() for _, t in named), dtype=dtype)
    offset = 0
    with torch.no_grad():
        for _, tensor in named:
            flat[offset : offset + tensor.numel()].copy_(tensor.reshape(-1))
            offset += tensor.numel()
    data = flat.view(torch.uint8).numpy()
    return Weights(version, fingerprint(named), zlib.crc32(data.data), str(dtype).removeprefix("torch."), data)


def unpack(weights: Weights, module: torch.nn.Module) -> None:
    """Write weights into ``module`` in place. CheckpointError, with the module untouched, when they do not belong or are damaged."""
    if weights.fingerprint != fingerprint(module.named_parameters()):
        raise CheckpointError(f"weights version {weights.version} belong to another model: their parameter names or shapes differ")
    if zlib.crc32(weights.data.data) != weights.checksum:
        raise CheckpointError(f"weights version {weights.version} were damaged in transit: checksum mismatch")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # object-store buffers are; only read here
        flat = torch.from_numpy(weights.data).view(getattr(torch, weights.dtype))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(flat[: parameter.numel()].view_as(parameter))
            flat = flat[parameter.numel() :]
