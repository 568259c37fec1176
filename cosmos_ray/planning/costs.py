"""What network evaluations take on a device, measured in under a minute and kept beside the checkpoint. Pure torch."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosmos_ray.errors import CheckpointError
from cosmos_ray.model import sampling
from cosmos_ray.model.exchange.files import replacing
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.speed.accelerate import padded_rows

logger = logging.getLogger(__name__)

Clock = Callable[[], float]  #: seconds, as ``time.monotonic``

KINDS = (SampleType.POLICY, SampleType.WORLD_MODEL, SampleType.VALUE_FUTURE, SampleType.VALUE_ACTION)
ROWS = (1, 2, 4, 8, 16, 32)  #: batches that are measured, as far as the time allows
BUDGET_S = 40.0  #: for a whole calibration
TIMES, TIMES_S = 3, 0.2  #: calls of each kind and batch, fewer once they have taken so many seconds; the median counts
STEPS = 3  #: evaluations of the longer one of two calls, whose difference tells what an evaluation takes


@dataclass(frozen=True)
class Costs:
    """Seconds by kind of sample and rows of a batch. Between the measured batches they are interpolated, above them rows cost alike."""

    rows: tuple[int, ...]  #: ascending
    first: dict[str, tuple[float, ...]]  #: by name of the sample type: a sampler call of one evaluation
    each: dict[str, tuple[float, ...]]  #: every further evaluation
    padded: bool = False  #: rows are padded, see :func:`padded_rows`

    def evaluation(self, kind: SampleType, rows: int) -> float:
        """Seconds of one evaluation."""
        return self._at(self.first[kind.name], rows)

    def call(self, kind: SampleType, rows: int, evaluations: int) -> float:
        """Seconds of a sampler call."""
        return self._at(self.first[kind.name], rows) + (evaluations - 1) * self._at(self.each[kind.name], rows)

    def _at(self, seconds: tuple[float, ...], rows: int) -> float:
        rows = padded_rows(rows) if self.padded else rows
        if rows > self.rows[-1]:
            return seconds[-1] * rows / self.rows[-1]
        return float(np.interp(rows, self.rows, seconds))

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Costs:
        """Rebuild from ``dataclasses.asdict``. ValueError, KeyError or TypeError for something else."""
        rows = tuple(int(n) for n in record["rows"])
        first, each = ({kind.name: tuple(float(s) for s in record[name][kind.name]) for kind in KINDS} for name in ("first", "each"))
        if not rows or list(rows) != sorted(set(rows)) or any(len(s) != len(rows) or min(s) < 0 for s in (*first.values(), *each.values())):
            raise ValueError("the numbers of rows and seconds do not fit")
        return cls(rows, first, each, bool(record["padded"]))


def measure(policy: CosmosPolicy, text: Prompts, clock: Clock = time.monotonic, budget_s: float = BUDGET_S) -> Costs:
    """Time the network of ``policy`` on ever larger batches of one prompt, ``text`` (one row), while ``budget_s`` lasts."""
    end, rows = clock() + budget_s, []
    first: dict[str, list[float]] = {kind.name: [] for kind in KINDS}
    each: dict[str, list[float]] = {kind.name: [] for kind in KINDS}
    for n in ROWS:
        began = clock()
        for kind in KINDS:
            one, more = _seconds(policy, kind, text.repeat(n), 1, clock), _seconds(policy, kind, text.repeat(n), STEPS, clock)
            first[kind.name].append(one)
            each[kind.name].append(max(0.0, more - one) / (STEPS - 1))
        rows.append(n)
        if clock() + 2.5 * (clock() - began) > end:
            break
    one_call, further = ({name: tuple(seconds) for name, seconds in table.items()} for table in (first, each))
    return Costs(tuple(rows), one_call, further, policy.accelerated is not None)


def _seconds(policy: CosmosPolicy, kind: SampleType, text: Prompts, evaluations: int, clock: Clock) -> float:
    """Median seconds of a sampler call on ``len(text)`` rows."""
    n = len(text)
    known = torch.zeros(n, policy.spec.frame_shape[0], policy.layout.frames, *policy.spec.frame_shape[1:], device=policy.device)
    taken: list[float] = []
    while len(taken) <= TIMES and sum(taken[1:]) < TIMES_S:
        began = clock()
        sampling.generate(policy, sampling.give(policy, kind, known, text), torch.arange(n), evaluations)
        settle(policy.device)
        taken.append(clock() - began)
    return float(np.median(taken[1:]))  # the first call compiles, captures and allocates


def settle(device: torch.device) -> None:
    """Wait until ``device`` has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------- beside the checkpoint


def costs_file(checkpoint: str | Path) -> Path:
    """Where the costs of ``checkpoint`` are kept: beside its folder."""
    checkpoint = Path(checkpoint)
    return checkpoint.with_name(f"{checkpoint.name}.costs.json")


def fingerprint(checkpoint: str | Path) -> str:
    """Twenty hex digits that change whenever the checkpoint is written anew."""
    folder = Path(checkpoint)
    size = (folder / "model.safetensors").stat().st_size
    return hashlib.sha256((folder / "policy.json").read_bytes() + str(size).encode()).hexdigest()[:20]


def place(policy: CosmosPolicy) -> str:
    """On what, and how, the network computes: costs of another place do not hold here."""
    from cosmos_ray.sim.machine import machine  # a policy without a deadline does without the simulator's room

    cuda = policy.device.type == "cuda"
    on = torch.cuda.get_device_name(policy.device) if cuda else f"{machine()['cpu']}, {torch.get_num_threads()} threads"
    how = "" if policy.accelerated is None else f", {policy.accelerated.how}"
    return f"{on}, {next(policy.net.parameters()).dtype}{how}"


def kept_costs(policy: CosmosPolicy, text: Prompts, checkpoint: str | Path = "", clock: Clock = time.monotonic) -> Costs:
    """The costs that are kept beside ``checkpoint`` for this device, threads, precision and acceleration; else measured now, and kept.

    Costs of other weights, and a file that cannot be read, are measured again. Where nothing can be written, a warning says so.
    """
    if not checkpoint:
        return measure(policy, text, clock)
    file, where, mark = costs_file(checkpoint), place(policy), fingerprint(checkpoint)
    kept: dict[str, Any] = {}
    try:
        kept = dict(json.loads(file.read_text())) if file.exists() else {}
        if where in kept and kept[where]["fingerprint"] == mark:
            return Costs.from_json(kept[where])
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s): the network's speed is measured again", file, error)
        kept = {}
    logger.info("the speed of %s on %s is measured, for planner.deadline_ms; at most %g s", Path(checkpoint).name, where, BUDGET_S)
    costs = measure(policy, text, clock)
    try:
        with replacing(file, overwrite=True) as unfinished:
            unfinished.write_text(json.dumps({**kept, where: {"fingerprint": mark, **asdict(costs)}}, indent=1))
    except CheckpointError as error:
        logger.warning("the speed of the network is measured again by the next process: %s", error)
    return costs
