"""Which numbers of which parameter this rank's optimiser moves, in every ZeRO stage: what a learner state is written from and read into.

Stage 0 keeps whole parameters on every rank. Stages 1 and 2 lay the parameters of a group one after the other and cut that into one slice
a rank. Stage 3 cuts every parameter alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from cosmos_ray.learner.engine import gathered
from cosmos_ray.learner.state import MOMENTS, WEIGHT, Piece

Read = Callable[[str, str, int, int], torch.Tensor]  #: kind, name, start, count -> (count,) float32


class Slice(NamedTuple):
    """Numbers ``start`` to ``start + size`` of parameter ``name``: ``size`` numbers from ``offset`` on of the optimiser's ``flat``."""

    name: str
    start: int
    flat: torch.Tensor
    offset: int
    size: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """(size,) view into ``tensor``, which is laid out as ``flat``."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.size)


def slices(engine: Any, net: torch.nn.Module, stage: int, rank: int) -> Iterator[Slice]:
    """The slices of ``rank``; in stage 0 every rank has them all."""
    named: list[tuple[str, Any]] = [(name, p) for name, p in net.named_parameters() if p.requires_grad]  # DeepSpeed adds attributes
    optimizer = engine.optimizer
    if stage == 0:
        halves = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True)  # bf16 has float32 copies
        masters = {id(p): master for group, copies in halves for p, master in zip(group, copies, strict=True)}
        for name, p in named:
            yield Slice(name, 0, masters.get(id(p), p), 0, p.numel())
    elif stage < 3:
        for name, p in named:
            if (mapped := p._hp_mapping) is not None:
                there, here = mapped.lp_fragment_address, mapped.hp_fragment_address
                yield Slice(name, there.start, optimizer.param_groups[mapped.param_group_index]["params"][0], here.start, here.numel)
    else:
        for name, p in named:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
            if (count := min(size, p.ds_numel - rank * size)) > 0:  # the last ones end with padding
                yield Slice(name, rank * size, optimizer.fp32_partitioned_groups_flat[group], offset, count)


def optimised(engine: Any, net: torch.nn.Module, stage: int, rank: int) -> tuple[list[Piece], float]:
    """What this rank has to write, and AdamW's step: weights, and moments once there are any. Nothing in stage 0 but on rank 0."""
    state, pieces, step = _adam(engine), [], 0.0
    for part in slices(engine, net, stage, rank) if stage or rank == 0 else ():
        pieces.append(Piece(WEIGHT, part.name, part.start, part.of(part.flat)))
        if own := state.get(part.flat):
            step = float(own["step"])
            pieces += [Piece(kind, part.name, part.start, part.of(own[kind])) for kind in MOMENTS]
    return pieces, step


@torch.no_grad()
def restore(engine: Any, net: torch.nn.Module, stage: int, rank: int, read: Read, step: float) -> None:
    """Give the optimiser and the network what ``read`` finds. All ranks must call it. Without a ``step`` the moments stay as they are."""
    state = _adam(engine)
    for part in slices(engine, net, stage, rank):
        part.of(part.flat).copy_(read(WEIGHT, part.name, part.start, part.size))
        if step:
            own = state[part.flat]
            if not own:
                fused = any(group["fused"] for group in engine.optimizer.param_groups)
                own["step"] = torch.zeros((), device=part.flat.device if fused else "cpu")
                own.update({kind: torch.zeros_like(part.flat) for kind in MOMENTS})
            own["step"].fill_(step)
            for kind in MOMENTS:
                part.of(own[kind]).copy_(read(kind, part.name, part.start, part.size))
    with gathered(net, stage, writer=0):
        for name, p in net.named_parameters():
            if p.requires_grad and (stage < 3 or rank == 0):
                p.copy_(read(WEIGHT, name, 0, p.numel()).view_as(p))


def _adam(engine: Any) -> Any:
    """State of the AdamW inside DeepSpeed's optimiser, by flat tensor."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer).state
