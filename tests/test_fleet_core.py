"""The fleet without Ray: on a clock of its own, with nodes that come and go and workers that break as a script says."""

import random
from collections import Counter

import pytest

from cosmos_ray.errors import ConfigError, SimulationError
from cosmos_ray.rollout.fleet import Fleet, WorkerTrouble
from cosmos_ray.supervision import PROBE_S, TICKET_ATTEMPTS, WORKER_START_S, WORKER_STARTS_S, Supervisor
from tests.scripted_cluster import GONE, START_S, Cluster


def make(cluster, count=2, capacity=2, deadline_s=60.0):
    rows = []
    supervisor = Supervisor(lambda kind, **values: rows.append((kind, values)), cluster.clock)
    fleet = Fleet(cluster, cluster, count, capacity, lambda ticket: (ticket,), deadline_s, supervisor, clock=cluster.clock)
    return fleet, supervisor, rows


def names(count):
    return [f"t{i}" for i in range(count)]


def run(fleet, cluster, finished=(), until=3600.0):
    finished = [*finished]
    while fleet.outstanding:
        finished += fleet.poll(0.5)
        assert cluster.now < until, f"{fleet.outstanding} tickets never finished"
    return finished


def poll_until(fleet, cluster, condition, limit=600.0):
    finished = []
    while not condition():
        before = cluster.now
        finished += fleet.poll(0.5)
        cluster.now += 0.0 if cluster.now > before else 0.5
        assert cluster.now < limit
    return finished


def assert_once(finished, expected):
    assert sorted(f.name for f in finished) == sorted(expected)


def test_a_worker_gets_tickets_once_it_has_answered_and_not_before():
    cluster = Cluster(a=2)
    fleet, _, _ = make(cluster)
    fleet.submit(names(8))
    poll_until(fleet, cluster, lambda: cluster.now >= START_S - 1)
    assert not any(w.tickets for w in cluster.workers.values()) and fleet.outstanding == 8
    assert_once(run(fleet, cluster), names(8))
    assert cluster.now < START_S + 10  # both started at the same time, and shared the work


def test_tickets_that_come_one_by_one_go_round_all_workers():
    cluster = Cluster(a=1, b=1)
    fleet, _, _ = make(cluster)
    poll_until(fleet, cluster, lambda: all(w.started for w in cluster.workers.values()) and len(cluster.workers) == 2)
    worked = []
    for name in names(6):
        fleet.submit([name])
        fleet.poll(0.0)
        worked += [worker.index for worker in cluster.workers.values() if name in worker.tickets]
        run(fleet, cluster)
    assert Counter(worked) == {0: 3, 1: 3}


def test_a_worker_that_never_answers_holds_nothing():
    cluster = Cluster(a=1, b=1)
    cluster.silent.add("b")
    fleet, supervisor, _ = make(cluster)
    fleet.submit(names(6))
    finished = poll_until(fleet, cluster, lambda: supervisor.waiting and cluster.now > START_S + 2)
    assert supervisor.waiting["starting rollout workers"][0] == "the first answer of 1 of 2 (b)"
    assert_once(run(fleet, cluster, finished, until=START_S + 20), names(6))
    fleet.submit(names(1))
    poll_until(fleet, cluster, lambda: fleet.replaced, limit=WORKER_START_S + 10)


def test_the_run_goes_on_with_the_workers_that_found_a_place_and_uses_a_node_that_joins():
    cluster = Cluster(a=1)
    fleet, supervisor, rows = make(cluster, count=3)
    fleet.submit(names(60))
    finished = poll_until(fleet, cluster, lambda: cluster.now > START_S + 5)
    assert finished
    assert supervisor.waiting["rollout workers"][0] == "a place for 2 of 3 (1 CPU each; free: {'a': 1})"
    cluster.places["b"] = 5
    joined = cluster.now
    finished += poll_until(fleet, cluster, lambda: len(cluster.workers) == 3)
    assert cluster.now - joined <= PROBE_S + 1
    finished += poll_until(fleet, cluster, lambda: all(w.tickets for w in cluster.workers.values()))
    assert cluster.now - joined <= PROBE_S + START_S + 2
    assert_once(run(fleet, cluster, finished), names(60))
    assert {values["who"] for kind, values in rows} == {"starting rollout workers", "rollout workers"} and fleet.replaced == 0


def test_a_fleet_without_any_place_waits_says_so_and_begins_when_there_is_one():
    cluster = Cluster()
    fleet, supervisor, rows = make(cluster)
    fleet.submit(names(4))
    poll_until(fleet, cluster, lambda: cluster.now > 100)
    assert supervisor.waiting["rollout workers"][1] > 90 and fleet.outstanding == 4
    cluster.places["a"] = 2
    assert_once(run(fleet, cluster), names(4))
    assert ("wait", "rollout workers") in [(kind, values["who"]) for kind, values in rows]


def test_crowded_workers_move_to_a_node_that_joins_one_at_a_time_and_lose_no_ticket():
    cluster = Cluster(a=4)
    fleet, _, _ = make(cluster, count=4)
    fleet.submit(names(200))
    finished = poll_until(fleet, cluster, lambda: cluster.now > START_S + 2)
    cluster.places = {"b": 2, "a": 4}
    most = 0
    while fleet.outstanding > 40:
        finished += fleet.poll(0.5)
        most = max(most, sum(not w.started for w in cluster.workers.values()))
    assert Counter(w.node for w in cluster.workers.values()) == {"a": 2, "b": 2} and most == 1
    assert_once(run(fleet, cluster, finished), names(200))
    assert set(cluster.attempts.values()) == {1} and fleet.replaced == 0


def test_a_node_that_leaves_costs_its_running_tickets_alone_and_they_start_again_at_once():
    cluster = Cluster(a=1, b=1)
    fleet, _, rows = make(cluster)
    fleet.submit(names(20))
    finished = poll_until(fleet, cluster, lambda: cluster.now > START_S + 2)
    cluster.silent.add("b")  # Ray says nothing yet
    finished += fleet.poll(0.5)
    held = len(cluster.workers[1].tickets)
    del cluster.places["b"]
    left = cluster.now
    finished += poll_until(fleet, cluster, lambda: fleet.replaced)
    assert held and cluster.now - left <= PROBE_S + 1
    assert_once(run(fleet, cluster, finished), names(20))
    deaths = [values for kind, values in rows if kind == "death"]
    assert [death["who"] for death in deaths] == ["rollout worker 1 on b"] and deaths[0]["why"] == GONE


def test_nodes_that_leave_again_and_again_quarantine_nothing():
    cluster = Cluster(a=1)
    fleet, _, _ = make(cluster, count=1)
    fleet.submit(names(2))
    for old, new in zip("abcdefg", "bcdefgh", strict=True):
        poll_until(fleet, cluster, lambda: cluster.workers[0].started)
        cluster.silent.add(old)
        poll_until(fleet, cluster, lambda: len(cluster.workers[0].tickets) == 2)
        cluster.places = {new: 1}
        poll_until(fleet, cluster, lambda new=new: cluster.workers[0].node == new)
    assert_once(run(fleet, cluster), names(2))
    assert fleet.quarantined == {} and fleet.replaced == 7


def test_a_silent_worker_is_said_then_replaced():
    cluster = Cluster(a=1)
    fleet, supervisor, _ = make(cluster, count=1)
    fleet.submit(names(4))
    poll_until(fleet, cluster, lambda: cluster.workers[0].started)
    cluster.silent.add("a")
    poll_until(fleet, cluster, lambda: supervisor.waiting)
    assert supervisor.waiting["rollout worker 0"][0] == "an answer on 2 tickets from a"
    poll_until(fleet, cluster, lambda: fleet.replaced)
    cluster.silent.clear()
    poll_until(fleet, cluster, lambda: not fleet.outstanding)
    assert not supervisor.waiting


def test_a_worker_that_died_while_the_driver_was_busy_dies_once():
    cluster = Cluster(a=1)
    fleet, _, rows = make(cluster, count=1)
    fleet.submit(names(4))
    poll_until(fleet, cluster, lambda: cluster.workers[0].tickets)
    fleet.poll(0.0)
    cluster.workers[0].dead = "killed"
    cluster.now += 100
    assert fleet.poll(0.0) == [] and fleet.replaced == len([kind for kind, _ in rows if kind == "death"]) == 1
    assert_once(run(fleet, cluster), names(4))


def test_a_worker_says_itself_what_it_waits_for():
    cluster = Cluster(a=1)
    fleet, supervisor, rows = make(cluster, count=1)
    fleet.submit(names(3))
    poll_until(fleet, cluster, lambda: cluster.workers[0].started)
    cluster.words[0] = "the store /data: no space left"
    poll_until(fleet, cluster, lambda: cluster.now > START_S + 100)
    assert supervisor.waiting["rollout worker 0"][0] == "the store /data: no space left" and fleet.replaced == 0
    cluster.words.clear()
    assert_once(run(fleet, cluster), names(3))
    assert rows[-1][0] == "wait" and rows[-1][1]["seconds"] > 70


def test_a_ticket_that_kills_its_workers_is_quarantined_and_its_neighbours_are_not():
    cluster = Cluster(a=1)
    cluster.fatal.add("t1")
    fleet, _, rows = make(cluster, count=1, capacity=4)
    fleet.submit(names(8))
    finished = run(fleet, cluster)
    assert_once(finished, [n for n in names(8) if n != "t1"])
    assert fleet.quarantined == {"t1": "segmentation fault"} and cluster.most["t1"] == 0
    assert cluster.attempts["t1"] == len([kind for kind, _ in rows if kind == "death"]) == 4  # twice in company, half a strike each


def test_killed_workers_cost_no_ticket():
    """Whoever kills a worker every few turns hits some tickets more than once."""
    cluster = Cluster(a=2)
    fleet, _, rows = make(cluster, count=2, capacity=4)
    fleet.submit(names(300))
    finished, kills = [], 0
    while fleet.outstanding:
        finished += fleet.poll(0.5)
        busy = [w for w in cluster.workers.values() if len(w.tickets) > 1]
        if cluster.now > START_S + 30 * kills and busy:
            busy[kills % len(busy)].dead = "killed"
            kills += 1
    assert_once(finished, names(300))
    assert kills > 5 and fleet.quarantined == {} and fleet.replaced == kills == len([kind for kind, _ in rows if kind == "death"])


def test_a_broken_simulator_costs_its_ticket_alone_and_three_quarantine_it_with_the_reason():
    cluster = Cluster(a=1)
    cluster.broken["t2"] = "SIGSEGV in mj_step"
    fleet, _, _ = make(cluster, count=1, capacity=3)
    fleet.submit(names(6))
    finished = run(fleet, cluster)
    assert_once(finished, [n for n in names(6) if n != "t2"])
    assert fleet.quarantined == {"t2": "SIGSEGV in mj_step"} and cluster.attempts["t2"] == TICKET_ATTEMPTS and fleet.replaced == 0


def test_when_most_tickets_break_the_fleet_gives_up():
    cluster = Cluster(a=1)
    cluster.broken = dict.fromkeys(names(20), "the gripper has no fingers")
    fleet, _, _ = make(cluster, count=1)
    fleet.submit(names(20))
    with pytest.raises(SimulationError, match="4 initial states broke the simulator and 0 did not; .*the gripper has no fingers"):
        run(fleet, cluster)


@pytest.mark.parametrize("count, trouble, died, why", [(2, "no_start", 12, "no simulator"), (1, "silent", 6, "no answer for 240 s")])
def test_workers_that_never_start_are_reported_not_respawned_for_ever(count, trouble, died, why):
    cluster = Cluster(a=count)
    getattr(cluster, trouble).add("a")
    fleet, _, _ = make(cluster, count)
    fleet.submit(names(3))
    with pytest.raises(WorkerTrouble, match=f"died {died} times and none of the present ones has answered: {why}"):
        run(fleet, cluster)


def test_a_node_where_no_worker_starts_does_not_stop_the_others():
    cluster = Cluster(a=1, b=1)
    cluster.no_start.add("b")
    fleet, supervisor, _ = make(cluster)
    fleet.submit(names(400))
    finished = poll_until(fleet, cluster, lambda: "rollout workers" in supervisor.waiting and supervisor.waiting["rollout workers"][1] > 10)
    assert supervisor.waiting["rollout workers"][0] == "a place for 1 of 2 (no simulator)" and fleet.replaced == 11
    cluster.no_start.clear()
    assert_once(run(fleet, cluster, finished), names(400))
    poll_until(fleet, cluster, lambda: cluster.workers[1].started, limit=WORKER_STARTS_S + 100)  # tried again when the budget allows


def test_a_fleet_that_is_closed_waits_for_nothing():
    cluster = Cluster(a=1)
    fleet, supervisor, _ = make(cluster, count=2)
    fleet.submit(names(4))
    poll_until(fleet, cluster, lambda: cluster.now > 15)
    assert set(supervisor.waiting) == {"rollout workers", "starting rollout workers"}
    fleet.close()
    assert not supervisor.waiting and fleet.outstanding == 0 and cluster.workers[0].dead == "stopped"


def test_a_node_that_joins_without_what_a_worker_needs_does_not_end_the_run():
    cluster = Cluster(a=1)
    cluster.refusing.add("b")
    fleet, _, rows = make(cluster)
    fleet.submit(names(60))
    finished = poll_until(fleet, cluster, lambda: cluster.now > START_S + 2)
    cluster.places["b"] = 1
    assert_once(run(fleet, cluster, finished), names(60))
    assert {(values["who"], values["why"]) for kind, values in rows if kind == "death"} == {("rollout worker 1 on b", "no OpenGL here")}
    cluster.refusing.add("a")  # every worker refuses, or one that worked before
    fleet.submit(names(1))
    with pytest.raises(ConfigError, match="no OpenGL here"):
        run(fleet, cluster)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_every_ticket_finishes_once_or_is_quarantined(seed):
    """Nodes come and go, workers are killed or fall silent, some tickets kill their workers and some break their simulators."""
    rng = random.Random(seed)
    cluster = Cluster(n0=3)
    fleet, _, rows = make(cluster, count=rng.randint(1, 4), capacity=rng.randint(1, 4))
    cluster.fatal, cluster.broken = set(rng.sample(names(150), 2)), {f"t{rng.randrange(150)}": "no contact"}
    fleet.submit(names(150))
    finished, at, kills = [], START_S, 0
    while fleet.outstanding:
        finished += fleet.poll(0.5)
        assert cluster.now < 6000
        if cluster.now < at:
            continue
        at = cluster.now + rng.uniform(5, 40)
        node = rng.choice([*cluster.places, ""])
        cluster.silent.clear()
        match rng.randrange(5):
            case 0:
                cluster.places[f"n{len(cluster.calls)}"] = rng.randint(1, 3)
            case 1 if len(cluster.places) > 1:
                del cluster.places[node or next(iter(cluster.places))]
            case 2:
                cluster.silent.add(node)
            case 3 if kills < 4:  # by hand: a ticket that is alone each time would be suspect
                busy = [w for w in cluster.workers.values() if len(w.tickets) > 1]
                for worker in busy[:1]:
                    worker.dead, kills = "killed", kills + 1
    bad = cluster.fatal | set(cluster.broken)
    assert_once(finished, [name for name in names(150) if name not in bad])
    assert set(fleet.quarantined) == bad and len([kind for kind, _ in rows if kind == "death"]) == fleet.replaced
    assert all(w.dead or not w.tickets for w in cluster.workers.values())


def test_an_idle_fleet_does_not_wait():
    cluster = Cluster(a=2)
    fleet, supervisor, _ = make(cluster)
    assert fleet.capacity == 4 and fleet.poll(5.0) == [] and cluster.now == 0 and not supervisor.waiting
