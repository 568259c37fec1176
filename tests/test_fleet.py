"""The fleet: every ticket finishes once, whatever happens to the workers."""

from collections import Counter
from dataclasses import dataclass

import pytest
import ray

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.format.episode import Episode
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.rollout.calls import RayCalls
from cosmos_ray.rollout.fleet import Fleet, WorkerTrouble
from cosmos_ray.supervision import Supervisor
from tests.anywhere import Anywhere
from tests.test_replay_episode import make_episode


@dataclass(frozen=True)
class Job:
    """An episode to commit, and what goes wrong before (or after) that."""

    episode: Episode
    trouble: str = ""  #: "kill once", "kill after commit", "hang once", "store error", "raise", "poison"

    @property
    def name(self) -> str:
        return self.episode.key.name


@pytest.fixture
def fleets(local_ray, tmp_path):
    """``make(workers, capacity, ...)`` starts a fleet of real actors that commit to the store in ``tmp_path``."""

    @ray.remote(num_cpus=0.2, max_restarts=0)
    class Worker:
        def __init__(self, root: str, breaks: bool):
            if breaks:
                raise OSError("no simulator here")
            self.store, self.root, self.tickets = ReplayStore(root), root, []

        def advance(self, tickets, seconds):
            """One ticket per turn, oldest first."""
            import os
            import signal
            import time
            from pathlib import Path

            from cosmos_ray.rollout.ticket import Finished

            self.tickets += tickets
            if not self.tickets:
                return []
            job = self.tickets.pop(0)
            first = not (mark := Path(self.root).parent / f"{job.name}.tried").exists()
            mark.touch()
            with open(Path(self.root).parent / "attempts.log", "a") as log:
                log.write(job.name + "\n")
            if job.trouble == "poison" or (first and job.trouble == "kill once"):
                os.kill(os.getpid(), signal.SIGKILL)
            if first and job.trouble == "hang once":
                time.sleep(3600)
            if job.trouble == "store error":
                raise StoreError("cannot commit an episode to /full: no space left on device")
            if job.trouble == "raise":
                raise ZeroDivisionError("a bug")
            new = self.store.commit(job.episode)
            if first and job.trouble == "kill after commit":
                os.kill(os.getpid(), signal.SIGKILL)
            return [Finished(job.name, job.episode.success, job.episode.length, "", new, 0.0, 0)]

        def pid(self):
            import os

            return os.getpid()

    made = []

    def make(workers: int, capacity: int, deadline_s: float = 120.0, breaks: bool = False) -> Fleet:
        crew = Anywhere(lambda i: Worker.remote(str(tmp_path / "replay"), breaks))
        made.append(Fleet(crew, RayCalls(), workers, capacity, lambda job: (job.name,), deadline_s, Supervisor(), turn_s=0.1))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()


def jobs(count: int, **troubles: str) -> list[Job]:
    """``count`` jobs; ``_3="kill once"`` gives number 3 its trouble."""
    return [Job(make_episode(seed, "rollout", size=8), troubles.get(f"_{seed}", "")) for seed in range(count)]


def run(fleet: Fleet, polls: int = 3000) -> list:
    finished = []
    for _ in range(polls):
        if not fleet.outstanding:
            return finished
        finished += fleet.poll(timeout=0.2)
    raise AssertionError(f"{fleet.outstanding} tickets never finished")


def committed(tmp_path) -> list[str]:
    store = ReplayStore(tmp_path / "replay")
    store.refresh()
    return store.keys()


def assert_each_once(finished: list, expected: list[Job], tmp_path) -> None:
    names = sorted(job.name for job in expected)
    assert sorted(f.name for f in finished) == names == committed(tmp_path)


def test_every_ticket_finishes_once(fleets, tmp_path):
    fleet, work = fleets(2, 2), jobs(9)
    assert fleet.capacity == 4 and fleet.outstanding == 0 and fleet.poll(0.1) == []
    fleet.submit(work[:5])
    finished = fleet.poll(timeout=5.0)
    fleet.submit(work[5:])
    assert fleet.outstanding == 9 - len(finished)
    assert_each_once(finished + run(fleet), work, tmp_path)
    assert (fleet.replaced, fleet.quarantined) == (0, {})


def test_the_tickets_of_a_worker_killed_before_its_commit_run_again(fleets, tmp_path):
    fleet, work = fleets(2, 2), jobs(6, _0="kill once", _3="kill once")
    fleet.submit(work)
    finished = run(fleet)
    assert_each_once(finished, work, tmp_path)
    assert all(f.new for f in finished) and fleet.replaced == 2 and not fleet.quarantined


def test_an_episode_committed_by_a_worker_that_died_before_saying_so_counts_once(fleets, tmp_path):
    fleet, work = fleets(2, 1), jobs(4, _1="kill after commit")
    fleet.submit(work)
    finished = run(fleet)
    assert_each_once(finished, work, tmp_path)
    assert [f.name for f in finished if not f.new] == [work[1].name] and fleet.replaced == 1


def test_a_hung_worker_is_replaced_and_its_tickets_run_again(fleets, tmp_path):
    fleet, work = fleets(1, 3, deadline_s=3.0), jobs(3, _1="hang once")
    fleet.submit(work)
    assert_each_once(run(fleet), work, tmp_path)
    assert fleet.replaced >= 1 and not fleet.quarantined


def test_an_error_raised_on_purpose_is_raised_as_itself(fleets):
    fleet = fleets(1, 1)
    fleet.submit(jobs(2, _0="store error"))
    with pytest.raises(StoreError) as caught:
        run(fleet)
    assert str(caught.value) == "cannot commit an episode to /full: no space left on device"
    assert type(caught.value) is StoreError and fleet.replaced == 0


def test_a_bug_in_a_worker_is_not_swallowed(fleets):
    fleet = fleets(1, 1)
    fleet.submit(jobs(1, _0="raise"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run(fleet)


@pytest.mark.parametrize("workers, capacity, poison", [(1, 4, 0), (2, 3, 2)])
def test_a_poison_ticket_is_quarantined_and_all_others_finish(fleets, tmp_path, workers, capacity, poison):
    fleet, work = fleets(workers, capacity), jobs(6, **{f"_{poison}": "poison"})
    fleet.submit(work)
    finished = run(fleet)
    # three times alone; a time in company is half a strike
    assert list(fleet.quarantined) == [work[poison].name] and fleet.replaced in (3, 4)
    assert "Worker unexpectedly exits" in fleet.quarantined[work[poison].name]
    assert_each_once(finished, work[:poison] + work[poison + 1 :], tmp_path)
    assert Counter((tmp_path / "attempts.log").read_text().split())[work[poison].name] == fleet.replaced


def test_workers_that_cannot_start_are_reported_not_respawned_for_ever(fleets, monkeypatch):
    monkeypatch.setattr("cosmos_ray.rollout.fleet.WORKER_STARTS", 1)  # test_fleet_core has the number
    fleet = fleets(1, 1, breaks=True)
    fleet.submit(jobs(12))
    with pytest.raises(WorkerTrouble, match="none of the present ones has answered") as caught:
        run(fleet)
    assert len(str(caught.value).splitlines()) == 1
