"""Best-of-N by a deadline: candidates come in waves, and the best so far is the answer when the time is over. Pure torch.

The first candidate is the policy's own. Then follow waves of further candidates, each proposed, imagined and valued as :func:`best_of_n`
does; a wave takes about half of the time that is left. The clock is read before every network evaluation. An evaluation that would end too
late is not begun: its wave is given up, and the first candidate is taken as far as it is sampled. So an answer is late by one evaluation at
most. (CUDA graphs hold whole samplers: there it is one sampler call.)

A gear says how a candidate is made and valued. The first gear, from the settings as they are to a single evaluation and the joint value, in
which :data:`ENOUGH` candidates fit is taken; else the one with the most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.model import solver
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.planning.best_of_n import Decision
from cosmos_ray.planning.costs import Clock, Costs, settle
from cosmos_ray.planning.scoring import members_of_equal_steps, step_ladder
from cosmos_ray.planning.waves import OutOfTime, Waves

ENOUGH = 4  #: candidates for which a gear is not left for a cheaper one
FEW = 2  #: evaluations of a chunk in the cheaper gears
SHARE = 0.5  #: of the time left, what a wave may take; the last wave takes all
RESERVE = (0.003, 0.03)  #: seconds, and share of the deadline, that are kept for the way back, times the slowness
GROWS, SHRINKS = 0.5, 0.02  #: of the margin: by this share of the time that a decision is late by; by this share of itself when it is not
CROWDED = 0.2  #: share of the deadline from which a wait in the queue is one for another decision
LEAP = 4.0  #: times slower than expected that something counts at most: what happens once, such as compiling, says little
CAUTION = 0.3  #: share of the deadline that the margin takes at most


@dataclass(frozen=True)
class Gear:
    """How candidates are made and valued."""

    name: str
    steps: int  #: network evaluations of a chunk
    planner: PlannerConfig

    def seconds(self, costs: Costs, reference_steps: bool, new: int, valued: int) -> float:
        """Of proposing ``new`` rows and valuing ``valued`` rows."""
        planner = self.planner
        calls = [(SampleType.POLICY, new, self.steps)]
        if planner.rank_by in ("future", "both"):
            calls += [(SampleType.WORLD_MODEL, valued, steps)
                      for steps in step_ladder(planner.future_steps, planner.futures, planner.ladder)]
        for kind, ranks, rows in ((SampleType.VALUE_FUTURE, ("future", "both"), valued * planner.futures),
                                  (SampleType.VALUE_ACTION, ("action", "both"), valued)):
            if planner.rank_by in ranks:
                calls += [(kind, rows * len(members), steps) for steps, members in members_of_equal_steps(planner)]
        return sum(costs.call(kind, rows, solver.evaluations(steps, reference_steps)) for kind, rows, steps in calls if rows)


def gears(config: PlannerConfig, steps: int) -> list[Gear]:
    """From the settings as they are to the cheapest."""
    many = config.value_samples * (config.futures if config.rank_by != "action" else 1) > 1 and config.rank_by != "joint"
    single = replace(config, futures=1, future_steps=1, value_samples=1, value_steps=1)
    joint = replace(single, rank_by="joint")
    out = [Gear("full", steps, replace(config, early_rejection=many))]
    if config.rank_by != "joint":
        out.append(Gear("single values", steps, single))
    out.append(Gear("few steps", min(FEW, steps), single))
    if not config.spread:
        out += [Gear("joint value", min(FEW, steps), joint), Gear("joint value, one step", 1, joint)]
    return [gear for i, gear in enumerate(out) if all((gear.steps, gear.planner) != (g.steps, g.planner) for g in out[:i])]


class _Watch:
    """Asked before every evaluation of a decision whether there is time for it."""

    def __init__(self, pilot: Autopilot, device: torch.device, end: float):
        self.pilot, self.device, self.end = pilot, device, end
        self.ended = False  #: a sampler ended early
        self.gives_up = False  #: what is sampled, where time runs out; else the sampler ends with what it has predicted so far

    def __call__(self, sample_type: SampleType, rows: int, predicted: torch.Tensor | None) -> bool:
        settle(self.device)
        takes = self.pilot.costs.evaluation(sample_type, rows) * self.pilot.slowness
        if self.pilot.clock() + takes <= self.end:
            return False
        if self.gives_up:
            raise OutOfTime
        self.ended = predicted is not None
        return self.ended


class Autopilot:
    """Decides by a deadline on one device, and remembers how much slower than when it was measured the device is at present."""

    def __init__(self, costs: Costs, clock: Clock = time.monotonic):
        self.costs, self.clock = costs, clock
        self.slowness = 1.0  #: seconds that something takes, over those that were measured
        self.crowd = 0.0  #: 1 where a request waited for another, less with every decision that did not
        self.margin = 0.0  #: seconds that decisions end earlier by, so that interruptions make few of them late

    def decide(self, policy: CosmosPolicy, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int, config: PlannerConfig,
               arrived: float, planning_network: tuple[CosmosPolicy, Prompts] | None = None, taken: float | None = None) -> Decision:
        """As :func:`best_of_n`, within ``config.deadline_ms`` of ``arrived``, a time of the clock: what a request has waited counts.

        ``taken`` is when the request left its queue. While requests wait for each other, a decision takes half of the deadline at most: one
        that has just missed it has the other half. ``steps`` and the numbers of ``config`` are the most that is taken.
        ``Decision.autopilot`` says what was.
        """
        began, rows, allowed = self.clock(), len(seeds), config.deadline_ms / 1000
        network, prompts = planning_network or (policy, text)
        ready = arrived + allowed - (RESERVE[0] + RESERVE[1] * allowed) * max(1.0, self.slowness)
        taken = began if taken is None else taken
        self.crowd = 1.0 if taken - arrived > CROWDED * allowed else 0.9 * self.crowd
        if self.crowd > 0.5:
            ready = min(ready, taken + allowed / 2)
        watch = _Watch(self, policy.device, ready - min(self.margin, CAUTION * allowed))
        gear = self.choose(policy.reference_steps, config, steps, rows, watch.end - began)
        waves = Waves(policy, known, text, seeds, gear.steps, gear.planner, network, prompts)
        policy.watch = network.watch = watch
        try:
            self._timed(watch, gear, policy.reference_steps, (rows, 0), waves.begin)
            watch.gives_up = True
            while new := self._next(policy, gear, rows, waves, config.candidates, watch.end):
                self._timed(watch, gear, policy.reference_steps, (rows * new, rows * (new + waves.valued_again)),
                            partial(waves.add, new))
        except OutOfTime:
            pass
        finally:
            policy.watch = network.watch = None
        decision, now = waves.decision(), self.clock()
        if began < watch.end:  # else nothing could have been ready in time
            self.margin += GROWS * (now - ready) if now > ready else -SHRINKS * self.margin
            self.margin = min(self.margin, CAUTION * allowed)
        decision.autopilot = {
            "gear": gear.name, "steps": gear.steps, "rank_by": gear.planner.rank_by, "futures": gear.planner.futures,
            "value_samples": gear.planner.value_samples, "candidates": decision.scores.shape[1], "waves": waves.count,
            "queued_ms": round(1000 * (taken - arrived), 1), "waited_ms": round(1000 * (began - arrived), 1),
            "took_ms": round(1000 * (now - began), 1), "slowness": round(self.slowness, 2), "in_time": now <= arrived + allowed}
        return decision

    def choose(self, reference_steps: bool, config: PlannerConfig, steps: int, rows: int, left: float) -> Gear:
        """For a decision of ``rows`` observations in ``left`` seconds. Where no gear has time for two candidates, the policy's own chunk
        gets as many evaluations as fit, at least one, and the cheapest way to value others, should there be time after all."""
        left /= self.slowness
        best: tuple[Gear, int] | None = None
        for gear in gears(config, steps):
            alone = gear.seconds(self.costs, reference_steps, rows, 0)
            fits = 1 + self._most(reference_steps, gear, rows, 1, left - alone, config.candidates - 1)
            if fits >= min(ENOUGH, config.candidates) and alone <= left:
                return gear
            if fits > (best[1] if best else 1):
                best = gear, fits
        if best is not None:
            return best[0]
        fitting = [n for n in range(1, steps + 1)
                   if self.costs.call(SampleType.POLICY, rows, solver.evaluations(n, reference_steps)) <= left]
        return Gear("policy first", max(fitting, default=1), gears(config, steps)[-1].planner)

    def _most(self, reference_steps: bool, gear: Gear, rows: int, again: int, left: float, limit: int) -> int:
        """New candidates of ``rows`` observations that can be proposed and valued in ``left`` seconds, at most ``limit``; ``again`` of
        before are valued with them."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            fits = gear.seconds(self.costs, reference_steps, rows * middle, rows * (middle + again)) <= left
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _next(self, policy: CosmosPolicy, gear: Gear, rows: int, waves: Waves, candidates: int, end: float) -> int:
        """Candidates of the next wave; 0 where there is no time for any, or there are all."""
        left, limit = (end - self.clock()) / self.slowness, candidates - waves.compared
        for share in (SHARE, 1.0):
            if new := self._most(policy.reference_steps, gear, rows, waves.valued_again, share * left, limit):
                return new
        return 0

    def _timed(self, watch: _Watch, gear: Gear, reference_steps: bool, rows: tuple[int, int], does: Callable[[], None]) -> None:
        """Do what proposes and values so many ``rows``, and learn how much slower it was than measured: slower counts by half at once,
        faster only little by little."""
        began, finished = self.clock(), False
        try:
            does()
            settle(watch.device)
            finished = not watch.ended
        finally:  # what was given up after more than its time was slow, too
            ratio = (self.clock() - began) / max(gear.seconds(self.costs, reference_steps, *rows), 1e-9)
            if finished or ratio > self.slowness:
                ratio = min(ratio, LEAP * self.slowness)
                self.slowness += (0.5 if ratio > self.slowness else 0.1) * (ratio - self.slowness)
                self.slowness = min(max(self.slowness, 0.5), 50.0)
