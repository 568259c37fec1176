"""Nodes, workers and calls for a fleet without Ray, on a clock of their own."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from cosmos_ray.errors import ConfigError
from cosmos_ray.rollout.fleet import WorkerLost
from cosmos_ray.rollout.ticket import Finished, Waiting

START_S = 20.0
GONE = "its node has died"


@dataclass
class Worker:
    index: int
    node: str
    tickets: list[str] = field(default_factory=list)
    started: bool = False
    dead: str = ""


class Cluster:
    """Nodes with places; workers that finish one ticket a turn. A fleet's crew and its calls."""

    def __init__(self, **places: int):
        self.now = 0.0
        self.places = places
        self.workers: dict[int, Worker] = {}  #: by number
        self.calls: dict[int, tuple[Worker, float]] = {}  #: call -> its worker and when it ends
        self.attempts: Counter[str] = Counter()
        self.fatal: set[str] = set()  #: tickets that take their worker down
        self.broken: dict[str, str] = {}  #: tickets that break their simulator, and how
        self.no_start: set[str] = set()  #: nodes where every worker dies at its start
        self.refusing: set[str] = set()  #: nodes where every worker raises an error of ours
        self.silent: set[str] = set()  #: nodes where no worker ever answers
        self.words: dict[int, str] = {}  #: what worker number ... says it waits for, instead of working
        self.most: dict[str, int] = defaultdict(int)  #: ticket -> neighbours that it ran with at its last attempt

    def clock(self) -> float:
        return self.now

    # ------------------------------------------------------------ crew

    def start(self, index):
        alive = [w for i, w in self.workers.items() if not w.dead and i != index]
        for node, places in self.places.items():
            if sum(w.node == node for w in alive) < places:
                self.workers[index] = Worker(index, node)
                return self.workers[index]
        return None

    def should_move(self, index):
        alive = Counter(w.node for w in self.workers.values())
        return any(alive[self.workers[index].node] > alive[node] + 1 for node in self.places)

    def where(self, index):
        return self.workers[index].node if index in self.workers else f"1 CPU each; free: {self.places}"

    # ------------------------------------------------------------ calls

    def advance(self, handle, tickets, seconds):
        handle.tickets += tickets
        for ticket in handle.tickets:
            self.most[ticket] = len(handle.tickets) - 1
        call = len(self.calls)
        self.calls[call] = handle, float("inf") if handle.node in self.silent else self.now + (seconds if handle.started else START_S)
        return call

    def ended(self, calls, timeout):
        for worker in self.workers.values():
            worker.dead = worker.dead or ("" if worker.node in self.places else GONE)
        due = [call for call in calls if self.calls[call][1] <= self.now + timeout or self.calls[call][0].dead]
        first = min((self.now if self.calls[call][0].dead else self.calls[call][1] for call in due), default=self.now + timeout)
        self.now = max(self.now, first)
        return [call for call in due if self.calls[call][1] <= self.now or self.calls[call][0].dead]

    def answers(self, call):
        worker = self.calls[call][0]
        if worker.node in self.refusing:
            raise ConfigError("no OpenGL here")
        worker.dead = worker.dead or ("no simulator" if worker.node in self.no_start else "")
        if worker.dead:
            raise WorkerLost(worker.dead, with_node=worker.dead == GONE)
        worker.started = True
        if worker.index in self.words:
            return [Waiting(self.words[worker.index])]
        if not worker.tickets:
            return []
        ticket = worker.tickets.pop(0)
        self.attempts[ticket] += 1
        if ticket in self.fatal:
            worker.dead = "segmentation fault"
            raise WorkerLost(worker.dead)
        return [Finished(ticket, True, 1, "", True, 1.0, 0, broken=self.broken.get(ticket, ""))]

    def stop(self, handle):
        handle.dead = handle.dead or "stopped"
