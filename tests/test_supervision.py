"""What is said about waits and deaths, and how many restarts there are."""

import pytest

from cosmos_ray.supervision import SAY_AFTER_S, SAY_EVERY_S, RestartBudget, Supervisor


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def rows():
    return []


@pytest.fixture
def supervisor(clock, rows):
    return Supervisor(lambda kind, **values: rows.append((kind, values)), clock)


def test_a_wait_of_more_than_ten_seconds_says_what_it_waits_for(supervisor, clock, rows, caplog):
    supervisor.waits("learner", "a free CPU on any node")
    clock.now += SAY_AFTER_S - 0.1
    supervisor.waits("learner", "a free CPU on any node")
    assert not caplog.messages
    clock.now += 0.2
    supervisor.waits("learner", "a free CPU on node A")
    supervisor.waits("learner", "a free CPU on node A")
    assert caplog.messages == ["learner: waiting for a free CPU on node A, 10 s so far"]
    clock.now += SAY_EVERY_S
    supervisor.waits("learner", "a free CPU on node A")
    assert caplog.messages[1:] == ["learner: waiting for a free CPU on node A, 40 s so far"]
    assert supervisor.waiting == {"learner": ("a free CPU on node A", pytest.approx(SAY_AFTER_S + SAY_EVERY_S + 0.1))}
    supervisor.goes_on("learner")
    assert supervisor.waiting == {} and rows == [("wait", {"who": "learner", "on": "a free CPU on node A", "seconds": 40.1})]


def test_a_short_wait_is_not_worth_a_word(supervisor, clock, rows, caplog):
    supervisor.waits("worker 1", "its first answer")
    clock.now += 5
    supervisor.goes_on("worker 1")
    supervisor.goes_on("worker 2")
    assert not caplog.messages and not rows


def test_a_death_is_said_and_recorded(supervisor, rows, caplog):
    supervisor.died("rollout worker 1", "killed by signal 9", "2 tickets run again")
    assert caplog.messages == ["rollout worker 1 died (killed by signal 9): 2 tickets run again"]
    assert rows == [("death", {"who": "rollout worker 1", "why": "killed by signal 9", "then": "2 tickets run again"})]


def test_a_budget_is_spent_and_comes_back(clock):
    budget = RestartBudget(3, 600, clock)
    assert [budget.take() for _ in range(4)] == [True, True, True, False]
    clock.now += 599
    assert not budget.take()
    clock.now += 2
    assert [budget.take() for _ in range(4)] == [True, True, True, False]
