"""Which episodes a retention policy lets go."""

import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.format.episode import EpisodeKey, EpisodeSummary
from cosmos_ray.replay.upkeep.retention import KINDS, Retention, kind_of


def episode(name, source, created, success=True, version=-1, size=10, invalid=""):
    key = EpisodeKey("run", "Lift", source, 0)
    return EpisodeSummary(key, name, "", success, float(success), 0.0, 5, False, invalid, version, (), float(created), size)


#: Name, kind and what else matters; letters are in the order of their commits.
EPISODES = [
    episode("a-demo", "demo", 1),
    episode("b-failed-demo", "demo", 2, success=False),
    episode("c-success", "rollout", 3, version=1),
    episode("d-failure", "rollout", 4, success=False, version=1),
    episode("e-eval", "eval", 5, version=1),
    episode("f-success", "rollout", 6, version=2),
    episode("g-invalid", "rollout", 7, success=False, version=3, invalid="exploded"),
    episode("h-failure", "rollout", 8, success=False, version=4, size=100),
    episode("i-success", "rollout", 9, version=4),
    episode("j-demo", "demo", 10),
]


def letters(policy, episodes=EPISODES):
    return "".join(name[0] for name in policy.expired(episodes))


@pytest.mark.parametrize("keep, bounds, gone", [
    # The newest M of what is not kept for ever.
    (("demo", "eval"), {"newest": 0}, "bcdfghi"),
    (("demo", "eval"), {"newest": 3}, "bcdf"),
    (("demo", "eval"), {"newest": 100}, ""),
    (("demo", "failure", "eval"), {"newest": 0}, "bcfgi"),
    (("demo", "failure", "eval"), {"newest": 2}, "bcf"),
    (("success",), {"newest": 1}, "abdegh"),
    ((), {"newest": 4}, "abcdef"),
    (KINDS, {"newest": 0}, ""),
    # Maximum staleness: the newest rollout is of version 4; demonstrations have no version.
    (("demo", "eval"), {"max_staleness": 0}, "cdfg"),
    (("demo", "eval"), {"max_staleness": 1}, "cdf"),
    (("demo", "eval"), {"max_staleness": 2}, "cd"),
    (("demo", "eval"), {"max_staleness": 3}, ""),
    (("failure",), {"max_staleness": 2}, "ce"),
    ((), {"max_staleness": 0}, "cdefg"),
    # Bytes: what is kept for ever counts; the newer ones go first into what is left, and one that is too large is passed over.
    (("demo", "eval"), {"max_bytes": 1000}, ""),
    (("demo", "eval"), {"max_bytes": 190}, ""),
    (("demo", "eval"), {"max_bytes": 189}, "b"),
    (("demo", "eval"), {"max_bytes": 150}, "bcdf"),
    (("demo", "eval"), {"max_bytes": 60}, "bcdh"),
    (("demo", "eval"), {"max_bytes": 30}, "bcdfghi"),
    (("demo", "eval"), {"max_bytes": 0}, "bcdfghi"),
    # An episode goes as soon as one bound says so.
    (("demo", "eval"), {"newest": 3, "max_staleness": 0}, "bcdfg"),
    (("demo", "eval"), {"newest": 5, "max_bytes": 60}, "bcdh"),
    (("demo", "eval"), {"newest": 1, "max_bytes": 0}, "bcdfghi"),
])  # fmt: skip
def test_policies(keep, bounds, gone):
    policy = Retention(keep, **bounds)
    assert letters(policy) == letters(policy, EPISODES[::-1]) == gone
    assert policy.expired([e for e in EPISODES if e.name[0] not in gone]) == []  # it has nothing to say to what it left


def test_demonstrations_and_evaluation_are_kept_by_default():
    assert letters(Retention(newest=0)) == "bcdfghi"


def test_kinds():
    assert [kind_of(e) for e in EPISODES] == [
        "demo", "invalid", "success", "failure", "eval", "success", "invalid", "failure", "success", "demo"]  # fmt: skip


def test_equal_times_are_decided_by_the_name():
    episodes = [episode(name, "rollout", 1, version=0) for name in "cab"]
    assert Retention(newest=1).expired(episodes) == ["a", "b"]


def test_no_episodes():
    assert Retention(newest=1, max_staleness=1, max_bytes=1).expired([]) == []


@pytest.mark.parametrize("arguments, message", [
    ({}, "needs a bound"), ({"newest": -1}, "must not be negative"), ({"max_bytes": -5}, "must not be negative"),
    ({"keep": ("demo", "sucess"), "newest": 1}, "cannot keep sucess: kinds of episodes are demo, success"),
])  # fmt: skip
def test_impossible_policies_are_refused(arguments, message):
    with pytest.raises(StoreError, match=message):
        Retention(**arguments)
