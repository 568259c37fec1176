"""Who gets which node, and how much of the node: tables of nodes and asks, without Ray but for what an autoscaler is told."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.experimental.internal_kv import _internal_kv_get

from cosmos_ray.asks import check_cluster, learner_ask, more_actors_ask, pool_ask, workers_ask
from cosmos_ray.config.selector import selector
from cosmos_ray.config.settings import from_values
from cosmos_ray.errors import ConfigError
from cosmos_ray.placement import NODE_GROUP, Placement
from cosmos_ray.places import LEAST_CPUS, Ask, Node, Places
from cosmos_ray.supervision import Supervisor


def node(name: str, cpus: float, free: float | None = None, gpus: float = 0.0, free_gpus: float | None = None, **labels: str) -> Node:
    return Node(name * 3, f"10.0.0.{name}", cpus, cpus if free is None else free, gpus, gpus if free_gpus is None else free_gpus, labels)


class Cluster:
    """Nodes whose free CPUs and GPUs follow what `Places` of several runs take, as Ray's count does once everything has started."""

    def __init__(self, *nodes: Node):
        self.nodes = {n.id: n for n in nodes}
        self.runs: list[Places] = []
        self.now = 0.0

    def run(self) -> Places:
        self.runs.append(Places(lambda: self.now))
        self.look()
        return self.runs[-1]

    def look(self) -> None:
        """An hour later, every run looks again."""
        self.now += 3600
        grants = [g.place for run in self.runs for g in run._grants.values() if g.since is not None]
        left = [dataclasses.replace(n, free_cpus=n.free_cpus - sum(p.cpus for p in grants if p.node.id == n.id),
                                    free_gpus=n.free_gpus - sum(p.gpus for p in grants if p.node.id == n.id)) for n in self.nodes.values()]
        assert all(n.free_cpus >= -1e-6 and n.free_gpus >= -1e-6 for n in left), "more was given than there is"
        for run in self.runs:
            run.see(left)


def start(places: Places, ask: Ask) -> Counter[str]:
    """Node -> workers of ``ask``, all started one after the other."""
    return Counter(place.node.address for i in range(ask.count) if (place := places.seat(ask, i)))


WORKERS = Ask("rollout workers", 3)
#: nodes, workers -> workers per node
SPREADS = {
    "of three workers on two small nodes, none is left out": ((node("1", 2), node("2", 2)), 3, {"10.0.0.1": 2, "10.0.0.2": 1}),
    "more nodes than workers": ((node("1", 8), node("2", 8), node("3", 8)), 2, {"10.0.0.1": 1, "10.0.0.2": 1}),
    "by what is free, not by size": ((node("1", 64, 2), node("2", 8)), 5, {"10.0.0.1": 1, "10.0.0.2": 4}),
    "nodes without GPUs first": ((node("1", 64, gpus=8), node("2", 8)), 4, {"10.0.0.2": 4}),
    "a GPU node too when a worker would get less than a CPU elsewhere": ((node("1", 64, gpus=8), node("2", 2)), 4,
                                                                         {"10.0.0.1": 3, "10.0.0.2": 1}),
    "only where something is free": ((node("1", 4, 0), node("2", 2)), 3, {"10.0.0.2": 3}),
    "as many as find a few hundredths of a CPU": ((node("1", 2, 0.3),), 12, {"10.0.0.1": 9}),
    "a CPU of which a hundredth is free takes none": ((node("1", 2, 0.01),), 2, {}),
    "no node": ((), 2, {}),
}


@pytest.mark.parametrize("nodes, count, expected", SPREADS.values(), ids=SPREADS)
def test_workers_are_spread(nodes, count, expected):
    cluster = Cluster(*nodes)
    places, ask = cluster.run(), dataclasses.replace(WORKERS, count=count)
    places.reserve([ask])
    assert start(places, ask) == expected
    cluster.look()
    assert all(place.cpus >= LEAST_CPUS for place in places.placed(ask))
    assert bool(places.lack(ask)) == (sum(expected.values()) < count)


def test_a_run_takes_half_of_what_is_free_and_each_process_one_cpu_at_most():
    cluster = Cluster(node("1", 2), node("2", 16))
    places = cluster.run()
    start(places, WORKERS)
    assert sorted((p.node.address, p.cpus) for p in places.placed(WORKERS)) == [("10.0.0.1", 1.0), ("10.0.0.2", 1.0), ("10.0.0.2", 1.0)]


@pytest.mark.parametrize("runs", range(2, 5))
def test_several_runs_at_once_all_find_room(runs):
    cluster = Cluster(node("1", 2), node("2", 2))
    for _ in range(runs):
        places = cluster.run()
        asks = [pool_ask(from_values({})), workers_ask(from_values({}), 2)]
        places.reserve(asks)
        for ask in asks:
            places.started(ask)
            assert not places.lack(ask)
        cluster.look()


def test_two_runs_that_look_in_the_same_instant_both_fit():
    cluster = Cluster(node("1", 2))
    runs = [cluster.run(), cluster.run()]
    for places in runs:
        assert sum(start(places, WORKERS).values()) == 3
    cluster.look()  # nothing was given twice


def test_pool_and_learner_take_gpus_and_the_learner_shares_what_the_pool_leaves():
    cluster = Cluster(node("1", 8), node("2", 16, gpus=2), node("3", 16, gpus=2))
    config = from_values({"inference.gpus": 0.5, "inference.actors": 2, "learner.world_size": 2, "learner.batch_size": 8})
    asks = [pool_ask(config), learner_ask(config.learner), workers_ask(config, 2)]
    places = cluster.run()
    places.reserve(asks)
    pool, ranks, workers = map(places.placed, asks)
    assert [(p.node.address, p.gpus) for p in pool] == [("10.0.0.2", 0.5), ("10.0.0.3", 0.5)], "spread over the GPU nodes"
    assert [p.gpus for p in ranks] == [1.0, 1.0] and {p.node.address for p in ranks} <= {"10.0.0.2", "10.0.0.3"}
    assert [p.node.address for p in workers] == ["10.0.0.1", "10.0.0.1"]


#: GPUs of the one node, of a pool actor, and learner ranks -> GPUs of each rank
SHARES = [(1, 0.3, 1, 0.7), (1, 0.3, 2, 0.35), (2, 0.3, 6, 0.28), (8, 1, 4, 1.0), (0, 0, 2, 0.0)]


@pytest.mark.parametrize("gpus, pool, ranks, share", SHARES)
def test_learner_ranks_share_the_gpus_evenly(gpus, pool, ranks, share):
    config = from_values({"inference.gpus": float(pool), "learner.world_size": ranks, "learner.batch_size": 12})
    places, asks = Cluster(node("1", 16, gpus=gpus)).run(), [pool_ask(config), learner_ask(config.learner)]
    places.reserve(asks)
    assert [p.gpus for p in places.placed(asks[1])] == [pytest.approx(share)] * ranks


def test_a_gang_finds_places_for_all_of_it_on_few_nodes_or_for_none():
    places, gang = Cluster(node("1", 8), node("2", 8, gpus=2), node("3", 8, gpus=3)).run(), Ask("ranks", 3, "learner", 1.0, together=True)
    places.reserve([gang])
    assert [p.node.address for p in places.placed(gang)] == ["10.0.0.3"] * 3
    places, gang = Cluster(node("1", 8, gpus=2, free_gpus=1)).run(), Ask("ranks", 2, "learner", 1.0, together=True)
    places.reserve([gang])
    assert places.placed(gang) == []


def test_threads_are_those_of_the_rank_s_own_node():
    places, gang = Cluster(node("1", 4, gpus=1), node("2", 16, gpus=1)).run(), Ask("ranks", 2, "learner", 1.0, together=True)
    places.reserve([gang])
    assert sorted(places.threads(gang)) == [4, 16]
    alone = Cluster(node("1", 2)).run()
    ask, workers = Ask("ranks", 1, "learner", together=True), WORKERS
    alone.reserve([ask])
    assert alone.threads(ask) == [2]
    alone.leave(ask)
    alone.reserve([ask, workers])
    assert alone.threads(ask) == [1], "one is left to what else runs there"


def test_a_worker_of_a_node_that_died_starts_elsewhere_and_a_joining_node_relieves_the_others():
    cluster = Cluster(node("1", 2), node("2", 2))
    places = cluster.run()
    start(places, WORKERS)
    lost = [i for i in range(3) if places.place_of(WORKERS, i).node.address == "10.0.0.1"]
    del cluster.nodes["111"]
    cluster.look()
    assert [i for i in range(3) if places.place_of(WORKERS, i) is None] == lost
    assert places.last_place_of(WORKERS, lost[0]).node.address == "10.0.0.1"
    assert all(places.seat(WORKERS, i).node.address == "10.0.0.2" for i in lost)
    cluster.look()
    assert not any(places.should_move(WORKERS, i) for i in range(3))
    cluster.nodes["333"] = node("3", 8)
    moves = 0
    for _ in range(20):
        cluster.look()
        movers = [i for i in range(3) if places.should_move(WORKERS, i)]
        if not movers:
            break
        assert places.seat(WORKERS, movers[0]).node.address == "10.0.0.3"
        moves += 1
    assert 1 <= moves <= 2, "moving comes to an end"
    assert {p.node.address for p in places.placed(WORKERS)} == {"10.0.0.2", "10.0.0.3"}


def test_what_finds_no_place_is_said_with_what_is_asked_and_what_there_is():
    cluster = Cluster(node("1", 2, 0), node("2", 4, 0, gpus=1, zone="a"))
    places, ask = cluster.run(), workers_ask(from_values({"rollout.nodes": "zone=a"}), 2)
    assert places.seat(ask, 0) is None
    assert places.lack(ask) == (
        "a place for 2 of 2 rollout workers: each asks for 0.03 CPUs or more on a node with rollout.nodes = zone=a, of the half that a run "
        "takes of what is free; there is node 10.0.0.1 (111) with 0 of 2 CPUs free, node 10.0.0.2 (222) with 0 of 4 CPUs and 1 of 1 GPUs "
        "free")
    cluster.nodes["222"] = node("2", 4, 1, gpus=1, zone="a")
    cluster.look()
    assert places.seat(ask, 0).node.address == places.seat(ask, 1).node.address == "10.0.0.2"
    assert places.lack(ask) == ""


def test_more_processes_than_the_cpus_can_run_are_refused_before_they_start():
    places = Cluster(node("1", 2)).run()
    places.check_count([dataclasses.replace(WORKERS, count=32)])
    with pytest.raises(ConfigError, match=r"33 processes are too many for 2 cores, which run 32 at most: lower rollout\.workers"):
        places.check_count([dataclasses.replace(WORKERS, count=30), WORKERS])


def test_labels_are_read_and_those_that_no_node_has_are_refused():
    assert selector("rollout.nodes", " zone=a, ray.io/market-type=spot ") == {"zone": "a", "ray.io/market-type": "spot"}
    for text in ("zone", "=a", "zone=", "zone=in(a b)"):
        with pytest.raises(ConfigError, match="rollout.nodes = .* is not a list of labels"):
            selector("rollout.nodes", text)
    nodes = [node("1", 2, zone="a"), node("2", 2)]
    for where in ("zone=a", ""):
        check_cluster(from_values({"rollout.nodes": where}), nodes, acts=True, learns=True, simulates=True, private=False)
    config = from_values({"rollout.nodes": "zone=b", "learner.nodes": "disk=ssd"})
    check_cluster(config, nodes, acts=True, learns=False, simulates=False, private=False)
    with pytest.raises(ConfigError, match="rollout.nodes = 'zone=b' fits none of the cluster's 2 nodes, they have zone=a: give a node"):
        check_cluster(config, nodes, acts=True, learns=False, simulates=True, private=False)
    with pytest.raises(ConfigError, match="learner.nodes = 'disk=ssd' fits none .*, none has a label disk: "):
        check_cluster(config, nodes, acts=False, learns=True, simulates=False, private=False)


def test_gpus_on_nodes_without_the_label_do_not_count():
    config = from_values({"inference.gpus": 1.0, "inference.nodes": "zone=a"})
    with pytest.raises(ConfigError, match="asks for 1 GPUs, Ray has 0"):
        check_cluster(config, [node("1", 2, zone="a"), node("2", 2, gpus=4)], acts=True, learns=False, simulates=False, private=False)


def test_an_autoscaler_is_asked_for_what_is_in_use_and_what_is_missing_until_it_is_there(local_ray):
    def requested() -> list[dict[str, float]]:
        return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "[]")

    placement, ask = Placement(Supervisor()), Ask("inference actors", 2, "inference", gpus=0.5)
    placement.places.see([node("1", 4, 1, **{"zone": "a"})])
    placement.wants(ask, 2)
    assert requested() == [], "nobody would hear it"
    placement.places.see([node("1", 4, 1, **{NODE_GROUP: "workers"})])
    placement.wants(ask, 2)
    assert requested() == [{"CPU": 3}, {"CPU": 1, "GPU": 0.5}, {"CPU": 1, "GPU": 0.5}]
    placement.wants(ask, 0)
    assert requested() == []
    placement.wants(ask, 1)
    assert len(requested()) == 2
    placement.close()
    assert requested() == [], "the command's end withdraws it"


def test_room_for_further_actors_is_taken_and_given_back_one_by_one(local_ray):
    placement, ask = Placement(Supervisor()), more_actors_ask(from_values({"inference.max_actors": 3}))
    crew = placement.crew(ask, lambda index, options: (index, options["num_cpus"]))
    crew.resize(1)
    index, cpus = crew.start(0)
    assert index == 0 and cpus > 0
    crew.resize(2)
    assert crew.start(1)[0] == 1
    taken = [placement.places.last_place_of(ask, index) is not None for index in range(2)]
    crew.resize(1)
    assert taken == [True, True] and placement.places.last_place_of(ask, 1) is None and placement.places.last_place_of(ask, 0)
    placement.leave(ask)
    assert placement.places.last_place_of(ask, 0) is None
