"""Faster sampling of a serving policy: the compiled network, and the whole sampler as one CUDA graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from cosmos_ray.errors import ConfigError
from cosmos_ray.model import sampling
from cosmos_ray.model.given import Given
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.speed.cuda_graph import PaddedGraph
from cosmos_ray.model.transformer import Transformer


def accelerate(policy: CosmosPolicy, how: str) -> None:
    """Make ``policy`` sample with ``how`` = "none", "compile", "graphs" or "both". ConfigError where the device cannot."""
    graphs = how in ("graphs", "both")
    if graphs and policy.device.type != "cuda":
        raise ConfigError(f"inference.accelerate = {how!r} needs a GPU: give each inference actor one (inference.gpus), or take 'compile'")
    if how in ("compile", "both"):
        compile_network(policy.net, by_block=graphs)
    if how != "none":
        policy.accelerated = PaddedSampler(graphs, how)


def compile_network(net: Transformer, by_block: bool) -> None:
    """Compile the whole network, or each block by itself.

    All blocks share one program, which compiles in a fraction of the time. The steps between blocks cost time that only a CUDA graph hides.
    """
    torch._dynamo.config.recompile_limit = 64  # one for each padded batch size; beyond the limit Dynamo silently runs eagerly
    for module in net.blocks if by_block else [net]:
        module.compile(dynamic=False)


def take_over(policy: CosmosPolicy, before: CosmosPolicy) -> None:
    """Have ``policy`` compute with the compiled network of ``before``, which nobody asks any more, if both are of the same kind: what is
    compiled belongs to a network, whatever its weights."""
    old, new = before.net, policy.net
    alike = (policy.spec.transformer, policy.device, next(new.parameters()).dtype) == (
        before.spec.transformer, before.device, next(old.parameters()).dtype)
    if alike and isinstance(policy.accelerated, PaddedSampler) and isinstance(before.accelerated, PaddedSampler) and (
            policy.accelerated.how == before.accelerated.how != "graphs"):
        old.load_state_dict(new.state_dict())
        policy.net = old
        policy.serve()


class PaddedSampler:
    """Stands in for ``sampling.sample``. Rows and prompts are padded to few sizes, so that few shapes are compiled or captured.

    With ``graphs``, the sampler is captured once per (sample type, rows, steps); later calls replay the captured kernels. A graph reads the
    keys of its prompts and its modulations where they lay at the capture, so new weights or new prompts drop all graphs.
    """

    def __init__(self, graphs: bool, how: str = ""):
        self.how = how
        self._stream = torch.cuda.Stream() if graphs else None
        self._keys: tuple | None = None  #: keys and values of the last call's prompts
        self._prompts: Prompts | None = None  #: these prompts padded; None with graphs
        self.forget()

    def forget(self) -> None:
        """Drop every graph: the weights have changed."""
        self._graphs: dict[tuple, PaddedGraph] = {}
        # A new pool each time: one whose graphs are all gone cannot be captured into again.
        self._pool = torch.cuda.graph_pool_handle() if self._stream is not None else None

    def __call__(self, policy: CosmosPolicy, given: Given, noise: torch.Tensor, steps: int) -> torch.Tensor:
        n, text = len(given), given.text
        rows = padded_rows(n)
        if text.keys is not self._keys:
            self.forget()
            self._keys, self._prompts = text.keys, None
        if self._stream is None:
            if self._prompts is None:
                self._prompts = _padded_prompts(text)
            padded = _with(given, [_padded(x, rows) for x in _tensors(given)], self._prompts)
            return sampling.sample(policy, padded, _padded(noise, rows), steps)[:n]
        if policy.watch is not None:
            policy.watch(given.sample_type, rows, None)  # a graph is one call: nobody is asked between its evaluations
        key = (given.sample_type, rows, steps)
        if key not in self._graphs:
            def sample(noise: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
                watch, policy.watch = policy.watch, None
                try:
                    return sampling.sample(policy, _with(given, tensors, text), noise, steps)
                finally:
                    policy.watch = watch

            self._graphs[key] = PaddedGraph(sample, [noise, *_tensors(given)], rows, self._stream, self._pool)
        return self._graphs[key](noise, *_tensors(given))


def _tensors(given: Given) -> list[torch.Tensor]:
    """Every tensor of ``given`` that has its rows."""
    return [given.known, given.text.rows, *(x for pair in given.keys or () for x in pair)]


def _with(given: Given, tensors: Sequence[torch.Tensor], text: Prompts) -> Given:
    """``given`` with other :func:`_tensors`, and the prompts of ``text``."""
    known, prompts, *keys = tensors
    pairs = None if given.keys is None else tuple(zip(keys[::2], keys[1::2], strict=True))
    return dataclasses.replace(given, known=known, text=dataclasses.replace(text, rows=prompts), keys=pairs)


def padded_rows(n: int) -> int:
    """Rows that a batch of ``n`` is padded to: a power of two, or above 16 also three quarters of one.

    Eight candidates with three futures make 24 rows, which 32 would slow by a third.
    """
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if 16 < n <= power * 3 // 4 else power


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """``tensor`` with rows of zeros at its end, up to ``rows`` rows."""
    return torch.cat((tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:]))) if rows > len(tensor) else tensor


def _padded_prompts(text: Prompts) -> Prompts:
    """``text`` with its prompts padded to a power of two."""
    prompts = 1 << (len(text.tokens) - 1).bit_length()
    # Contiguous, as padding leaves them: Dynamo compiles for strides.
    keys = tuple((_padded(key, prompts).contiguous(), _padded(value, prompts).contiguous()) for key, value in text.keys or ())
    bias = None if text.bias is None else _padded(text.bias, prompts)
    return Prompts(_padded(text.tokens, prompts), bias, text.rows, keys)
