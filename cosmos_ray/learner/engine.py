"""DeepSpeed as the learner uses it: rendezvous, engine and whole parameters."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch

from cosmos_ray.config import LearnerConfig

LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "MV2_", "TORCHELASTIC_")
"""Beginnings of the variables by which MPI and torchrun tell a process its place. DeepSpeed and torch believe them, even where a shell or
a batch job only passed them on."""


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def rendezvous(rank: int, world_size: int, address: str, port: int) -> dict[str, str]:
    """Environment variables of one learner rank."""
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}


def make_engine(config: LearnerConfig, net: torch.nn.Module, device: str) -> Any:
    """A ``DeepSpeedEngine`` around the network; quiet, and without compiled extension ops on a CPU.

    The process must have the variables of :func:`rendezvous`, which alone say its place: those of :data:`LAUNCHERS` are removed.
    """
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        del os.environ[name]
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as ops
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.ERROR)
    # The shared-memory collectives would be compiled at first use (30-70 s, and ninja must be on PATH); gloo does without.
    ops["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if device == "cpu" else "nccl", verbose=False)
    optimizer = torch.optim.AdamW(_groups(net, config.weight_decay, config.decay_all), lr=config.lr, betas=(0.9, config.beta2), eps=1e-8,
                                  fused=device != "cpu")
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config={
        "train_micro_batch_size_per_gpu": config.rows,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.clip,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 10**9,
    })
    return engine


def _groups(net: torch.nn.Module, weight_decay: float, decay_all: bool) -> list[dict]:
    """Weight decay on matrices only, as usual for transformers, or on all parameters, as the public code does."""
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": weight_decay if decay_all else 0.0}]
    return [group for group in groups if group["params"]]


def gathered(net: torch.nn.Module, stage: int, writer: int | None = None) -> AbstractContextManager[Any]:
    """A context in which this rank has whole parameters. Only ZeRO-3 shards parameters; what rank ``writer`` changes then holds for all."""
    if stage < 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(net.parameters()), modifier_rank=writer)
