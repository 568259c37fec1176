"""Which batches a planner makes, so that every one can be compiled or captured before the first request. Pure torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.config.acting import JUDGED
from cosmos_ray.model import sampling
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.speed.accelerate import padded_rows
from cosmos_ray.planning.costs import KINDS, ROWS
from cosmos_ray.planning.scoring import members_of_equal_steps, step_ladder


@dataclass(frozen=True)
class Batches:
    """The batches of one kind of sample: of so many rows for every observation."""

    kind: SampleType
    evaluations: int
    rows: int  #: of one observation
    fewer: bool = False  #: any smaller number of rows occurs too: a search leaves candidates out as it goes

    def sizes(self, observations: int) -> list[int]:
        """The padded sizes that occur with 1 to ``observations`` observations, ascending."""
        most = self.rows * observations
        return sorted({padded_rows(n) for n in (range(1, most + 1) if self.fewer else range(self.rows, most + 1, self.rows))})


def batches_of(planner: PlannerConfig | None, steps: int) -> Iterator[Batches]:
    """What a decision of ``planner`` samples, a chunk with ``steps`` evaluations; None is the policy alone."""
    if planner is None:
        yield Batches(SampleType.POLICY, steps, 1)
        return
    if planner.deadline_ms:
        yield from (Batches(kind, evaluations, max(ROWS), fewer=True) for kind in KINDS for evaluations in (1, steps))
        return
    rows, fewer = planner.candidates, planner.early_rejection or planner.depth > 1
    for level in range(planner.depth):
        yield Batches(SampleType.POLICY, steps, rows, fewer and level > 0)
        if planner.rank_by in JUDGED:
            yield from _judged(planner, rows, fewer)
        rows *= (planner.futures if planner.rank_by in ("future", "both", "joint") else 1) * planner.branch


def _judged(planner: PlannerConfig, rows: int, fewer: bool) -> Iterator[Batches]:
    """The futures of ``rows`` candidates, and the values of these and of the candidates."""
    if planner.rank_by != "action":
        ladder = step_ladder(planner.future_steps, planner.futures, planner.ladder)
        for evaluations in sorted(set(ladder[:1] if planner.rank_by == "consensus" else ladder)):
            yield Batches(SampleType.WORLD_MODEL, evaluations, rows, fewer)
    for evaluations, members in members_of_equal_steps(planner) if planner.rank_by != "consensus" else ():
        if planner.rank_by != "action":
            together = 1 if planner.early_rejection else planner.futures  # futures that are valued in one batch
            yield Batches(SampleType.VALUE_FUTURE, evaluations, rows * together * len(members), fewer)
        if planner.rank_by != "future":
            yield Batches(SampleType.VALUE_ACTION, evaluations, rows * len(members), fewer)


def sample_all(policy: CosmosPolicy, batches: list[Batches], observations: int, text: Prompts) -> None:
    """Have ``policy`` sample every padded size of ``batches`` once, with up to ``observations`` observations; ``text`` is one row."""
    done: set[tuple[SampleType, int, int]] = set()
    for one in batches:
        for size in one.sizes(observations):
            if (one.kind, size, one.evaluations) in done:
                continue
            done.add((one.kind, size, one.evaluations))
            known = torch.zeros(size, policy.spec.frame_shape[0], policy.layout.frames, *policy.spec.frame_shape[1:], device=policy.device)
            given = sampling.give(policy, one.kind, known, text.take(torch.zeros(size, dtype=torch.int64)))
            sampling.generate(policy, given, torch.arange(size), one.evaluations)
