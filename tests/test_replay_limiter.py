"""The ratio between learner and collectors."""

import json
import math

import pytest

from cosmos_ray.errors import ConfigError
from cosmos_ray.replay.sampling.limiter import SamplesPerInsert, resume_counters, steps_stored
from cosmos_ray.replay.store import ReplayStore
from tests.test_replay_episode import make_episode


@pytest.mark.parametrize(
    "inserted, sampled, can_sample_10, can_insert_20",
    [  # samples_per_insert 2, min_inserts 100, error_buffer 50
        (0, 0, False, True),  # nothing there yet
        (99, 0, False, True),  # an episode may cross the minimum
        (100, 0, True, True),  # owed 0: both sides may move
        (100, 40, True, True),  # owed -40, the draw takes it to the edge -50
        (100, 41, False, True),  # one window too many
        (105, 0, True, True),  # owed 10, the episode takes it to the edge 50
        (106, 0, True, False),  # one step too many
        (500, 800, True, True),  # the ratio holds over time
        (500, 700, True, False),
        (500, 850, False, True),
    ],
)
def test_table(inserted, sampled, can_sample_10, can_insert_20):
    limiter = SamplesPerInsert(2.0, 100, 50.0)
    limiter.count_insert(inserted)
    limiter.count_sample(sampled)
    assert limiter.can_sample(10) is can_sample_10
    assert limiter.can_insert(20) is can_insert_20


@pytest.mark.parametrize("ratio, batch, episode", [(0.5, 32, 200), (8.0, 25, 37), (1.0, 1, 1), (3.3, 1920, 200)])
def test_one_side_may_always_move_and_the_ratio_is_kept(ratio, batch, episode):
    limiter = SamplesPerInsert(ratio, 500, max(1.0, ratio, (batch + ratio * episode) / 2))
    limiter.check(batch, episode)
    for _ in range(3000):
        sample, insert = limiter.can_sample(batch), limiter.can_insert(episode)
        assert sample or insert
        if sample:
            limiter.count_sample(batch)
        else:
            limiter.count_insert(episode)
    # After the first episodes, the distance from the ratio is bounded by the buffer and one insert.
    assert abs(limiter.owed) <= limiter.error_buffer + ratio * episode


def test_a_buffer_that_can_stop_both_sides_is_refused():
    with pytest.raises(ConfigError, match="use at least 116"):
        SamplesPerInsert(1.0, 100, 50.0).check(32, 200)


@pytest.mark.parametrize("settings", [(0.0, 1, 10.0), (1.0, 0, 10.0), (1.0, 1, 0.5), (20.0, 1, 10.0)])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        SamplesPerInsert(*settings)


def test_an_infinite_buffer_leaves_the_minimum():
    limiter = SamplesPerInsert(1.0, 100, math.inf)
    assert not limiter.can_sample(1) and limiter.can_insert(10**9)
    limiter.count_insert(100)
    assert limiter.can_sample(10**9) and limiter.can_insert(10**9)


def test_counters_resume():
    limiter = SamplesPerInsert(2.0, 100, 50.0)
    limiter.count_insert(321)
    limiter.count_sample(123)
    resumed = SamplesPerInsert(2.0, 100, 50.0)
    resumed.load_state_dict(limiter.state_dict())
    assert resumed == limiter


def test_a_limiter_restored_in_the_middle_decides_as_one_that_never_stopped():
    """Stopped at every second step of a run, and continued from what JSON keeps of it."""

    def run(stops: bool) -> list[tuple[bool, bool, float]]:
        limiter, decisions = SamplesPerInsert(3.3, 100, 800.0), []
        for step in range(400):
            if stops and step % 2:
                state = json.loads(json.dumps(limiter.state_dict()))
                limiter = SamplesPerInsert(3.3, 100, 800.0)
                limiter.load_state_dict(state)
            decisions.append((limiter.can_sample(64), limiter.can_insert(37), limiter.owed))
            if decisions[-1][0]:
                limiter.count_sample(64)
            else:
                limiter.count_insert(37)
        return decisions

    decisions = run(stops=True)
    assert decisions == run(stops=False)
    assert {decision[0] for decision in decisions} == {True, False} and (False, True) in {d[:2] for d in decisions}


# ---------------------------------------------------------------- a refinement that goes on


def counted(account):
    return account["inserted"], account["sampled"]


def test_a_refinement_counts_from_its_first_start():
    """What other refinements left in the store, or this one trained before it collected anything, is not its account."""
    assert counted(resume_counters(None, stored=0, step=0, batch=8)) == (0, 0)
    assert counted(resume_counters(None, stored=450, step=20, batch=8)) == (0, 0)


def test_the_counters_go_on_over_interruptions_lost_steps_and_another_batch_size():
    account = None
    for stored, step, batch, expected in [
        (100, 0, 8, (0, 0)),  # the first start, with 100 steps of before
        (100, 0, 8, (0, 0)),  # stopped before anything was done
        (340, 10, 8, (240, 80)),  # 240 steps were committed, the learner's state is of step 10
        (400, 10, 16, (300, 80)),  # killed: steps trained after the state are lost, the windows they drew do not count
        (400, 15, 16, (300, 160)),  # five of 16 since
        (700, 40, 8, (600, 560)),
        (700, 35, 8, (600, 520)),  # the learner went back to an older state
    ]:
        account = resume_counters(account, stored, step, batch)
        assert counted(account) == expected


def test_stored_steps_are_those_of_every_episode_ever_committed(tmp_path):
    store = ReplayStore(tmp_path / "store")
    episodes = [make_episode(seed, "rollout", length=length) for seed, length in ((1, 5), (2, 7), (3, 11))]
    for episode in episodes[:2]:
        store.commit(episode)
    names = [episode.key.name for episode in episodes]
    assert steps_stored(store, names) == 12
    store.evict(names[:1], "test")
    assert steps_stored(store, names) == 12
    again = ReplayStore(tmp_path / "store", create=False)
    again.refresh()
    assert steps_stored(again, names) == 12
