"""The learner's group without Ray: what is called, answered, said and started again."""

from pathlib import Path

import pytest

from cosmos_ray.errors import CheckpointError
from cosmos_ray.learner.group import Answer, LearnerGroup, LearnerLost, RankDied
from cosmos_ray.supervision import LEARNER_RESTARTS, LEARNER_RESTARTS_S, LEARNER_START_S, PROBE_S, Supervisor


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Ranks:
    """Two ranks that answer when told to."""

    def __init__(self, log: list, step: int):
        self.log, self.step, self.waits, self.error, self.open = log, step, False, None, True

    def begin(self, method, *arguments):
        self.log.append((method, *arguments))
        return method, arguments

    def answers(self, call, timeout):
        if self.error is not None:
            raise self.error
        if self.waits:
            return None
        method, arguments = call
        if method == "train":
            self.step += arguments[0]
        return {"address": [("host", 7)], "start": [(self.step, ["step_00000009 was not finished"])] * 2,
                "train": [{"step": float(self.step)}] * 2, "publish": [f"weights {arguments}", None]}.get(method, [None, None])

    def silent(self, call):
        return "learner rank 1"

    def close(self):
        self.open = False


class Driver:
    """A group, what its ranks were asked, and what its supervisor recorded."""

    def __init__(self, deadline_s=60.0, state=20):
        self.clock, self.log, self.records, self.launched, self.room, self.state = Clock(), [], [], [], True, state
        supervisor = Supervisor(lambda kind, **values: self.records.append((kind, values)), self.clock)
        self.group = LearnerGroup(self.launch, ("task",), Path("runs/x/learner"), supervisor, deadline_s, self.clock)

    def launch(self):
        if not self.room:
            return None
        self.launched.append(Ranks(self.log, self.state))
        return self.launched[-1]

    @property
    def ranks(self) -> Ranks:
        return self.launched[-1]

    def die(self, why="killed"):
        self.ranks.error = RankDied("learner rank 1", why)
        return self.group.poll()

    @property
    def deaths(self) -> list[dict]:
        return [values for kind, values in self.records if kind == "death"]


def test_ranks_meet_where_the_first_one_says_and_go_on_from_their_state(caplog):
    driver = Driver()
    assert driver.group.busy and not driver.group.started
    assert driver.group.poll() == [Answer("start", 20)]
    assert driver.log == [("address",), ("start", "task", "host", 7)]
    assert driver.group.started and not driver.group.busy and driver.group.step == 20
    assert "step_00000009 was not finished; going on from step 20" in caplog.text


def test_calls_are_done_in_order_and_nobody_waits_for_them():
    driver, group = Driver(), None
    group = driver.group
    group.poll()
    group.train(10)
    group.publish(4)
    group.save()
    driver.ranks.waits = True
    assert group.poll() == [] and group.busy and group.training
    driver.ranks.waits = False
    assert group.poll() == [Answer("train", {"step": 30.0}), Answer("publish", "weights (4,)"), Answer("save", 30)]
    assert not group.busy and not group.training and group.step == 30


def test_a_state_is_due_when_a_multiple_was_passed_since_the_last():
    group = Driver(state=20).group
    group.poll()
    assert not group.save_due(10)
    group.train(15)
    group.poll()
    assert group.save_due(10) and not group.save_due(40)
    group.save()
    assert not group.save_due(10)


def test_a_death_forgets_what_was_called_and_starts_all_ranks_again():
    driver = Driver()
    group = driver.group
    group.poll()
    group.train(10)
    group.save()
    before = driver.ranks
    assert driver.die() == [] and not before.open and not group.started and group.busy and not group.training
    assert group.poll() == [Answer("start", 20)] and group.step == 20 and group.restarts == 1
    assert driver.log[-2:] == [("address",), ("start", "task", "host", 7)]
    (death,) = driver.deaths
    assert death["who"] == "learner rank 1" and death["why"] == "killed" and "restart 1" in death["then"]


def test_a_budget_that_is_spent_names_every_reason_in_one_line():
    driver = Driver()
    for i in range(LEARNER_RESTARTS + 1):
        driver.group.poll()
        driver.group.train(10)
        assert driver.group.poll()[0].kind == "train"  # further than before, so only the budget counts
        driver.state += 10
        driver.group.train(10)
        if i < LEARNER_RESTARTS:
            driver.die("killed by the kernel" if i else "a bad link")
    with pytest.raises(LearnerLost) as caught:
        driver.die("killed by the kernel")
    message = str(caught.value)
    assert "\n" not in message and "died 4 times" in message and "runs/x/learner" in message and "same command again" in message
    assert "learner rank 1: a bad link" in message and "learner rank 1: killed by the kernel (3 times)" in message
    assert len(driver.deaths) == LEARNER_RESTARTS + 1 and not any(ranks.open for ranks in driver.launched)


def restarts_until_lost(driver, seconds: float, further: bool) -> int:
    for count in range(20):
        driver.group.poll()
        driver.clock.now += seconds
        driver.state += 10 * further
        driver.group.train(10)
        try:
            driver.die()
        except LearnerLost:
            return count
    return 20


def test_restarts_far_apart_are_not_counted_together_while_training_goes_further():
    assert restarts_until_lost(Driver(deadline_s=10_000), LEARNER_RESTARTS_S, further=True) == 20
    assert restarts_until_lost(Driver(deadline_s=10_000), LEARNER_RESTARTS_S / 10, further=True) == LEARNER_RESTARTS


def test_restarts_far_apart_end_when_training_never_goes_further():
    assert restarts_until_lost(Driver(deadline_s=10_000), 2 * LEARNER_RESTARTS_S, further=False) == LEARNER_RESTARTS


@pytest.mark.parametrize("start", [True, False])
def test_a_hung_rank_is_a_death_past_its_deadline(start):
    driver = Driver(deadline_s=900)
    if start:
        driver.launch().waits = True
        driver.group._launch = lambda: driver.ranks
        driver.group.poll()
        deadline = LEARNER_START_S
    else:
        driver.group.poll()
        driver.group.train(10)
        driver.ranks.waits, deadline = True, 900
    driver.clock.now += deadline - 1
    assert driver.group.poll() == [] and not driver.deaths
    driver.clock.now += 2
    driver.group.poll()
    (death,) = driver.deaths
    assert death["who"] == "learner rank 1" and f"no answer within {deadline:g} s" in death["why"]


def test_an_error_that_would_come_again_is_raised_at_once():
    driver = Driver()
    driver.group.poll()
    driver.group.save()
    driver.ranks.error = CheckpointError("the disk is full")
    with pytest.raises(CheckpointError, match="the disk is full"):
        driver.group.poll()
    assert not driver.deaths and driver.group.restarts == 0


def test_a_wait_that_is_longer_than_usual_is_said(caplog):
    driver = Driver()
    group, clock = driver.group, driver.clock

    def burst(seconds: int) -> None:
        group.train(25)
        driver.ranks.waits = True
        for _ in range(seconds):
            clock.now += 1
            group.poll()
        driver.ranks.waits = False
        group.poll()

    group.poll()
    burst(9)
    assert "waiting" not in caplog.text
    burst(40)
    assert "learner: waiting for a burst of 25 training steps" in caplog.text and "goes on" in caplog.text
    caplog.clear()
    burst(45)  # a burst of this learner takes about as long
    assert "waiting" not in caplog.text


def test_room_that_comes_later_is_taken_when_it_comes():
    driver = Driver()
    driver.room = False
    assert driver.group.poll() == driver.group.poll() == [] and not driver.log
    driver.room = True
    assert driver.group.poll() == [Answer("start", 20)]


def test_an_idle_rank_that_died_is_noticed():
    driver = Driver()
    driver.group.poll()
    driver.clock.now += 2 * PROBE_S
    driver.group.poll()
    assert driver.log[-1] == ("probe",) and not driver.group.busy
    driver.die()
    assert driver.deaths and driver.group.poll() == [Answer("start", 20)]


def test_an_interrupt_saves_behind_the_burst_that_runs():
    driver = Driver()
    assert driver.group.save_now() is None  # nothing is there to save yet
    driver.group.poll()
    driver.group.train(10)
    assert driver.group.save_now() == 30
    assert driver.log[-2:] == [("train", 10), ("save",)] and not driver.group.busy
    driver.group.close()
    assert not driver.ranks.open
