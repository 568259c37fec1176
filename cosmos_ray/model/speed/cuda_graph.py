"""A call on tensors, captured once as a CUDA graph and then replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch


def capture(call: Callable[[], torch.Tensor], stream: torch.cuda.Stream, pool=None) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """(``call`` as a CUDA graph, the tensor that each replay writes its result to)."""
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
    """A captured call without gradients, with the buffers it reads: those that have a row for each of ``inputs[0]`` are padded to
    ``rows`` rows with zeros, or what an earlier call left there. Rows must not depend on each other."""

    def __init__(self, call: Callable[..., torch.Tensor], inputs: list[torch.Tensor], rows: int, stream: torch.cuda.Stream, pool=None):
        given = len(inputs[0])
        self.buffers = [x.new_zeros(rows, *x.shape[1:]) if len(x) == given else torch.zeros_like(x) for x in inputs]
        self.graph, self.out = capture(lambda: call(*self.buffers), stream, pool)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The result for ``inputs``, of up to ``rows`` rows: as many rows as ``inputs[0]`` has."""
        for buffer, given in zip(self.buffers, inputs, strict=True):
            buffer[:len(given)].copy_(given)
        self.graph.replay()
        return self.out[:len(inputs[0])].clone()
