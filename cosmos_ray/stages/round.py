"""A round of refinement: the networks that it starts from, its rollouts, and whether it is done."""

from __future__ import annotations

import dataclasses

from cosmos_ray.inference.messages import ActingPolicy
from cosmos_ray.model.checkpoint import read_description
from cosmos_ray.rollout.ticket import EpisodeTicket
from cosmos_ray.rounds import NETWORKS, Rounds
from cosmos_ray.run import Run
from cosmos_ray.seeds import mix_seed
from cosmos_ray.stages.acting import IMPORTED_PLANNING, planning_checkpoint, rollout_ticket


@dataclasses.dataclass(frozen=True)
class Round:
    """Round ``number`` (from 1) of a refinement of version ``base_version`` of the base policy."""

    run: Run
    number: int
    base_version: int

    def begin(self) -> None:
        """Note that the round has begun, and delete the learner states of the round before, which are large and no longer needed. A
        second call changes nothing."""
        folder, rounds = self.run.folder, Rounds(self.run.folder)
        rounds.settle(self.base_version)
        rounds.begin(self.number, self.base_version)
        for name in NETWORKS if self.number > 1 else ():
            for state in folder.learner_states() - {self.state(name)}:
                if state.startswith(f"{name}_from_"):
                    folder.remove_learner_state(state)
        rounds.forget(self.run.config.keep_rounds, self.base_version)
        self.run.tracker.log("round", round=self.number, version=self.version, attempt=self._attempt, base_version=self.base_version)

    def end(self) -> None:
        """Keep what the round has trained."""
        rounds = Rounds(self.run.folder)
        rounds.settle(self.base_version)
        rounds.forget(self.run.config.keep_rounds, self.base_version)

    @property
    def version(self) -> int:
        """Version of the policy that the round starts from."""
        return self._version(self.start("refined"))

    def start(self, name: str) -> str:
        """The checkpoint that network ``name`` is trained from: that of the round before, if it trained one; else the imported planning
        network or ``base``."""
        before = f"rounds/{self.number - 1}/{name}"
        if self.number > 1 and self._behind(before) == self.number - 1:
            return before
        return IMPORTED_PLANNING if name == "planning" and self.run.folder.has_policy(IMPORTED_PLANNING) else "base"

    def state(self, name: str) -> str:
        """Name of the learner state of network ``name``. After going back, a round has other states than the one of its number before."""
        return f"{name}_from_{max(self._version(self.start(name)), self._line)}"

    def done(self, name: str, steps: int) -> bool:
        """Whether network ``name`` finished this round, with at least ``steps`` steps unless the next round has begun."""
        behind = self._behind(name)
        if behind == self.number and Rounds(self.run.folder).present(self.base_version).round == self.number:
            return Rounds(self.run.folder).info(name, self.base_version)["step"] >= steps
        return behind >= self.number

    def description(self) -> dict:
        """The entries that a checkpoint of this round adds to its description."""
        return {"base_version": self.base_version, "round": self.number, **({"line": self._line} if self._line else {})}

    def tickets(self) -> tuple[list[EpisodeTicket], list[EpisodeTicket]]:
        """The round's rollouts: those before training, and those beside training. From the second round on, a key names the policy
        version, so that another refinement's rollouts do not count as this one's. After going back, keys and noise are new."""
        run, count, total = self.run, self.run.config.rollouts, self.run.config.rollouts + self.run.config.refine_rollouts
        tickets = [rollout_ticket(run, (self.number - 1) * total + i, self._attempt) for i in range(total)]
        if self._line:
            tickets = [dataclasses.replace(ticket, noise_seed=mix_seed(ticket.noise_seed, self._line)) for ticket in tickets]
        before, beside = tickets[:count], tickets[count:]
        if self.number > 1 and run.config.rollout.planned:
            acting = ActingPolicy(self.version, run.config.planner, planning_checkpoint(run, "refined", self.number - 1))
            before = [dataclasses.replace(ticket, acting=acting) for ticket in before]
        return before, beside

    @property
    def _line(self) -> int:
        """The line of rounds that this one is on, see :class:`cosmos_ray.rounds.Present`."""
        present = Rounds(self.run.folder).present(self.base_version)
        return present.line if self.number > present.from_round else 0

    @property
    def _attempt(self) -> int:
        """The attempt in the keys of the round's rollouts."""
        return max(self.version, self._line) if self.number > 1 else 0

    def _version(self, checkpoint: str) -> int:
        return read_description(self.run.folder.checkpoint(checkpoint))[1]

    def _behind(self, checkpoint: str) -> int:
        return Rounds(self.run.folder).behind(checkpoint, self.base_version)
