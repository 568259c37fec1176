"""The learner with batches made ahead in threads: the same weights, bit for bit, as without."""

import numpy as np
import pytest

from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.weights import pack
from tests import test_learner
from tests.test_learner import core_on, fill, losses
from tests.test_replay_episode import make_episode

store = test_learner.store


def weights(core) -> tuple[int, int]:
    """Checksums of the trained and the published weights."""
    return pack(core.policy.net.named_parameters(), 1).checksum, core.weights(1).checksum


def test_batches_made_ahead_train_the_same_weights_while_episodes_come_and_go(alone, tmp_path):
    def train(root, threads):
        core = core_on(root, loader_threads=threads)
        beside = ReplayStore(root, create=False)
        seen = losses(core, 2)
        beside.commit(make_episode(900, "rollout", size=32, length=15))
        core.refresh()
        seen += losses(core, 2)
        beside.refresh()
        beside.evict([make_episode(seed, "rollout", size=32).key.name for seed in (100, 101)], "test")
        core.refresh()  # nothing new, but two fewer
        return seen + losses(core, 2), weights(core), core.loader is not None

    results = []
    for threads in (0, 2):
        root = tmp_path / f"threads{threads}"
        fill(root)
        results.append(alone(train, root, threads))
    (plain, plain_weights, without), (ahead, ahead_weights, with_loader) = results
    assert not without and with_loader
    assert plain == ahead and plain_weights == ahead_weights
    assert len(set(plain)) == 6 and np.isfinite(plain).all()


@pytest.mark.parametrize("resumed_with", [2, 0])
def test_a_learner_resumes_bit_identically_though_batches_were_in_flight(alone, store, tmp_path, resumed_with):
    def run(root, folder):
        whole = core_on(root, loader_threads=2)
        before = losses(whole, 3)
        whole.save(folder)
        after = losses(whole, 3)
        resumed = core_on(root, loader_threads=resumed_with)
        losses(resumed, 1)  # what it has made ahead by now is of another place in the stream
        assert resumed.load(folder) and resumed.step_count == 3
        return before, after, losses(resumed, 3), weights(whole), weights(resumed)

    before, after, again, whole, resumed = alone(run, store.root, tmp_path / "state")
    assert after == again and whole == resumed and before != after
