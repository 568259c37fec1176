"""Starts a run's processes on the nodes of its Ray cluster; `places.py` says which node, and how much of the node.

No actor is left pending in Ray: what finds no place is not created, the run says what was asked for and what there is, and an autoscaler,
where the cluster has one, is asked for more nodes.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.actor import ActorHandle
from ray.autoscaler.sdk import request_resources
from ray.util.client import ray as ray_client
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cosmos_ray.errors import CosmosRayError
from cosmos_ray.places import Ask, Gang, Node, Place, Places
from cosmos_ray.supervision import Supervisor

logger = logging.getLogger(__name__)

LOOK_S = 1.0  #: between two looks at the cluster's nodes
GANG_S = 5.0  #: for Ray to give a gang the places that were found free; then other places are looked for
GANG_TURN_S = 0.1  #: of which a call waits so long at once
NODE_ID, NODE_GROUP = "ray.io/node-id", "ray.io/node-group"  #: labels of every node, and of those that an autoscaler manages


def cluster_nodes() -> list[Node]:
    """The living nodes of the cluster."""
    if ray_client.is_connected():  # this process is no part of the cluster and cannot read the table itself
        free = ray.get(ray.remote(num_cpus=0)(available_resources_per_node).remote())
    else:
        free = available_resources_per_node()
    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            has, left = node["Resources"], free.get(node["NodeID"], {})
            nodes.append(Node(node["NodeID"], node["NodeManagerAddress"], has.get("CPU", 0.0), left.get("CPU", 0.0), has.get("GPU", 0.0),
                              left.get("GPU", 0.0), dict(node["Labels"] or {})))
    return nodes


class OwnNodeLost(CosmosRayError):
    """The node through which the command is part of its cluster is gone."""


def own_node() -> str:
    """Id of the node through which this process is part of the cluster; "" when the process is none, but a client."""
    return "" if ray_client.is_connected() else ray.get_runtime_context().get_node_id()


def autoscales(nodes: Sequence[Node]) -> bool:
    """Whether an autoscaler manages the cluster, which may bring what is not there now."""
    return any(NODE_GROUP in node.labels for node in nodes)


class Placement:
    """The places of one run's processes."""

    def __init__(self, supervisor: Supervisor):
        self._supervisor, self.places, self._looked, self._own = supervisor, Places(), -LOOK_S, ""
        self.takes: Callable[[str, str], bool] = lambda node, address: True  #: whether a node may be used; the run says so, once it is open
        self._wanted: dict[str, list[tuple[dict[str, float], dict[str, str]]]] = {}  #: who -> bundles and labels that are missing

    def look(self, afresh: bool = False) -> None:
        """Take in the state of the cluster's nodes, if the last look was :data:`LOOK_S` ago, or in any case. OwnNodeLost."""
        if afresh or time.monotonic() - self._looked >= LOOK_S:
            self._own, nodes = self._own or own_node(), cluster_nodes()
            if self._own and self._own not in (node.id for node in nodes):  # nobody could reach this process any more
                raise OwnNodeLost("the Ray node of this command has died, and every process of the run with it: run the same command again "
                                  "to continue, once the cluster is up")
            self.places.see([node for node in nodes if self.takes(node.id, node.address)])
            self._looked = time.monotonic()

    def reserve(self, *asks: Ask) -> None:
        """Share the cluster out among all ``asks`` of a stage. Waits until each of them has the places it needs. ConfigError for more
        processes than the cluster's CPUs can run."""
        self.look()
        if not autoscales(self.places.nodes):
            self.places.check_count(asks)
        self._wait_for(asks, afresh=True)

    def leave(self, ask: Ask) -> None:
        """The processes of ``ask`` need their places no longer."""
        self.places.leave(ask)
        self.wants(ask, 0)

    def crew(self, ask: Ask, make: Callable[[int, dict[str, Any]], ActorHandle]) -> PlacedCrew:
        """Workers for a fleet; ``make(index, options)`` creates the actor of worker ``index`` with these Ray options."""
        return PlacedCrew(self, ask, make)

    def options(self, ask: Ask) -> list[dict[str, Any]]:
        """Ray options of each process of ``ask``, for actors that Ray restarts: on any node with the labels and the room when their own is
        gone.

        Waits for the places that ``ask`` needs, and goes on with those that there are.
        """
        self._wait_for([ask])
        if lack := self.places.lack(ask):
            logger.warning("the run goes on without %s", lack)
        self.places.started(ask)
        labels = {"label_selector": dict(ask.selector)} if ask.selector else {}
        return [{**_options(place, _on(place, soft=True)), **labels} for place in self.places.placed(ask)]

    def gang(self, ask: Ask) -> Callable[[], Gang | None]:
        """Finds places for all processes of ``ask``. A call returns None while they are not there, and says what is missing. Once a gang is
        removed, the next call begins anew; later gangs ask for the GPUs of the first one."""
        found, group, asked = ask, None, 0.0
        places: Sequence[Place] = ()

        def place() -> Gang | None:
            nonlocal found, group, asked, places
            if group is None:
                if not self._find([found]):
                    return None
                places, asked = self.places.placed(found), time.monotonic()
                group = placement_group([_bundle(place) for place in places], strategy="PACK",
                                        bundle_label_selector=[{NODE_ID: place.node.id} for place in places])
            if not group.wait(GANG_TURN_S):
                if time.monotonic() - asked > GANG_S:  # another run was faster
                    remove_placement_group(group)
                    self.places.leave(found)
                    group = None
                return None
            placed, of, group = group, found, None
            self._supervisor.goes_on(of.who)
            self.places.started(of)

            def remove() -> None:
                remove_placement_group(placed)
                self.leave(of)

            options = [_options(place, PlacementGroupSchedulingStrategy(placed, index)) for index, place in enumerate(places)]
            found = dataclasses.replace(ask, gpus=options[0]["num_gpus"], shares_gpus=False)
            return Gang(options, self.places.threads(of), remove)

        return place

    def wants(self, ask: Ask, missing: int) -> None:
        """Ask an autoscaler, where there is one, for room for ``missing`` processes of ``ask``, besides all that is in use now."""
        wanted = [(self.places.bundle(ask), dict(ask.selector))] * missing
        if wanted == self._wanted.get(ask.who, []) or not autoscales(self.places.nodes):
            return
        self._wanted[ask.who] = wanted
        taken = [({"CPU": node.cpus - node.free_cpus, "GPU": node.gpus - node.free_gpus}, {}) for node in self.places.nodes]
        missed = [one for many in self._wanted.values() for one in many]
        self._request([({name: value for name, value in bundle.items() if value > 0}, labels) for bundle, labels in [*taken, *missed]]
                      if missed else [])

    def close(self) -> None:
        """Withdraw what was asked of an autoscaler."""
        if any(self._wanted.values()):
            self._request([])

    # ---------------------------------------------------------------- Ray

    def _wait_for(self, asks: Sequence[Ask], afresh: bool = False) -> None:
        """Find places for ``asks``, for all of them ``afresh`` at every look. Returns once each has the places it needs."""
        while not self._find(asks, afresh):
            time.sleep(LOOK_S)

    def _find(self, asks: Sequence[Ask], afresh: bool = False) -> bool:
        """Whether each of ``asks`` has the places it needs now; says what is missing."""
        self.look()
        for ask in asks if afresh else ():
            self.places.leave(ask)
        self.places.reserve(asks)
        short = [ask for ask in asks if len(self.places.placed(ask)) < ask.needs]
        for ask in asks:
            self.wants(ask, ask.count - len(self.places.placed(ask)))
        if short:
            self._supervisor.waits(asks[0].who, "; ".join(map(self.places.lack, short)))
        else:
            self._supervisor.goes_on(asks[0].who)
        return not short

    @staticmethod
    def _request(bundles: Sequence[tuple[dict[str, float], dict[str, str]]]) -> None:
        request_resources(bundles=[bundle for bundle, _ in bundles if bundle],
                          bundle_label_selectors=[labels for bundle, labels in bundles if bundle])


class PlacedCrew:
    """A :class:`cosmos_ray.rollout.fleet.Crew` whose workers each have a place on a node; they end with their node."""

    def __init__(self, placement: Placement, ask: Ask, make: Callable[[int, dict[str, Any]], ActorHandle]):
        self._placement, self._places, self._ask, self._make = placement, placement.places, ask, make

    def start(self, index: int) -> ActorHandle | None:
        """Start worker ``index`` where there is room now; None where there is none."""
        self._placement.look(afresh=True)  # the worker before may have died with its node, this very moment
        place = self._places.seat(self._ask, index)
        self._placement.wants(self._ask, self._ask.count - len(self._places.placed(self._ask)))
        return None if place is None else self._make(index, _options(place, _on(place, soft=False)))

    def resize(self, count: int) -> None:
        """Have workers 0 to ``count`` - 1 from now on; the places of the others are given back, and they have ended."""
        for index in range(count, self._ask.count):
            self._places.empty(self._ask, index)
        self._ask = dataclasses.replace(self._ask, count=count)
        self._placement.wants(self._ask, count - len(self._places.placed(self._ask)))

    def should_move(self, index: int) -> bool:
        """Whether worker ``index`` would have clearly more CPU on another node."""
        self._placement.look()
        return self._places.should_move(self._ask, index)

    def where(self, index: int) -> str:
        """Node of worker ``index``; while the worker has no place, what it asks for and what each node has."""
        place = self._places.last_place_of(self._ask, index)
        return place.node.name if place else self._places.asked(self._ask)


def _on(place: Place, soft: bool) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(place.node.id, soft=soft)


def _options(place: Place, strategy: Any) -> dict[str, Any]:
    return {"num_cpus": place.cpus, "num_gpus": place.gpus, "scheduling_strategy": strategy}


def _bundle(place: Place) -> dict[str, float]:
    return {"CPU": place.cpus, **({"GPU": place.gpus} if place.gpus else {})}
