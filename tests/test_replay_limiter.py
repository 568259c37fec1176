"""The ratio between learner and collectors."""

import math

import pytest

from cosmos_ray.errors import ConfigError
from cosmos_ray.replay.limiter import SamplesPerInsert


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
