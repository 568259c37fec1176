"""Faster sampling of a serving policy: the compiled network, and the whole sampler as one CUDA graph."""

from __future__ import annotations

import dataclasses

import torch

from cosmos_ray.errors import ConfigError
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType


def accelerate(policy: CosmosPolicy, how: str) -> None:
    """Make ``policy`` sample with ``how`` = "none", "compile", "graphs" or "both". ConfigError where the device cannot."""
    if how in ("graphs", "both") and policy.device.type != "cuda":
        raise ConfigError(f"inference.accelerate = {how!r} needs a GPU: give each inference actor one (inference.gpus), or take 'compile'")
    if how in ("compile", "both"):
        policy.net.compile(dynamic=False)
    if how in ("graphs", "both"):
        policy.accelerated = GraphedSampler(policy)


class GraphedSampler:
    """Stands in for ``CosmosPolicy.sample``: captures it once per (kind, rows, steps), then replays the captured kernels.

    Rows are padded to a power of two, so a few graphs serve every batch size; a row's result does not depend on the others.
    Graphs hold the text's keys and the modulation as they were, so they are dropped when the weights change.
    """

    def __init__(self, policy: CosmosPolicy):
        self.policy = policy
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple, _Graph] = {}
        self._keys: tuple | None = None  #: of the prompts that the graphs were captured with

    def forget(self) -> None:
        """Drop every graph: the weights have changed."""
        self._graphs.clear()

    def __call__(self, kind: SampleType, known: torch.Tensor, text: Prompts, noise: torch.Tensor, steps: int) -> torch.Tensor:
        if text.keys is not self._keys:
            self.forget()
            self._keys = text.keys
        rows = len(known)
        padded = 1 << (rows - 1).bit_length()
        graph = self._graphs.get((kind, padded, steps))
        if graph is None:
            graph = self._graphs[kind, padded, steps] = _Graph(self.policy, kind, padded, known, text, steps, self._pool)
        return graph.replay(known, text.rows, noise)


class _Graph:
    """One captured sampler with the buffers it reads and writes."""

    def __init__(self, policy: CosmosPolicy, kind: SampleType, rows: int, known: torch.Tensor, text: Prompts, steps: int, pool):
        self.known = known.new_zeros(rows, *known.shape[1:])
        self.noise = torch.zeros_like(self.known)
        self.rows = text.rows.new_zeros(rows)
        text = dataclasses.replace(text, rows=self.rows)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the first runs allocate, choose kernels and compile
            for _ in range(2):
                policy.sample(kind, self.known, text, self.noise, steps)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.out = policy.sample(kind, self.known, text, self.noise, steps)

    def replay(self, known: torch.Tensor, rows: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        n = len(known)
        self.known[:n].copy_(known)
        self.noise[:n].copy_(noise)
        self.rows[:n].copy_(rows)
        self.graph.replay()
        return self.out[:n].clone()
