"""The Ray shell around :class:`OracleCore`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import ray

from cosmos_ray.config import RunConfig

if TYPE_CHECKING:  # imported late: torch and the simulator belong to the actor's process
    from cosmos_ray.oracle.core import OracleCore


@dataclass(frozen=True)
class AuditTicket:
    """Episodes of an audit that share their batches."""

    task: Literal["play", "probe"]
    arm: str  #: of "play"; "" for "probe"
    indices: tuple[int, ...]  #: numbers of the held-out initial states

    @property
    def name(self) -> str:
        return f"{self.task} {self.arm} {self.indices}"


@dataclass(frozen=True)
class AuditAnswer:
    """What one ticket found."""

    name: str  #: the ticket's
    ticket: AuditTicket
    rows: list[dict[str, Any]]  #: as :meth:`OracleCore.play` or :meth:`OracleCore.probe` returns them
    broken: str = ""  #: what breaks an oracle takes its actor with it


@ray.remote(max_restarts=0, max_task_retries=0)
class OracleActor:
    """One process with a simulator and a policy. An answer depends on its ticket alone, so any actor may answer a ticket again."""

    def __init__(self, config: RunConfig, checkpoint: str, planning_checkpoint: str = ""):
        self._config, self._checkpoint, self._planning_checkpoint = config, checkpoint, planning_checkpoint
        self._core: OracleCore | None = None

    def advance(self, tickets: list[AuditTicket], seconds: float) -> list[AuditAnswer]:
        """Answer all ``tickets``, however long they take."""
        if self._core is None:
            import torch

            from cosmos_ray.oracle.core import OracleCore

            torch.set_num_threads(self._config.inference.threads)
            self._core = OracleCore(self._config, self._checkpoint, self._planning_checkpoint)
        core, answers = self._core, []
        for ticket in tickets:
            indices = list(ticket.indices)
            rows = core.play(ticket.arm, indices) if ticket.task == "play" else core.probe(indices)
            answers.append(AuditAnswer(ticket.name, ticket, rows))
        return answers
