"""DeepSpeed's ZeRO 1 and 2 optimiser state, shared out anew among another number of ranks.

A rank holds a slice of every parameter group: the group's parameters one after the other, flat. The last slices end with padding.
DeepSpeed itself only loads a state with as many ranks as wrote the state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

RESHARDED = (1, 2)  #: ZeRO stages that store whole groups in slices; both alike
SLICES = "single_partition_of_fp32_groups"
BASE = "base_optimizer_state"


def load_shards(optimizer: Any, state: Path, writers: int, rank: int, ranks: int) -> None:
    """Give this rank's slices to DeepSpeed's ``optimizer``, out of the folder ``state`` of ``writers`` ranks.

    The files are pickles: only of a folder that this run wrote. OSError for a missing file.
    """
    written = [_read(state, writer) for writer in range(writers)]
    sizes = [group.numel() for group in optimizer.single_partition_of_fp32_groups]
    base = written[0][BASE]
    mine = {**written[0], SLICES: [_slice([w[SLICES][i] for w in written], size, rank, ranks) for i, size in enumerate(sizes)],
            BASE: {**base, "state": {i: _group(written, i, sizes[i], rank, ranks) for i in base["state"]}}}
    optimizer.load_state_dict([mine] * ranks, load_optimizer_states=True, load_from_fp32_weights=True)


def _read(state: Path, writer: int) -> dict[str, Any]:
    found = sorted(state.glob(f"*zero_pp_rank_{writer}_mp_rank_00_optim_states.pt"))
    if not found:
        raise OSError(f"the optimizer states of rank {writer} are missing")
    return torch.load(found[0], map_location="cpu", weights_only=False)["optimizer_state_dict"]


def _group(written: list[dict[str, Any]], i: int, size: int, rank: int, ranks: int) -> dict[str, Any]:
    """The optimiser's state of group ``i``: its moments sliced anew, its step as it is."""
    first, out = written[0][BASE]["state"][i], {}
    for name, value in first.items():
        if torch.is_tensor(value) and value.dim():
            whole = [w[BASE]["state"][i][name][: w[SLICES][i].numel()] for w in written]  # what is beyond is padding
            value = _slice(whole, size, rank, ranks)
        out[name] = value
    return out


def _slice(parts: list[torch.Tensor], size: int, rank: int, ranks: int) -> torch.Tensor:
    """The slice (size,) of ``rank``, of a flat group in ``parts`` without padding."""
    whole = torch.cat([part.flatten() for part in parts])
    return torch.nn.functional.pad(whole, (0, size * ranks - whole.numel()))[rank * size : (rank + 1) * size].clone()
