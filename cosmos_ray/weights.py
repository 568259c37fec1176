"""Versioned weights in transit: one flat buffer, checked on arrival.

The learner packs, Ray's object store carries the numpy buffer (zero-copy on one node), inference actors unpack between two
batches. A buffer that is damaged, or that belongs to another model, is refused and the old weights stay.
"""

from __future__ import annotations

import hashlib
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
    data: np.ndarray  #: (bytes,) uint8, float32 parameters back to back in name order of the module


def fingerprint(module: torch.nn.Module) -> str:
    """Hash of a module's parameter names and shapes: equal exactly when weights are interchangeable."""
    text = ";".join(f"{name}{tuple(p.shape)}" for name, p in module.named_parameters())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pack(module: torch.nn.Module, version: int, tensors: Iterable[torch.Tensor] | None = None) -> Weights:
    """Copy a module's parameters (or ``tensors``, in the same order: an average of them) into a travelling buffer."""
    source = list(module.parameters()) if tensors is None else list(tensors)
    flat = np.empty(sum(t.numel() for t in source), np.float32)
    offset = 0
    for tensor in source:
        flat[offset : offset + tensor.numel()] = tensor.detach().float().cpu().numpy().ravel()
        offset += tensor.numel()
    data = flat.view(np.uint8)
    return Weights(version, fingerprint(module), zlib.crc32(data), data)


def unpack(weights: Weights, module: torch.nn.Module) -> None:
    """Write weights into ``module`` in place. CheckpointError, with the module untouched, when they do not belong or are damaged."""
    if weights.fingerprint != fingerprint(module):
        raise CheckpointError(f"weights version {weights.version} belong to another model: their parameter names or shapes differ")
    if zlib.crc32(weights.data) != weights.checksum:
        raise CheckpointError(f"weights version {weights.version} were damaged in transit: checksum mismatch")
    flat = torch.from_numpy(np.array(weights.data, copy=True).view(np.float32))  # object-store buffers are read-only
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(flat[: parameter.numel()].view_as(parameter))
            flat = flat[parameter.numel() :]
