"""A round of refinement: the networks that it starts from, its rollouts, and whether it is done."""

from __future__ import annotations

import dataclasses
import shutil

from cosmos_ray.inference.messages import ActingPolicy
from cosmos_ray.model.checkpoint import copy_checkpoint, read_description
from cosmos_ray.rollout.ticket import EpisodeTicket
from cosmos_ray.run import Run
from cosmos_ray.stages.acting import IMPORTED_PLANNING, planning_checkpoint, rollout_ticket

NETWORKS = ("refined", "planning")
"""Checkpoints that a round trains. Every round trains on under the same name. A checkpoint's description counts the finished rounds;
``NAME_before`` is the network that the present round started from."""


@dataclasses.dataclass(frozen=True)
class Round:
    """Round ``number`` (from 1) of a refinement of version ``base_version`` of the base policy."""

    run: Run
    number: int
    base_version: int

    def begin(self) -> None:
        """Keep the networks that the round starts from, and delete the learner states of the round before, which are large and no longer
        needed. Does nothing in the first round; a second call changes nothing."""
        folder = self.run.folder
        for name in NETWORKS if self.number > 1 else ():
            if self._behind(name) == self.number - 1:
                copy_checkpoint(folder.checkpoint(name), folder.checkpoint(f"{name}_before"))
            own = folder.learner_state(self.state(name))
            for state in own.parent.glob(f"{name}_from_*"):
                if state != own:
                    shutil.rmtree(state)

    @property
    def version(self) -> int:
        """Version of the policy that the round starts from."""
        return self._version(self.start("refined"))

    def start(self, name: str) -> str:
        """The checkpoint that network ``name`` is trained from: that of the round before, if it trained one; else the imported planning
        network or ``base``."""
        before = f"{name}_before"
        if self.number > 1 and self._behind(before) == self.number - 1:
            return before
        return IMPORTED_PLANNING if name == "planning" and self.run.folder.has_policy(IMPORTED_PLANNING) else "base"

    def state(self, name: str) -> str:
        """Name of the learner state of network ``name``."""
        return f"{name}_from_{self._version(self.start(name))}"

    def done(self, name: str, steps: int) -> bool:
        """Whether network ``name`` finished this round, with at least ``steps`` steps unless the next round has begun."""
        behind = self._behind(name)
        if behind == self.number and self._behind(f"{name}_before") != self.number:
            return self._info(name)["step"] >= steps
        return behind >= self.number

    def description(self) -> dict:
        """The entries that a checkpoint of this round adds to its description."""
        return {"base_version": self.base_version, "round": self.number}

    def tickets(self) -> tuple[list[EpisodeTicket], list[EpisodeTicket]]:
        """The round's rollouts: those before training, and those beside training. From the second round on, a key names the policy
        version, so that another refinement's rollouts do not count as this one's."""
        run, count, total = self.run, self.run.config.rollouts, self.run.config.rollouts + self.run.config.refine_rollouts
        attempt = self.version if self.number > 1 else 0
        tickets = [rollout_ticket(run, (self.number - 1) * total + i, attempt) for i in range(total)]
        before, beside = tickets[:count], tickets[count:]
        if self.number > 1 and run.config.rollout.planned:
            acting = ActingPolicy(self.version, run.config.planner, planning_checkpoint(run, "refined", "_before"))
            before = [dataclasses.replace(ticket, acting=acting) for ticket in before]
        return before, beside

    def _version(self, checkpoint: str) -> int:
        return read_description(self.run.folder.checkpoint(checkpoint))[1]

    def _behind(self, checkpoint: str) -> int:
        """How many rounds ``checkpoint`` has finished. A description without the entry, from before rounds, counts as one."""
        info = self._info(checkpoint)
        return info.get("round", 1) if info else 0

    def _info(self, checkpoint: str) -> dict:
        """The description of ``checkpoint``; empty if there is none, or if another base policy is behind it."""
        target = self.run.folder.checkpoint(checkpoint)
        info = read_description(target)[2] if target.exists() else {}
        return info if info.get("base_version") == self.base_version else {}
