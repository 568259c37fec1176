"""Decoded frames in memory: the newest episodes, within a bound, never other pixels than the store's; and frames made from states."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.errors import ConfigError, SimulationError, StoreError
from cosmos_ray.replay.format.codec import decode_jpeg
from cosmos_ray.replay.format.episode import Episode, EpisodeKey
from cosmos_ray.replay.sampling.frames import HotFrames
from cosmos_ray.replay.sampling.loader import PrefetchLoader
from cosmos_ray.replay.sampling.sampler import WindowSampler, WindowStream
from cosmos_ray.replay.sampling.windows import Selection
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.simulation import start
from cosmos_ray.sim.state_render import StateRenderer
from tests.test_replay_episode import make_episode
from tests.test_replay_sampler import assert_batches_equal

SHAPE = (2, 4, 4, 3)
STEP = int(np.prod(SHAPE))  # bytes


def frames_of(name, step) -> np.ndarray:
    return np.random.default_rng([hash(name) % 2**32, step]).integers(0, 256, SHAPE, np.uint8)


def put(hot, name, created, step=0, steps=4):
    hot.put(name, created, np.arange(steps), step, frames_of(name, step))


def held(hot, names) -> str:
    """Those of ``names`` (``a`` was created at 0, ``b`` at 1, ...) of which step 0 is held."""
    return "".join(name for name in names if hot.get(name, 0, float(ord(name) - 97)) is not None)


def put_letters(hot, letters, **options):
    for letter in letters:
        put(hot, letter, float(ord(letter) - 97), **options)


# ---------------------------------------------------------------- the cache alone


def test_frames_come_back_as_they_were_put_and_are_copies():
    hot = HotFrames(100 * STEP)
    frames = frames_of("a", 2)
    hot.put("a", 0.0, np.arange(4), 2, frames)
    frames[:] = 0
    assert np.array_equal(hot.get("a", 2, 0.0), frames_of("a", 2))
    assert [hot.get("a", step, 0.0) for step in (0, 1, 3, 4, -1)] == [None] * 5  # not put, or no steps of its


@pytest.mark.parametrize("order", ["abcdef", "fedcba", "cafebd"])
def test_the_newest_episodes_are_kept_whatever_the_order_of_their_use(order):
    hot = HotFrames(3 * 4 * STEP)
    put_letters(hot, order)
    assert held(hot, "abcdef") == "def" and len(hot) == 3 and hot.bytes == 12 * STEP


def test_an_older_episode_never_takes_the_place_of_a_newer_one():
    hot = HotFrames(2 * 4 * STEP)
    put_letters(hot, "cd")
    put_letters(hot, "ab")
    assert held(hot, "abcd") == "cd"


def test_no_episode_is_given_up_for_one_that_is_not_taken_in():
    """The new one is as large as three: the older one alone is not enough, the others are newer."""
    hot = HotFrames(3 * 4 * STEP)
    put_letters(hot, "ade")
    put_letters(hot, "b", steps=12)
    assert held(hot, "abde") == "ade" and hot.bytes == 12 * STEP


def test_a_large_new_episode_takes_the_place_of_several():
    hot = HotFrames(3 * 4 * STEP)
    put_letters(hot, "abc")
    put_letters(hot, "z", steps=8)
    assert held(hot, "abcz") == "cz" and hot.bytes == 12 * STEP


def test_an_episode_larger_than_the_bound_is_not_taken_in():
    hot = HotFrames(4 * STEP)
    put_letters(hot, "a")
    put_letters(hot, "z", steps=5)
    assert held(hot, "az") == "a"


@pytest.mark.parametrize("limit", [0, -1])
def test_without_room_nothing_is_held(limit):
    hot = HotFrames(limit)
    put_letters(hot, "abc")
    assert len(hot) == hot.bytes == 0


def test_steps_that_an_episode_does_not_have_are_not_kept_and_cost_no_other_its_place():
    hot = HotFrames(4 * STEP)
    put_letters(hot, "a")
    put_letters(hot, "z", step=4)
    put_letters(hot, "a", step=9)
    assert held(hot, "az") == "a" and hot.bytes == 4 * STEP
    hot.put("z", 25.0, np.zeros(0, np.int32), 0, frames_of("z", 0))
    assert len(hot) == 1


def test_a_dropped_episode_is_gone_and_its_room_is_free():
    hot = HotFrames(2 * 4 * STEP)
    put_letters(hot, "bc")
    hot.drop("c")
    hot.drop("never seen")
    assert held(hot, "bc") == "b" and hot.bytes == 4 * STEP
    put_letters(hot, "a")  # older than both, but there is room now
    assert held(hot, "ab") == "ab"
    put_letters(hot, "de")
    assert held(hot, "abde") == "de" and hot.bytes == 8 * STEP


def test_another_episode_under_the_same_name_is_another_one():
    hot = HotFrames(4 * STEP)
    put(hot, "a", 0.0)
    assert hot.get("a", 0, 1.0) is None
    hot.put("a", 1.0, np.arange(4), 0, frames_of("other", 0))
    assert np.array_equal(hot.get("a", 0, 1.0), frames_of("other", 0)) and hot.get("a", 0, 0.0) is None
    assert len(hot) == 1 and hot.bytes == 4 * STEP


def test_many_threads_read_what_was_put_and_the_bound_holds_throughout():
    hot, wrong = HotFrames(5 * 4 * STEP), []
    names = [f"episode {i}" for i in range(20)]

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(1500):
            number, step = int(rng.integers(20)), int(rng.integers(4))
            name, action = names[number], rng.random()
            if action < 0.02:
                hot.drop(name)
            elif action < 0.5:
                put(hot, name, float(number), step)
            else:
                found = hot.get(name, step, float(number))
                if found is not None and not np.array_equal(found, frames_of(name, step)):
                    wrong.append((name, step))
            if hot.bytes > hot.limit:
                wrong.append(hot.bytes)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert hot.bytes == len(hot) * 4 * STEP and 0 < len(hot) <= 5


# ---------------------------------------------------------------- behind a sampler


def fill(root, episodes) -> ReplayStore:
    store = ReplayStore(root)
    for episode in episodes:
        store.commit(episode)
    return store


def test_a_cached_draw_equals_an_uncached_one(tmp_path):
    store = fill(tmp_path / "store", [make_episode(seed, length=5 + seed) for seed in range(8)])
    samplers = {limit: WindowSampler(store, chunk=3, gamma=0.9, seed=1, frame_cache_bytes=limit) for limit in (0, 40_000, 1 << 30)}
    for _ in range(8):
        batches = [sampler.draw(40, "demo") for sampler in samplers.values()]
        assert_batches_equal(batches[0], batches[1])
        assert_batches_equal(batches[0], batches[2])
    assert len(samplers[0].hot) == 0 and len(samplers[1 << 30].hot) == 8
    newest = sorted(store.summaries(), key=lambda summary: summary.created)[-1]
    small = samplers[40_000].hot
    assert 0 < len(small) < 8 and small.bytes <= 40_000
    assert any(small.get(newest.name, step, newest.created) is not None for step in range(newest.length + 1))


def test_frames_are_not_kept_of_an_episode_that_was_committed_again(tmp_path):
    """Lost and run again: another episode under the same name, which the sampler must not mix with the first one's pictures."""
    first, again = make_episode(3), make_episode(3)
    again.frames = {step: make_episode(4).frames[step] for step in again.frames}
    store = fill(tmp_path / "store", [first])
    sampler = WindowSampler(store, chunk=3, gamma=0.9, seed=1)
    sampler.draw(100, "demo")
    assert sampler.hot.bytes
    store.discard(first.key.name, "test")
    store.commit(again)
    sampler.refresh()
    batch = sampler.draw(100, "demo")
    for row, t in enumerate(batch.offsets):
        assert np.array_equal(batch.images[row], np.stack([decode_jpeg(data) for data in again.frames[t]]))


# ---------------------------------------------------------------- frames made from states


CHUNK, LENGTH = 4, 14


@pytest.fixture(scope="module")
def lift() -> SimpleNamespace:
    """One short live episode: with the frames of every step, and with those at chunk ends and the end only."""
    env = Environment(SimConfig(fast_step=False), make_seed=0)
    trajectory = start(env, 5)
    actions = np.random.default_rng(5).uniform(-1, 1, (LENGTH, env.action_dim)).astype(np.float32)
    env.execute(actions, trajectory, render_at=tuple(range(1, LENGTH + 1)))
    info = {"horizon": env.horizon, "fingerprint": env.fingerprint}
    env.close()
    key = EpisodeKey("run", env.task, "rollout", 5)
    whole = Episode.from_trajectory(trajectory, key, policy_version=0, info=info)
    trajectory.frames = {step: trajectory.frames[step] for step in (*range(0, LENGTH, CHUNK), LENGTH)}
    return SimpleNamespace(whole=whole, bare=Episode.from_trajectory(trajectory, key, policy_version=0, info=info))


@pytest.fixture(scope="module")
def renderer():
    made = StateRenderer()
    yield made
    made.close()


def test_rendered_windows_equal_to_the_pixel_those_of_an_episode_with_all_frames(lift, renderer, tmp_path):
    stored = WindowSampler(fill(tmp_path / "whole", [lift.whole]), chunk=CHUNK, gamma=0.9, seed=2)
    bare = fill(tmp_path / "bare", [lift.bare])
    assert WindowSampler(bare, chunk=CHUNK, gamma=0.9, seed=2).counts()["rollout"].windows == 4
    rendered = WindowSampler(bare, chunk=CHUNK, gamma=0.9, seed=2, render=renderer)
    assert rendered.counts() == stored.counts() and rendered.counts()["rollout"].windows == LENGTH
    for what in ("rollout", Selection(half_life=2.0)):
        left, right = stored.draw(40, what), rendered.draw(40, what)
        assert_batches_equal(left, right)
        assert set(left.offsets) == set(range(LENGTH))
    assert len({image.tobytes() for image in left.images}) == LENGTH  # the pictures differ, so equality says something


def test_a_loader_whose_thread_may_not_render_says_so_and_leaves_the_stream_as_it_was(lift, renderer, tmp_path):
    """OpenGL belongs to the thread of a process that rendered first, which is this one."""
    stored = WindowSampler(fill(tmp_path / "whole", [lift.whole]), chunk=CHUNK, gamma=0.9, seed=2)
    rendered = WindowSampler(fill(tmp_path / "bare", [lift.bare]), chunk=CHUNK, gamma=0.9, seed=2, render=renderer)
    with pytest.raises(ConfigError, match="one thread"):
        PrefetchLoader(WindowStream(rendered, 8), threads=2)
    with PrefetchLoader(WindowStream(rendered, 8), threads=1) as loader, pytest.raises(SimulationError, match="another thread"):
        for _ in range(3):
            next(loader)
    assert_batches_equal(stored.draw(8), rendered.draw(8))


def test_an_episode_that_cannot_be_rendered_is_named_and_not_quarantined(tmp_path):
    store = fill(tmp_path / "store", [make_episode(1, "rollout", chunk=CHUNK)])
    sampler = WindowSampler(store, chunk=CHUNK, gamma=0.9, seed=0, render=StateRenderer())
    with pytest.raises(StoreError, match="fingerprint") as caught:
        sampler.draw(50, "rollout")
    assert "\n" not in str(caught.value) and not store.quarantine.entries()
