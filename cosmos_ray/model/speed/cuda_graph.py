"""A call on tensors, captured once as a CUDA graph and then replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def capture(call: Callable[[], torch.Tensor], stream: torch.cuda.Stream, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """(``call`` as a CUDA graph, the tensor that receives the result of each replay).

    ``pool`` is a handle of ``torch.cuda.graph_pool_handle``; None takes memory of the graph's own.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the first runs allocate, choose kernels and compile
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        out = call()
    return graph, out


class PaddedGraph:
    """A captured call without gradients, and its input buffers. Rows must not depend on each other.

    A buffer with as many rows as ``inputs[0]`` gets ``rows`` rows. The rows past the given ones hold zeros or inputs of an earlier call.
    """

    def __init__(self, call: Callable[..., torch.Tensor], inputs: list[torch.Tensor], rows: int, stream: torch.cuda.Stream,
                 pool: Any = None):
        given = len(inputs[0])
        self.buffers = [x.new_zeros(rows, *x.shape[1:]) if len(x) == given else torch.zeros_like(x) for x in inputs]
        self.graph, self.out = capture(lambda: call(*self.buffers), stream, pool)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The result for ``inputs`` of up to ``rows`` rows, with as many rows as ``inputs[0]``."""
        for buffer, given in zip(self.buffers, inputs, strict=True):
            buffer[:len(given)].copy_(given)
        self.graph.replay()
        return self.out[:len(inputs[0])].clone()
