"""Who gets which node, and how much of the node. `placement.py` asks Ray and starts what is placed here; this module does not know Ray.

A run takes at most half of what it found free on a node, so that another run on the same cluster always finds room. Processes that find
no place otherwise, such as those of a node that died, take half of what is free then.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cosmos_ray.errors import ConfigError

LEAST_CPUS = 0.03  #: of one process: with less, processes wait for each other, and their memory does not suffice
PER_CPU = 16  #: processes that a CPU serves at most; with half of a CPU this gives each of them LEAST_CPUS
SETTLE_S = 5.0  #: after which Ray's count of what is free has what was started
CLEARLY = 1.5  #: times the CPU that a process has now, for which moving the process pays
NAMED = 6  #: nodes that one line names at most
_TINY = 1e-6


@dataclass(frozen=True)
class Node:
    """One living node, as Ray counts the node's CPUs and GPUs."""

    id: str
    address: str
    cpus: float
    free_cpus: float
    gpus: float = 0.0
    free_gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"node {self.address} ({self.id[:6]})"

    @property
    def text(self) -> str:
        """The name, with what is free."""
        gpus = f" and {self.free_gpus:g} of {self.gpus:g} GPUs" if self.gpus else ""
        return f"{self.name} with {self.free_cpus:.2g} of {self.cpus:g} CPUs{gpus} free"

    def matches(self, selector: Mapping[str, str]) -> bool:
        return all(self.labels.get(key) == value for key, value in selector.items())


@dataclass(frozen=True)
class Ask:
    """Processes of one kind that a stage wants to run, at most one CPU each."""

    who: str  #: "rollout workers"
    count: int
    section: str = "rollout"  #: of the settings, whose ``nodes`` gave the selector
    gpus: float = 0.0  #: GPUs of each
    shares_gpus: bool = False  #: each takes an equal share, at most one, of the GPUs that are left, where the nodes have any
    selector: Mapping[str, str] = field(default_factory=dict)  #: labels of the nodes that may be taken
    together: bool = False  #: on as few nodes as possible, and all of them or none
    least: int = 0  #: the stage waits until so many of them have a place; for all of them that go together

    @property
    def needs(self) -> int:
        return self.count if self.together else self.least


@dataclass(frozen=True)
class Place:
    """What one process gets."""

    node: Node
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Gang:
    """Places of processes that start together."""

    options: Sequence[dict[str, Any]]  #: Ray options of each process, with ``num_cpus`` and ``num_gpus``
    threads: Sequence[int]  #: CPU threads that each process can use
    remove: Callable[[], None]  #: gives the places back and ends what runs there


@dataclass
class _Grant:
    place: Place
    since: float | None = None  #: when the process was started; None: not yet


class Places:
    """What one run holds of every node, and what the run may take besides."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._nodes: dict[str, Node] = {}
        self._half: dict[str, float] = {}  #: node -> half of the most CPUs that were seen free there
        self._grants: dict[tuple[str, int], _Grant] = {}  #: (who, index)

    def see(self, nodes: Iterable[Node]) -> None:
        """Take in the present state of all living nodes."""
        self._nodes = {node.id: node for node in nodes}
        for node in self._nodes.values():
            self._half[node.id] = max(self._half.get(node.id, 0.0), node.free_cpus / 2)

    @property
    def nodes(self) -> list[Node]:
        return list(self._nodes.values())

    def place_of(self, ask: Ask, index: int) -> Place | None:
        """The place of process ``index``; None where the process has none, or its node is gone."""
        place = self.last_place_of(ask, index)
        return place if place and place.node.id in self._nodes else None

    def last_place_of(self, ask: Ask, index: int) -> Place | None:
        """The place that process ``index`` was given last, also on a node that is gone; None where it was given none."""
        grant = self._grants.get((ask.who, index))
        return grant.place if grant else None

    def check_count(self, asks: Sequence[Ask]) -> None:
        """ConfigError for more processes than the CPUs of all nodes can run."""
        cpus = sum(node.cpus for node in self.nodes)
        if (count := sum(ask.count for ask in asks)) > (most := int(PER_CPU * cpus)) and cpus:
            raise ConfigError(f"{count} processes are too many for {cpus:g} cores, which run {most} at most: lower rollout.workers, "
                              "inference.actors or learner.world_size")

    def placed(self, ask: Ask) -> list[Place]:
        """The places that processes of ``ask`` have, in their order."""
        return [place for index in range(ask.count) if (place := self.place_of(ask, index))]

    def reserve(self, asks: Sequence[Ask]) -> None:
        """Share the nodes out among the processes of ``asks`` that have no place yet. Who comes first gets GPUs first, and the CPUs of
        a node are shared evenly. What finds no place stays without one."""
        for room in (self._free_cpus, self._spare_cpus):
            self._reserve(asks, {node.id: room(node) for node in self.nodes})

    def _reserve(self, asks: Sequence[Ask], rooms: Mapping[str, float]) -> None:
        counts: Counter[str] = Counter()
        gpus: defaultdict[str, float] = defaultdict(float)
        found: list[tuple[tuple[str, int], str, float]] = []
        for ask in asks:
            seats = [index for index in range(ask.count) if self.place_of(ask, index) is None]
            ask = self._with_gpus(ask, len(seats), gpus)
            suitable = [node for node in self.nodes if self._suits(node, ask)]
            slots = {node.id: _slots(node, ask.gpus, self._free_gpus(node) - gpus[node.id]) for node in suitable}
            chosen = (_pack if ask.together else self._spread)(len(seats), {i: rooms[i] for i in slots}, slots, counts)
            for index, node in zip(seats, chosen, strict=False):
                counts[node] += 1
                gpus[node] += ask.gpus
                found.append(((ask.who, index), node, ask.gpus))
        for key, node, gpu in found:
            self._grants[key] = _Grant(Place(self._nodes[node], _share(rooms[node], counts[node]), gpu))

    def seat(self, ask: Ask, index: int) -> Place | None:
        """A place for process ``index`` of ``ask``, where there is room now: for the first start, a restart, or a move. The process
        counts as started."""
        before = self._grants.pop((ask.who, index), None)
        aims, have = self._layout(ask), self._have(ask)
        missing = ask.count - sum(have.values())
        wanted = {i: min(_share(room, count) if count else 1.0, self._free_cpus(self._nodes[i])) for i, (count, room) in aims.items()}
        spare = {i: min(1.0, max(half / missing, min(half, LEAST_CPUS))) for i in aims for half in [self._spare_cpus(self._nodes[i])]}
        fits = [i for i in aims if _slots(self._nodes[i], ask.gpus, self._free_gpus(self._nodes[i]))]
        usable, stays = [i for i in fits if wanted[i] >= LEAST_CPUS - _TINY], before.place.node.id if before else ""
        if not usable:
            wanted, usable, aims = spare, [i for i in fits if spare[i] >= LEAST_CPUS - _TINY], dict.fromkeys(aims, (0, 0.0))
        if not usable:
            return None
        node = max(usable, key=lambda i: (have[i] < aims[i][0], wanted[i], not self._nodes[i].gpus, i == stays, -have[i]))
        place = Place(self._nodes[node], _floor(wanted[node]), ask.gpus)
        self._grants[ask.who, index] = _Grant(place, self._clock())
        return place

    def should_move(self, ask: Ask, index: int) -> bool:
        """Whether process ``index`` would have clearly more CPU on another node, beside the other processes of ``ask``."""
        place, aims, have = self.place_of(ask, index), self._layout(ask), self._have(ask)
        if place is None or sum(have.values()) < ask.count:  # empty seats go first
            return False
        crowded = have[place.node.id] > aims.get(place.node.id, (0, 0.0))[0]
        return crowded and any(have[i] < count and min(_share(room, count), self._free_cpus(self._nodes[i])) >= CLEARLY * place.cpus
                               for i, (count, room) in aims.items() if i != place.node.id)

    def started(self, ask: Ask) -> None:
        """All processes of ``ask`` that have a place are started now."""
        for (who, _), grant in self._grants.items():
            if who == ask.who:
                grant.since = self._clock()

    def leave(self, ask: Ask) -> None:
        """The processes of ``ask`` need their places no longer."""
        self._grants = {key: grant for key, grant in self._grants.items() if key[0] != ask.who}

    def empty(self, ask: Ask, index: int) -> None:
        """Process ``index`` of ``ask`` needs its place no longer."""
        self._grants.pop((ask.who, index), None)

    def lack(self, ask: Ask) -> str:
        """What ``ask`` asks for and what there is, in one line; "" when every process has a place."""
        missing = ask.count - len(self.placed(ask))
        return f"a place for {missing} of {ask.count} {ask.who}: {self.asked(ask)}" if missing else ""

    def asked(self, ask: Ask) -> str:
        """What each process of ``ask`` asks for, and what each node has."""
        gpus = f" and {ask.gpus:g} GPUs" if ask.gpus else " and a share of a GPU" if self._with_gpus(ask, 1, Counter()).gpus else ""
        labels = ",".join(f"{key}={value}" for key, value in ask.selector.items())
        where = f" on a node with {ask.section}.nodes = {labels}" if labels else ""
        there = [node.text for node in self.nodes]
        more = f", and {len(there) - NAMED} more nodes" if len(there) > NAMED else ""
        return (f"each asks for {LEAST_CPUS:g} CPUs or more{gpus}{where}, of the half that a run takes of what is free; there is "
                f"{', '.join(there[:NAMED]) or 'no node'}{more}")

    def bundle(self, ask: Ask) -> dict[str, float]:
        """What an autoscaler should bring for one process of ``ask``."""
        gpus = self._with_gpus(ask, 1, Counter()).gpus
        return {"CPU": 1.0, **({"GPU": gpus} if gpus else {})}

    def threads(self, ask: Ask) -> list[int]:
        """CPU threads that each process of ``ask`` can use: those of its node, shared among those of ``ask`` there, less one where this run
        has other processes beside them."""
        have = self._have(ask)
        return [max(1, int(place.node.cpus) // have[place.node.id] - (len(self._on(place.node)) > have[place.node.id]))
                for place in self.placed(ask)]

    # ---------------------------------------------------------------- what there is room for

    def _suits(self, node: Node, ask: Ask) -> bool:
        return node.matches(ask.selector) and (node.gpus > 0 or not (ask.gpus or ask.shares_gpus))

    def _on(self, node: Node) -> list[_Grant]:
        return [grant for grant in self._grants.values() if grant.place.node.id == node.id]

    def _uncounted(self, node: Node) -> list[Place]:
        """Places on ``node`` that Ray's count of what is free does not have yet."""
        return [g.place for g in self._on(node) if g.since is None or self._clock() - g.since < SETTLE_S]

    def _free_cpus(self, node: Node) -> float:
        half = self._half[node.id] - sum(grant.place.cpus for grant in self._on(node))
        return min(half, node.free_cpus - sum(place.cpus for place in self._uncounted(node)))

    def _spare_cpus(self, node: Node) -> float:
        """Half of what is free on ``node`` now, whatever this run has there."""
        return (node.free_cpus - sum(place.cpus for place in self._uncounted(node))) / 2

    def _free_gpus(self, node: Node) -> float:
        return node.free_gpus - sum(place.gpus for place in self._uncounted(node))

    def _have(self, ask: Ask) -> Counter[str]:
        """Node -> processes of ``ask`` there."""
        return Counter(place.node.id for place in self.placed(ask))

    def _layout(self, ask: Ask) -> dict[str, tuple[int, float]]:
        """Node -> (how many processes of ``ask`` belong there, CPUs for them), were all of them placed anew."""
        rooms, slots = {}, {}
        for node in (node for node in self.nodes if self._suits(node, ask)):
            own = [g.place for (who, _), g in self._grants.items() if who == ask.who and g.place.node.id == node.id]
            rooms[node.id] = self._free_cpus(node) + sum(place.cpus for place in own)
            slots[node.id] = _slots(node, ask.gpus, self._free_gpus(node) + sum(place.gpus for place in own))
        chosen = Counter(self._spread(ask.count, rooms, slots, Counter()))
        return {i: (chosen[i], rooms[i]) for i in rooms}

    def _spread(self, count: int, rooms: Mapping[str, float], slots: Mapping[str, int], counts: Counter[str]) -> list[str]:
        """Nodes for ``count`` processes, one after the other: where each gets most CPU beside the ``counts`` that are there; of several
        such nodes one without GPUs, then one with fewer of them, then one with more room."""
        chosen: list[str] = []
        for _ in range(count):
            now = counts + Counter(chosen)
            usable = [i for i in rooms if _share(rooms[i], now[i] + 1) >= LEAST_CPUS - _TINY and chosen.count(i) < slots[i]]
            if not usable:
                break
            chosen.append(max(usable, key=lambda i: (_share(rooms[i], now[i] + 1), not self._nodes[i].gpus, -now[i], rooms[i])))
        return chosen

    def _with_gpus(self, ask: Ask, count: int, taken: Mapping[str, float]) -> Ask:
        """``ask`` with its share of the GPUs left: the largest, at most one, that ``count`` of its processes can have. Where no suitable
        node has GPUs, none is asked for."""
        if not ask.shares_gpus or not count:
            return ask
        nodes = [node for node in self.nodes if self._suits(node, ask)]
        if not nodes:
            return dataclasses.replace(ask, shares_gpus=False)
        left = {node.id: self._free_gpus(node) - taken.get(node.id, 0.0) for node in nodes}
        shares = {min(1.0, int(100 * left[i] / n + _TINY) / 100) for i in left for n in range(1, count + 1)}
        fitting = [share for share in shares if share > 0 and sum(_slots(node, share, left[node.id]) for node in nodes) >= count]
        return dataclasses.replace(ask, gpus=max(fitting, default=1.0))


def _pack(count: int, rooms: Mapping[str, float], slots: Mapping[str, int], counts: Mapping[str, int]) -> list[str]:
    """Nodes for ``count`` processes on as few nodes as possible, the roomiest first; none when not all of them find a place."""
    chosen: list[str] = []
    most = {i: min(slots[i], int(rooms[i] / LEAST_CPUS + _TINY) - counts.get(i, 0)) for i in rooms}
    for node in sorted(rooms, key=lambda i: (min(most[i], count), _share(rooms[i], counts.get(i, 0) + count)), reverse=True):
        chosen += [node] * min(max(0, most[node]), count - len(chosen))
    return chosen if len(chosen) == count else []


def _share(room: float, count: int) -> float:
    """CPUs of each of ``count`` processes that share ``room`` CPUs."""
    return _floor(min(1.0, room / max(1, count)))


def _floor(cpus: float) -> float:
    return int(1e4 * cpus + _TINY) / 1e4  # Ray counts in steps of 0.0001


def _slots(node: Node, gpus: float, free: float) -> int:
    """Processes with ``gpus`` GPUs each that fit into ``free`` GPUs of ``node``. A share below one never lies on two GPUs."""
    if not gpus:
        return 10**6
    return max(0, min(int(free / gpus + _TINY), int(node.gpus) * int(1 / gpus + _TINY) if gpus < 1 else int(node.gpus / gpus + _TINY)))
