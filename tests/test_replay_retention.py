"""Which episodes a retention policy lets go, and which rollouts the loop forgets."""

from types import SimpleNamespace

import pytest

from cosmos_ray.config import ReplayConfig, RunConfig
from cosmos_ray.errors import StoreError
from cosmos_ray.folder import RunFolder
from cosmos_ray.replay.format.episode import CLASSES, EpisodeKey, EpisodeSummary
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.replay.upkeep.retention import Retention, keep_newest
from cosmos_ray.rollout.ticket import stored_result
from cosmos_ray.stages.rollout import forget_old_rollouts
from tests.test_replay_episode import make_episode


def episode(name, source, created, success=True, version=-1, size=10, invalid=""):
    key = EpisodeKey("run", "Lift", source, 0)
    return EpisodeSummary(key, name, "", success, float(success), 0.0, 5, False, invalid, version, (), float(created), size)


#: Name, class and what else matters; letters are in the order of their commits.
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
    (("demo", "evaluation"), {"newest": 0}, "bcdfghi"),
    (("demo", "evaluation"), {"newest": 3}, "bcdf"),
    (("demo", "evaluation"), {"newest": 100}, ""),
    (("demo", "failure", "evaluation"), {"newest": 0}, "bcfgi"),
    (("demo", "failure", "evaluation"), {"newest": 2}, "bcf"),
    (("success",), {"newest": 1}, "abdegh"),
    ((), {"newest": 4}, "abcdef"),
    (CLASSES, {"newest": 0}, ""),
    # Maximum staleness: the newest rollout is of version 4; demonstrations have no version.
    (("demo", "evaluation"), {"max_staleness": 0}, "cdfg"),
    (("demo", "evaluation"), {"max_staleness": 1}, "cdf"),
    (("demo", "evaluation"), {"max_staleness": 2}, "cd"),
    (("demo", "evaluation"), {"max_staleness": 3}, ""),
    (("failure",), {"max_staleness": 2}, "ce"),
    ((), {"max_staleness": 0}, "cdefg"),
    # Bytes: what is kept for ever counts; the newer ones go first into what is left, and one that is too large is passed over.
    (("demo", "evaluation"), {"max_bytes": 1000}, ""),
    (("demo", "evaluation"), {"max_bytes": 190}, ""),
    (("demo", "evaluation"), {"max_bytes": 189}, "b"),
    (("demo", "evaluation"), {"max_bytes": 150}, "bcdf"),
    (("demo", "evaluation"), {"max_bytes": 60}, "bcdh"),
    (("demo", "evaluation"), {"max_bytes": 30}, "bcdfghi"),
    (("demo", "evaluation"), {"max_bytes": 0}, "bcdfghi"),
    # An episode goes as soon as one bound says so.
    (("demo", "evaluation"), {"newest": 3, "max_staleness": 0}, "bcdfg"),
    (("demo", "evaluation"), {"newest": 5, "max_bytes": 60}, "bcdh"),
    (("demo", "evaluation"), {"newest": 1, "max_bytes": 0}, "bcdfghi"),
])  # fmt: skip
def test_policies(keep, bounds, gone):
    policy = Retention(keep, **bounds)
    assert letters(policy) == letters(policy, EPISODES[::-1]) == gone
    assert policy.expired([e for e in EPISODES if e.name[0] not in gone]) == []  # it has nothing to say to what it left


def test_demonstrations_and_evaluation_are_kept_by_default():
    assert letters(Retention(newest=0)) == "bcdfghi"


def test_classes():
    assert [e.episode_class for e in EPISODES] == [
        "demo", "invalid", "success", "failure", "evaluation", "success", "invalid", "failure", "success", "demo"]  # fmt: skip


def test_equal_times_are_decided_by_the_name():
    episodes = [episode(name, "rollout", 1, version=0) for name in "cab"]
    assert Retention(newest=1).expired(episodes) == ["a", "b"]


def test_no_episodes():
    assert Retention(newest=1, max_staleness=1, max_bytes=1).expired([]) == []


@pytest.mark.parametrize("arguments, message", [
    ({}, "needs a bound"), ({"newest": -1}, "must not be negative"), ({"max_bytes": -5}, "must not be negative"),
    ({"keep": ("demo", "sucess"), "newest": 1}, "cannot keep sucess: classes of episodes are demo, success"),
])  # fmt: skip
def test_impossible_policies_are_refused(arguments, message):
    with pytest.raises(StoreError, match=message):
        Retention(**arguments)


# ---------------------------------------------------------------- the loop


def commit_one_of_each(store, run="run"):
    """Demonstration, successes, failures and evaluation of run ``run``, a failed attempt of the expert, a rollout of another run."""
    made = [make_episode(0, run=run), make_episode(1, "eval", run=run), make_episode(9, "rollout", success=False, run=run)]
    made[-1].policy_version = -1
    made += [make_episode(seed, "rollout", success=seed % 2 == 0, run=run) for seed in range(2, 8)]
    made.append(make_episode(2, "rollout", run="other"))
    for number, each in enumerate(made):
        store.commit(each, created=1000.0 + number)
    return {each.key.name for each in made}


def rollout_names(seeds, run="run"):
    return {make_episode(seed, "rollout", run=run).key.name for seed in seeds}


@pytest.mark.parametrize("newest, keep_failures, gone", [(2, False, (2, 3, 4, 5)), (2, True, (2, 4)), (1, True, (2, 4, 6)), (6, False, ())])
def test_the_newest_rollouts_stay_and_with_them_all_failures(tmp_path, newest, keep_failures, gone):
    store = ReplayStore(tmp_path / "store")
    names = commit_one_of_each(store)
    rollouts = [s for s in store.summaries() if s.of_policy and s.key.run == "run"]
    assert keep_newest(store, rollouts, newest, keep_failures) == len(gone)
    assert set(store.keys()) == names - rollout_names(gone)


@pytest.mark.parametrize("replay, gone", [
    (ReplayConfig(), ()), (ReplayConfig(keep_newest=1), (2, 4, 6)), (ReplayConfig(keep_newest=1, keep_failures=False), (2, 3, 4, 5, 6)),
])  # fmt: skip
def test_the_loop_forgets_old_rollouts_of_its_run_and_runs_none_of_them_again(tmp_path, replay, gone):
    config = RunConfig(root=str(tmp_path), name="run", replay=replay)
    run = SimpleNamespace(config=config, folder=RunFolder(config))
    own = run.folder.identity.key
    names = commit_one_of_each(run.folder.store(), own)
    assert [forget_old_rollouts(run, run.folder.store()) for _ in range(2)] == [len(gone), 0]
    store = run.folder.store()
    assert set(store.keys()) == names - rollout_names(gone, own)
    assert all(name in store and stored_result(store, name) is not None for name in rollout_names(gone, own))
    run.folder.close()
