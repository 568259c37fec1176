"""The sample mixture of the learner: counts of sample types and classes, stand-ins, and a stream that resumes."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from cosmos_ray.config import LearnerConfig, ReplayConfig
from cosmos_ray.errors import StoreError
from cosmos_ray.learner.mixture import BatchSource, Mixture
from cosmos_ray.model.sample_types import SampleType
from tests.test_learner import BASE, FUTURE, REFINEMENT, fill, source, store

__all__ = ["store"]  # a fixture


class Ledger:
    """What a source drew: a pass-through around its sampler that counts windows per class."""

    def __init__(self, source: BatchSource):
        self.source, self.classes, self.sample_types = source, Counter(), Counter()
        pick = source.sampler.pick

        def counted(n, name):
            self.classes[name] += n
            return pick(n, name)

        source.sampler.pick = counted

    def run(self, batches: int):
        for _ in range(batches):
            batch = self.source.draw()
            assert len(batch.sample_types) == len(batch.actions) == len(batch.instructions) == self.source.batch_size
            self.sample_types.update(batch.sample_types.tolist())
        return self


@pytest.mark.parametrize("mixture, batch_size, sample_types, classes", [
    (BASE, 16, (8, 4, 4), {"demo": 8 + 4, "failure": 4}),  # base training replays demonstrations as successes
    (REFINEMENT, 20, (2, 9, 9), {"demo": 2, "success": 9, "failure": 9}),
    (REFINEMENT, 10, (1, 4.5, 4.5), {"demo": 1, "success": 4.5, "failure": 4.5}),
    (REFINEMENT, 1, (0.1, 0.45, 0.45), {"demo": 0.1, "success": 0.45, "failure": 0.45}),
    (dataclasses.replace(BASE, success_share=0.9), 4, (2, 1, 1), {"demo": 2 + 1.8, "failure": 0.2}),
    (dataclasses.replace(BASE, self_imitation=0.25), 16, (8, 4, 4), {"demo": 6 + 4, "success": 2, "failure": 4}),
], ids=["50/25/25", "10/45/45", "halves", "one at a time", "rare failures", "self-imitation"])  # fmt: skip
def test_counts_follow_the_shares_exactly_over_many_batches(store, mixture, batch_size, sample_types, classes):
    ledger = Ledger(source(store, mixture, batch_size)).run(40)
    names = (SampleType.POLICY, SampleType.WORLD_MODEL, *FUTURE)
    assert ledger.sample_types == Counter({int(name): round(40 * n) for name, n in zip(names, sample_types, strict=True)})
    assert ledger.classes == Counter({name: round(40 * n) for name, n in classes.items()})


@pytest.mark.parametrize("shares", [(0.5, 0.25, 0.25), (0.1, 0.45, 0.45), (0.98, 0.01, 0.01), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 32])
@pytest.mark.parametrize("success_share", [0.0, 0.3, 0.5, 0.9])
def test_no_count_is_ever_negative_or_a_whole_sample_off(store, shares, batch_size, success_share):
    drawn = source(store, Mixture(*shares, FUTURE, success_share, False), batch_size)
    wanted = np.array([share for _, _, share in drawn._cells]) * batch_size
    total = np.zeros(len(wanted))
    for batches in range(1, 200):
        counts = drawn._counts()
        total += counts
        assert counts.min() >= 0 and counts.sum() == batch_size
        assert np.abs(total - batches * wanted).max() < 1
    assert not total[wanted == 0].any()


@pytest.mark.parametrize("mode, sample_types", [
    ("future", FUTURE), ("action", (SampleType.VALUE_ACTION,)), ("both", (*FUTURE, SampleType.VALUE_ACTION)),
])  # fmt: skip
def test_the_value_mode_chooses_the_type_of_value_samples(mode, sample_types):
    config = LearnerConfig(value_mode=mode)
    for mixture in (Mixture.base(config, ReplayConfig()), Mixture.refinement(config, ReplayConfig())):
        assert mixture.value_types == sample_types


def test_policy_samples_imitate_labels_and_the_others_are_about_executed_actions(store):
    drawn = source(store, BASE, 16)
    picks = drawn.pick()
    windows = drawn.sampler.build(picks.windows)
    labels, actions = windows.labels, windows.actions.copy()
    batch = drawn.build(picks)
    policy = batch.sample_types == SampleType.POLICY
    assert not np.array_equal(labels[policy], actions[policy])
    assert np.array_equal(batch.actions[policy], labels[policy])
    assert np.array_equal(batch.actions[~policy], actions[~policy])


def test_self_imitation_reaches_both_mixtures_and_waits_for_a_success(tmp_path):
    config = LearnerConfig(self_imitation=0.5)
    assert Mixture.base(config, ReplayConfig()).self_imitation == 0.5
    mixture = Mixture.refinement(config, ReplayConfig())
    store = fill(tmp_path / "replay", demos=1, successes=0, failures=1)
    ledger = Ledger(source(store, dataclasses.replace(mixture, policy=1.0, world=0.0, value=0.0), 10)).run(2)
    assert ledger.classes == {"demo": 20}  # failures are never imitated
    fill(tmp_path / "replay", demos=0, successes=1, failures=0)
    ledger.source.sampler.refresh()
    assert ledger.run(2).classes == {"demo": 30, "success": 10}


def test_a_stream_of_another_mixture_begins_owing_nothing(store):
    state = source(store, BASE, 16).state_dict()
    other = source(store, dataclasses.replace(BASE, value_types=(*FUTURE, SampleType.VALUE_ACTION)), 16)
    other.load_state_dict(state)
    assert len(other.draw().sample_types) == 16


def test_weighted_imitation_takes_failures_too_and_what_was_executed(store, tmp_path):
    config = LearnerConfig(self_imitation=0.5, advantage_temperature=0.1)
    for earlier in (Mixture.base, Mixture.for_planning_network):  # there is no planning network yet
        assert not earlier(config, ReplayConfig()).weighted
    mixture = Mixture.refinement(config, ReplayConfig())
    mixture = dataclasses.replace(mixture, policy=1.0, world=0.0, value=0.0)
    drawn = source(store, mixture, 12)
    assert Ledger(drawn).run(2).classes == {"demo": 12, "success": 6, "failure": 6}
    picks = drawn.pick()
    windows = drawn.sampler.build(picks.windows)
    labels, actions = windows.labels.copy(), windows.actions.copy()
    batch, own = drawn.build(picks), np.array(windows.sources) == "rollout"
    assert np.array_equal(batch.own, own) and own.sum() == 6
    assert np.array_equal(batch.actions[own], actions[own]) and np.array_equal(batch.actions[~own], labels[~own])
    alone = source(fill(tmp_path / "replay", demos=1, successes=0, failures=0), mixture, 4).draw()
    assert not alone.own.any()  # demonstrations stand in, and weigh as ever
    unweighted = source(store, dataclasses.replace(mixture, weighted=False), 12)
    assert Ledger(unweighted).run(2).classes == {"demo": 12, "success": 12} and not unweighted.draw().own.any()


@pytest.mark.parametrize("have, expected", [
    ({"successes": 0}, {"demo": 1, "failure": 9}),
    ({"failures": 0}, {"demo": 1, "success": 9}),
    ({"successes": 0, "failures": 0}, {"demo": 10}),
])  # fmt: skip
def test_an_empty_class_is_replaced(tmp_path, have, expected):
    store = fill(tmp_path / "replay", **{"demos": 1, "successes": 1, "failures": 1, **have})
    ledger = Ledger(source(store, REFINEMENT, 10)).run(10)
    assert ledger.classes == Counter({name: 10 * n for name, n in expected.items()})


def test_a_class_that_fills_up_is_used_from_then_on(tmp_path):
    store = fill(tmp_path / "replay", demos=1, successes=1, failures=0)
    ledger = Ledger(source(store, REFINEMENT, 10)).run(5)
    assert ledger.classes["failure"] == 0
    fill(tmp_path / "replay", demos=0, successes=0, failures=1)
    ledger.source.sampler.refresh()
    assert ledger.run(5).classes["failure"] > 0


def test_an_empty_store_is_a_store_error(tmp_path):
    with pytest.raises(StoreError, match="collect episodes"):
        source(fill(tmp_path / "replay", 0, 0, 0)).draw()


def test_the_stream_continues_where_it_was_saved(store):
    first = source(store, batch_size=7)
    for _ in range(5):
        first.draw()
    state = json.loads(json.dumps(first.state_dict()))
    second = source(store, batch_size=7, seed=99)
    second.load_state_dict(state)
    for _ in range(5):
        left, right = first.draw(), second.draw()
        for name, value in vars(left).items():
            assert np.array_equal(value, getattr(right, name)), name
