"""A fleet on real Ray nodes that join, leave and die: every ticket finishes once, and a worker that moves loses none."""

import logging
import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import ray

from cosmos_ray.placement import Placement
from cosmos_ray.places import Ask
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.rollout.calls import RayCalls
from cosmos_ray.rollout.fleet import Fleet
from cosmos_ray.rollout.ticket import Finished
from cosmos_ray.supervision import Supervisor
from tests.test_replay_episode import make_episode

#: Ray notices a dead raylet within seconds, and one that is merely slow does not look dead.
WATCHFUL = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_timeout_ms": 20000,
            "health_check_failure_threshold": 3}  # fmt: skip
LIMIT_S = 240.0


class Worker:
    """Commits one episode a turn, and notes where."""

    def __init__(self, folder: str):
        self.folder, self.store, self.episodes = Path(folder), ReplayStore(Path(folder) / "replay"), []

    def advance(self, episodes, seconds):
        self.episodes += episodes
        if not self.episodes:
            return []
        time.sleep(0.2)
        episode = self.episodes.pop(0)
        new = self.store.commit(episode)
        with (self.folder / "ran").open("a") as log:
            log.write(f"{episode.key.name} {ray.get_runtime_context().get_node_id()}\n")
        return [Finished(episode.key.name, episode.success, episode.length, "", new, 0.2, 0)]


class Driver:
    """Lives in a process of its own, with a cluster whose head has no room for workers."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        logging.basicConfig(level=logging.WARNING)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": WATCHFUL})
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        self.nodes = [self.join()]

    def join(self):
        return self.cluster.add_node(num_cpus=2)

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()

    def run(self, folder: Path, event: str) -> dict:
        """Run tickets on three workers; ``event`` ("join", "leave", "kill") comes after ten of them, and tickets come until it shows."""
        rows: list[tuple[str, dict]] = []
        supervisor = Supervisor(lambda kind, **values: rows.append((kind, values)))
        placement, ask = Placement(supervisor), Ask("rollout workers", 3)
        actor = ray.remote(max_restarts=0)(Worker)
        crew = placement.crew(ask, lambda index, options: actor.options(**options).remote(str(folder)))
        fleet = Fleet(crew, RayCalls(), 3, 3, lambda episode: (episode.key.name,), 120.0, supervisor, turn_s=0.1)
        wanted, finished = [], []
        happened, until = False, time.monotonic() + LIMIT_S

        def effect() -> bool:
            """What the event is for: the node that joined has run tickets, or the node that is gone has cost a worker."""
            return happened and (self.nodes[-1].node_id in (folder / "ran").read_text() if event == "join" else fleet.replaced > 0)

        while fleet.outstanding or not effect():
            while fleet.outstanding < 12 and not effect():
                wanted.append(make_episode(len(wanted), "rollout", size=8))
                fleet.submit(wanted[-1:])
            finished += fleet.poll(0.2)
            if not happened and len(finished) >= 10:
                happened = True
                self.happen(event)
            assert time.monotonic() < until, f"{fleet.outstanding} tickets never finished"
        fleet.close()
        placement.leave(ask)
        store = ReplayStore(folder / "replay")
        store.refresh()
        return {"finished": sorted(answer.name for answer in finished), "wanted": sorted(episode.key.name for episode in wanted),
                "stored": sorted(store.keys()), "ran": [line.split() for line in (folder / "ran").read_text().splitlines()],
                "deaths": [values for kind, values in rows if kind == "death"], "replaced": fleet.replaced,
                "quarantined": fleet.quarantined, "nodes": [node.node_id for node in self.nodes]}  # fmt: skip

    def happen(self, event: str) -> None:
        if event == "join":
            self.nodes.append(self.join())
        elif event == "leave":
            self.cluster.remove_node(self.nodes.pop(0), allow_graceful=True)
        else:
            self.nodes.append(self.join())
            os.kill(self.nodes.pop(0).all_processes["raylet"][0].process.pid, signal.SIGKILL)


_driver: list[Driver] = []


def _open() -> None:
    _driver.append(Driver())


def _run(folder: Path, event: str) -> dict:
    return _driver[0].run(folder, event)


def _close() -> None:
    _driver[0].close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """``run(event)``, on one cluster for all; its driver is another process, because this one may have a Ray already."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(_open).result(LIMIT_S)
        yield lambda event: process.submit(_run, tmp_path_factory.mktemp(event), event).result(2 * LIMIT_S)
        process.submit(_close).result(LIMIT_S)


def assert_each_once(result: dict) -> None:
    assert result["finished"] == result["wanted"] == result["stored"] and result["quarantined"] == {}


def test_a_node_that_joins_is_used_and_the_workers_that_move_there_lose_no_ticket(run):
    result = run("join")
    assert_each_once(result)
    assert {node for _, node in result["ran"]} == set(result["nodes"]) and len(result["nodes"]) == 2
    assert len(result["ran"]) == len(result["wanted"]) and result["replaced"] == 0


def test_a_node_that_leaves_costs_its_running_tickets_alone(run):
    result = run("leave")
    assert_each_once(result)
    assert 1 <= result["replaced"] <= 3 and len(result["ran"]) <= len(result["wanted"]) + 3 * result["replaced"]
    assert all("its node has died" in death["why"] and "node" in death["who"] for death in result["deaths"])


def test_a_killed_raylet_costs_its_running_tickets_alone(run):
    result = run("kill")
    assert_each_once(result)
    assert result["replaced"] == len(result["deaths"]) >= 1 and result["ran"][-1][1] in result["nodes"]
    assert all("its node has died" in death["why"] for death in result["deaths"])
