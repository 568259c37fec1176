"""The learner without Ray: one DeepSpeed rank that trains the network on replay batches."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cosmos_ray import instants
from cosmos_ray.config import LearnerConfig
from cosmos_ray.errors import CheckpointError, CosmosRayError
from cosmos_ray.learner.encoder import WindowEncoder
from cosmos_ray.learner.engine import gathered, make_engine
from cosmos_ray.learner.latent_cache import LatentCache
from cosmos_ray.learner.mixture import BatchSource
from cosmos_ray.learner.slices import optimised, restore
from cosmos_ray.learner.state import AVERAGE, DESCRIPTION, LearnerState, Piece, TornState, describe, newest_whole, write_file, write_pieces
from cosmos_ray.memory import enough_memory
from cosmos_ray.model.checkpoint import save_policy
from cosmos_ray.model.lora import adapt, merged_parameters
from cosmos_ray.model.objective import Objective
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.speed.training_graphs import capture_training
from cosmos_ray.replay.files.durable import make_directory
from cosmos_ray.replay.sampling.loader import PrefetchLoader
from cosmos_ray.weights import Buffers, Weights, copies, pack

logger = logging.getLogger(__name__)

LESS_MEMORY = ("lower learner.batch_size, or raise learner.accumulate; learner.activation_checkpointing true and, with several ranks, "
               "learner.zero_stage 2 save more")
LAYOUT = "lora_rank"  #: the setting that decides which numbers a resumable state has


def learning_rate(step: int, total: int, peak: float, config: LearnerConfig) -> float:
    """The learning rate of a step; steps count from 0.

    "linear": warm-up, plateau, then decay to ``final_lr`` of the peak over the stage. "paper" (method 5.3, 11.4): warm-up from 1e-6 of the
    peak to 1.0 at ``warmup``, a line from there to 0.3 at ``cycle``, then constant at 0.06. "paper_before": the line is 1.0 at step 0, and
    step ``cycle`` is at 0.06.
    """
    if config.schedule != "linear":
        before = config.schedule == "paper_before"
        if step > config.cycle or before and step == config.cycle:
            return 0.06 * peak
        if step < config.warmup:
            return peak * (1e-6 + (1 - 1e-6) * step / config.warmup)
        return peak * (0.3 + 0.7 * (config.cycle - step) / max(1, config.cycle - (0 if before else config.warmup)))
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    start = config.decay_from * total
    done = min(1.0, max(0.0, (step - start) / max(1.0, total - start)))
    return peak * warm * (1 - done * (1 - config.final_lr))


class TrainingDiverged(CosmosRayError):
    """The loss is no longer a number."""


class LearnerCore:
    """Trains ``policy.net`` in a DeepSpeed engine.

    The process must have the rendezvous variables ``MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE, LOCAL_RANK`` set (see
    :func:`rendezvous`). Every rank must be built alike and make the same calls in the same order.
    """

    def __init__(self, config: LearnerConfig, policy: CosmosPolicy, source: BatchSource, *, peak_lr: float, total_steps: int,
                 seed: int, rank: int = 0, device: str = "cpu", latents: LatentCache | None = None,
                 planning_network: CosmosPolicy | None = None):
        self.config, self.source = config, source
        graphs = config.accelerate == "graphs"
        # While a graph is captured, no other thread may ask CUDA for anything, pinned memory included.
        pin = device != "cpu" and not graphs
        self.loader = PrefetchLoader(source, threads=config.loader_threads, pin=pin) if config.loader_threads else None
        self.policy = policy.place(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
        self.planning_network = planning_network
        self.objective = Objective(self.policy, planning_network, config.advantage_temperature)
        self.encoder = WindowEncoder(policy, config.latent_cache, config.latent_variants, latents)
        self.peak_lr, self.total_steps, self.rank = peak_lr, total_steps, rank
        self.step_count = 0
        self.saved: Path | None = None  #: the state that a resume begins from
        self.passed_over: list[str] = []  #: newer states that were not whole, each with what is wrong
        self.generator = torch.Generator().manual_seed(seed * 1000 + rank)
        if config.lora_rank:
            adapt(policy.net, config.lora_rank, seed)
        policy.net.checkpointing = config.activation_checkpointing
        self.engine = make_engine(config, policy.net, device)
        for net in (p.net for p in (policy, planning_network) if p is not None and graphs):
            capture_training(net)
        self.trained = [p for p in policy.net.parameters() if p.requires_grad]
        self.average = [p.detach().float().clone() for p in self.trained] if config.ema else None

    def step(self) -> dict[str, float]:
        """One optimiser step on one batch; returns loss, errors of the action, future and value frames, gradient norm, rate and seconds."""
        began = time.perf_counter()
        rate = learning_rate(self.step_count, self.total_steps, self.peak_lr, self.config)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        parts = [self._accumulate() for _ in range(self.config.accumulate)]
        self.step_count += 1
        if self.average is not None:
            # A young average forgets its random start faster, as in the usual bias-corrected schedule.
            decay = min(self.config.ema, (1 + self.step_count) / (10 + self.step_count))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, [p.detach().float() for p in self.trained], 1 - decay)
        norm = self.engine.get_global_grad_norm()
        means = {k: sum(part[k] for part in parts) / len(parts) for k in parts[0]}
        return {"step": self.step_count, **means, "lr": rate,
                "grad_norm": float(norm) if norm is not None else float("nan"), "seconds": time.perf_counter() - began}

    def _accumulate(self) -> dict[str, float]:
        """Add the gradients of one batch; the last batch of a step moves the weights. Returns loss and errors."""
        batch = next(self.loader) if self.loader else self.source.draw()
        loss, errors = self.objective.loss(batch, self.generator, self.engine, self.encoder.encode(batch, self.generator))
        if not torch.isfinite(loss):
            raise TrainingDiverged(f"the loss is {float(loss)} at step {self.step_count + 1}: lower the learning rate")
        self.engine.backward(loss)
        instants.passes("step")
        self.engine.step()
        return {"loss": float(loss.detach()), **errors}

    def refresh(self) -> None:
        """Take in new and removed episodes. Batches that were prepared before are made again."""
        index = self.source.sampler.store.index
        removed = index.removed
        if (self.source.sampler.refresh() or index.removed != removed) and self.loader:
            self.loader.restart()

    def train(self, steps: int) -> dict[str, float]:
        """Up to ``steps`` steps (never past ``total_steps``); returns the means of their metrics and the last step."""
        with enough_memory(LESS_MEMORY):
            rows = [self.step() for _ in range(min(steps, self.total_steps - self.step_count))]
        if not rows:
            return {"step": self.step_count}
        return {**{k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}, "step": self.step_count}

    def weights(self, version: int, put: Callable[[Buffers], Any] = copies) -> Weights | None:
        """The published weights (the average, if one is kept), on rank 0; None elsewhere. All ranks must call it.

        ``put`` as in :func:`pack`: it gets views of the parameters, not copies.
        """
        with self._published() as named:
            instants.passes("publish")
            return pack(named, version, put) if self.rank == 0 else None

    def export(self, path: str | Path, version: int, info: dict | None = None) -> None:
        """Write the published policy as a checkpoint directory (rank 0). All ranks must call it."""
        self.encoder.flush()
        with self._published() as named:
            if self.rank == 0:
                save_policy(self.policy, path, version, {"step": self.step_count, **(info or {})}, named)

    @contextlib.contextmanager
    def _published(self) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
        """Named parameters to publish: whole on this rank, averaged if an average is kept, adapters merged."""
        with gathered(self.policy.net, self.config.zero_stage):
            if self.average is not None and not self.config.lora_rank:
                averages = dict(zip(map(id, self.trained), self.average, strict=True))
                yield ((name, averages.get(id(p), p).to(p.dtype)) for name, p in self.policy.net.named_parameters())
                return
            raw = [p.detach().clone() for p in self.trained] if self.average is not None else []
            self._put(self.average or [])
            try:
                yield merged_parameters(self.policy.net)
            finally:
                self._put(raw)

    @torch.no_grad()
    def _put(self, tensors: list[torch.Tensor]) -> None:
        for parameter, tensor in zip(self.trained, tensors, strict=False):
            parameter.copy_(tensor)

    # ---------------------------------------------------------------- resume

    def save(self, folder: str | Path) -> None:
        """Write the state after this step: weights and moments in float32, the weight average, random states. All ranks must call it.

        A state is there once it is whole; two are kept. CheckpointError, on every rank, when the folder cannot be written: the state of
        before stays what a resume begins from.
        """
        folder = Path(folder)
        state = folder / f"step_{self.step_count:08d}"
        if state == self.saved:
            return  # never write over the state that would be resumed from
        self.encoder.flush()
        parts = self._written(state, self._write_part, state)
        self._written(state, self._describe, state, parts)  # nobody goes on before the state is there
        for old in folder.glob("step_*"):
            if old not in (state, self.saved):
                shutil.rmtree(old, ignore_errors=True)
        self.saved = state

    def _written(self, state: Path, write: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``write`` returned on every rank. CheckpointError on all of them when one cannot write."""
        out, why = None, ""
        try:
            out = write(*arguments)
        except OSError as error:
            why = error.strerror or str(error)
        answers = self._exchange((out, why))
        if failed := [why for _, why in answers if why]:
            if self.rank == 0:
                shutil.rmtree(state, ignore_errors=True)
            raise CheckpointError(f"learner state cannot be written to {state}: {failed[0]}; make room there and run the same command "
                                  "again")
        return [out for out, _ in answers]

    def _describe(self, state: Path, parts: list[tuple[dict[str, dict[str, int]], float]]) -> None:
        """Make a state of what all ranks wrote."""
        if self.rank == 0:
            layout = {name: getattr(self.config, name) for name in ("world_size", "zero_stage", "precision", LAYOUT)}
            describe(state, {"step": self.step_count, "adam_step": parts[0][1], **layout},
                     {name: file for files, _ in parts for name, file in files.items()})

    def _write_part(self, state: Path) -> tuple[dict[str, dict[str, int]], float]:
        """Write what this rank has of a state; returns the files, and the optimiser's step."""
        make_directory(state)
        if self.rank == 0:
            (state / DESCRIPTION).unlink(missing_ok=True)  # of a damaged state of this step
        pieces, step = optimised(self.engine, self.policy.net, self.config.zero_stage, self.rank)
        if self.average is not None and self.rank == 0:
            pieces += [Piece(AVERAGE, name, 0, tensor.view(-1)) for name, tensor in zip(self._names(), self.average, strict=True)]
        own = {"source": self.source.state_dict(self.loader.snapshot() if self.loader else None),
               "generator": self.generator.get_state().tolist()}
        numbers, position = f"rank{self.rank}.safetensors", f"rank{self.rank}.json"
        files = {numbers: write_pieces(pieces, state / numbers), position: write_file([json.dumps(own).encode()], state / position)}
        instants.passes("checkpoint")
        return files, step

    def load(self, folder: str | Path) -> bool:
        """Continue from the newest whole state of :meth:`save`; False when there is none yet. All ranks must call it.

        Ranks, ZeRO stage and precision may differ from those that wrote the state; ranks beyond those begin their own random numbers.
        :attr:`passed_over` then names newer states that are not whole. CheckpointError when all are damaged, or when the state is of
        another model.
        """
        folder, tag, why = Path(folder), None, ""
        if self.rank == 0:
            try:
                tag, self.passed_over = newest_whole(folder)
            except (CheckpointError, OSError) as error:
                why = str(error)
        tag, why = self._exchange((tag, why))[0]
        if why:
            raise CheckpointError(why)
        if tag is None:
            return False
        try:
            self._read_state(LearnerState(folder / tag))
        except (TornState, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"learner state in {folder / tag} cannot be read: {str(error).splitlines()[0]}; delete {folder} to begin "
                                  "this stage anew, the rest of the run stays") from error
        self.saved = folder / tag
        return True

    def _read_state(self, state: LearnerState) -> None:
        theirs, ours = state.values[LAYOUT], getattr(self.config, LAYOUT)
        if theirs != ours:
            raise CheckpointError(f"{state.folder} was written with learner.{LAYOUT} {theirs}, not {ours}: give --learner."
                                  f"{LAYOUT.replace('_', '-')} {theirs} to continue, or delete {state.folder.parent} to begin this stage "
                                  "anew")
        restore(self.engine, self.policy.net, self.config.zero_stage, self.rank, state.read, state.values["adam_step"])
        for name, average, parameter in zip(self._names(), self.average or [], self.trained, strict=False):
            known = state.has(AVERAGE)  # else averaging begins here
            average.copy_(state.read(AVERAGE, name, 0, average.numel()).view_as(average) if known else parameter.detach().float())
        self.step_count = state.values["step"]
        if self.loader:
            self.loader.restart()
        if own := state.text(f"rank{self.rank}.json"):
            self.source.load_state_dict(own["source"])
            self.generator.set_state(torch.tensor(own["generator"], dtype=torch.uint8))

    def _names(self) -> list[str]:
        return [name for name, p in self.policy.net.named_parameters() if p.requires_grad]

    def _exchange(self, value: Any) -> list[Any]:
        """The ``value`` of every rank, on every rank, once all have given theirs."""
        values = [None] * self.config.world_size
        torch.distributed.all_gather_object(values, value)
        return values
