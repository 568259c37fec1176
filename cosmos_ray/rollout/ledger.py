"""Which tickets broke their workers: what tells a broken initial state from its neighbours and from a killed worker."""

from __future__ import annotations

import logging
from collections import Counter

from cosmos_ray.errors import SimulationError
from cosmos_ray.supervision import TICKET_ATTEMPTS

logger = logging.getLogger(__name__)


class Ledger:
    """Strikes by ticket name; a ticket with :data:`TICKET_ATTEMPTS` strikes is quarantined.

    A ticket gets a strike when it breaks its simulator or, alone, its worker. A worker that dies with several tickets is half a strike for
    each, as any of them may be the cause, or none: somebody killed the worker. From one strike on a ticket is suspect and runs alone.
    """

    def __init__(self) -> None:
        self.finished = 0  #: tickets that gave a result
        self.quarantined: dict[str, str] = {}  #: name -> reason
        self._halves: Counter[str] = Counter()

    def suspect(self, name: str) -> bool:
        return self._halves[name] >= 2

    def strike(self, name: str, why: str, alone: bool = True) -> bool:
        """Whether the ticket may run again. SimulationError once more tickets are quarantined than have finished."""
        self._halves[name] += 2 if alone else 1
        if self._halves[name] < 2 * TICKET_ATTEMPTS:
            return True
        self.quarantined[name] = why
        logger.error("%s is quarantined after %d attempts: %s", name, TICKET_ATTEMPTS, why)
        if len(self.quarantined) > max(TICKET_ATTEMPTS, self.finished):
            raise SimulationError(f"{len(self.quarantined)} initial states broke the simulator and {self.finished} did not; {name}, the "
                                  f"last one: {why}")
        return False
